"""Formats say which part of a row's text is trained, whichever columns it comes in."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfl_lora.data.formats import (
    ALPACA,
    ALPACA_INPUT,
    EMPTY,
    FORMATS,
    MIXED,
    NO_ASSISTANT,
    NO_FINAL,
    NO_TEXT,
    NO_TURNS,
    REWRITTEN,
    UNKNOWN_ROLE,
    BadRow,
    Chat,
    Row,
    Segment,
    Turn,
    format_of,
)
from dfl_lora.errors import UserError


def chat(messages: Sequence[Turn], add_generation_prompt: bool) -> str:
    """Writes turns one after the other."""
    said = "".join(f"<{turn['role']}>{turn['content']}</>" for turn in messages)
    return f"{said}<assistant>" if add_generation_prompt else said


def plain_chat(messages: Sequence[Turn], add_generation_prompt: bool) -> str:
    """Has nothing that it writes before the assistant speaks."""
    return chat(messages, False)


def counting_chat(messages: Sequence[Turn], add_generation_prompt: bool) -> str:
    """Begins with the number of turns, and so grows by none."""
    return f"{len(messages)} turns: {chat(messages, add_generation_prompt)}"


def forgetting_chat(messages: Sequence[Turn], add_generation_prompt: bool) -> str:
    """Writes only the last turn of the assistant with what it says."""
    last = len(messages) - 1
    kept = [
        turn if i == last or turn["role"] != "assistant" else turn | {"content": ""} for i, turn in enumerate(messages)
    ]
    return chat(kept, add_generation_prompt)


def turns(*said: str) -> list[Turn]:
    """Returns turns from texts such as "user: hello"."""
    pairs = (text.split(": ", 1) for text in said)
    return [{"role": role, "content": content} for role, content in pairs]


def segments(form: str, row: Row) -> list[tuple[str, bool]]:
    return [(part.text, part.trained) for part in FORMATS[form].segments(row, chat)]


def test_the_formats_are_these_in_this_order() -> None:
    names = ["question_answer", "prompt_completion", "messages", "sharegpt", "alpaca", "text"]
    assert list(FORMATS) == names and [form.name for form in FORMATS.values()] == names
    assert [name for name, form in FORMATS.items() if form.needs_chat] == ["messages", "sharegpt"]


def test_a_question_is_asked_and_its_answer_said_as_in_the_seed() -> None:
    row = {"question": "What is 6 times 12?", "answer": "It is <<6*12=72>>72.\n#### 72"}
    assert segments("question_answer", row) == [
        (
            "What is 6 times 12?\n"
            "Answer the above question. First think step by step and then answer the final number.\n",
            False,
        ),
        ("It is <<6*12=72>>72.\nThe final answer is:  72", True),
    ]


def test_of_a_prompt_and_its_completion_the_completion_is_trained() -> None:
    assert segments("prompt_completion", {"prompt": "a {b} ", "completion": " c"}) == [("a {b} ", False), (" c", True)]


def test_a_prompt_may_be_empty() -> None:
    assert segments("prompt_completion", {"prompt": "", "completion": "c"}) == [("", False), ("c", True)]


def test_numbers_where_text_should_be_are_read_as_text() -> None:
    assert segments("prompt_completion", {"prompt": "6 x 7 = ", "completion": 42}) == [
        ("6 x 7 = ", False),
        ("42", True),
    ]


def test_of_a_conversation_the_turns_of_the_assistant_are_trained() -> None:
    said = turns("system: s", "user: u", "assistant: a", "tool: t", "user: v", "assistant: b", "user: dropped")
    assert segments("messages", {"messages": said}) == [
        ("<system>s</><user>u</><assistant>", False),
        ("a</>", True),
        ("<tool>t</><user>v</><assistant>", False),
        ("b</>", True),
    ]


def test_a_template_that_writes_nothing_before_an_answer_trains_the_name_of_the_assistant_too() -> None:
    found = FORMATS["messages"].segments({"messages": turns("user: u", "assistant: a")}, plain_chat)
    assert found == [Segment("<user>u</>", False), Segment("<assistant>a</>", True)]


def test_an_assistant_may_speak_first() -> None:
    assert segments("messages", {"messages": turns("assistant: a")}) == [("", False), ("<assistant>a</>", True)]


@pytest.mark.parametrize("template", [counting_chat, forgetting_chat])
def test_a_conversation_that_a_template_does_not_let_grow_by_turns_is_a_bad_row(template: Chat) -> None:
    said = turns("user: u", "assistant: a", "user: v", "assistant: b")
    with pytest.raises(BadRow, match=f"^{REWRITTEN}$"):
        FORMATS["messages"].segments({"messages": said}, template)


CONVERSATIONS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text("ab \n", min_size=1)}
    )
)


@given(CONVERSATIONS)
def test_the_segments_together_are_the_conversation_up_to_its_last_answer(said: list[Turn]) -> None:
    answers = [i for i, turn in enumerate(said) if turn["role"] == "assistant"]
    row = {"messages": said}
    if not answers or any(not said[i]["content"].strip() for i in answers):
        with pytest.raises(BadRow):
            segments("messages", row)
        return
    found = segments("messages", row)
    assert "".join(text for text, _ in found) == chat(said[: answers[-1] + 1], False)
    trained = [text for text, is_trained in found if is_trained]
    assert [text.removeprefix("<assistant>") for text in trained] == [f"{said[i]['content']}</>" for i in answers]


def test_of_a_prompt_and_a_completion_in_turns_only_those_of_the_completion_are_trained() -> None:
    row = {"prompt": turns("user: u", "assistant: a", "user: v"), "completion": turns("assistant: b")}
    assert segments("prompt_completion", row) == [
        ("<user>u</><assistant>a</><user>v</><assistant>", False),
        ("b</>", True),
    ]
    assert FORMATS["prompt_completion"].has_turns(row)
    assert not FORMATS["prompt_completion"].has_turns({"prompt": "a", "completion": "b"})


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt"])
def test_the_words_of_sharegpt_mean_the_same_turns(user: str, assistant: str) -> None:
    said = [(user, "u"), (assistant, "a")]
    row = {"conversations": [{"from": "system", "value": "s"}, *({"from": who, "value": what} for who, what in said)]}
    same = {"messages": turns("system: s", "user: u", "assistant: a")}
    assert segments("sharegpt", row) == segments("messages", same)


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_an_instruction_without_input_has_a_prompt_of_its_own(row: Row) -> None:
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {x}.\n\n### Response:\n"
    )
    assert segments("alpaca", {"instruction": "Say {x}.", "output": "x", **row}) == [(prompt, False), ("x", True)]


def test_an_instruction_with_input_is_given_with_it() -> None:
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay it.\n\n### Input:\n{instruction}\n\n### Response:\n"
    )
    row = {"instruction": "Say it.", "input": "{instruction}", "output": "x"}
    assert segments("alpaca", row) == [(prompt, False), ("x", True)]
    assert (ALPACA + ALPACA_INPUT).count("{instruction}") == 2


def test_a_text_is_trained_whole() -> None:
    assert segments("text", {"text": " once\n"}) == [(" once\n", True)]


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("question_answer", {"question": "q", "answer": "72"}, NO_FINAL),
        ("question_answer", {"question": "q", "answer": None}, NO_TEXT),
        ("question_answer", {"question": None, "answer": "#### 72"}, NO_TEXT),
        ("prompt_completion", {"prompt": "p", "completion": ""}, EMPTY),
        ("prompt_completion", {"prompt": "p", "completion": " \n"}, EMPTY),
        ("prompt_completion", {"prompt": "p", "completion": None}, EMPTY),
        ("prompt_completion", {"prompt": "p", "completion": float("nan")}, NO_TEXT),
        ("prompt_completion", {"prompt": None, "completion": "c"}, NO_TEXT),
        ("prompt_completion", {"prompt": "p", "completion": turns("assistant: a")}, MIXED),
        ("prompt_completion", {"prompt": turns("user: u"), "completion": "c"}, MIXED),
        ("prompt_completion", {"prompt": turns("user: u"), "completion": None}, EMPTY),
        ("prompt_completion", {"prompt": turns("assistant: a"), "completion": turns("user: u")}, NO_ASSISTANT),
        ("messages", {"messages": turns("user: u")}, NO_ASSISTANT),
        ("messages", {"messages": []}, NO_ASSISTANT),
        ("messages", {"messages": turns("user: u", "assistant:  ")}, EMPTY),
        ("messages", {"messages": turns("user: u", "robot: a")}, UNKNOWN_ROLE),
        ("messages", {"messages": [{"content": "a"}]}, UNKNOWN_ROLE),
        ("messages", {"messages": [{"role": "assistant", "content": None}]}, NO_TEXT),
        ("messages", {"messages": "user: u"}, NO_TURNS),
        ("messages", {"messages": ["user: u"]}, NO_TURNS),
        ("messages", {"messages": None}, NO_TURNS),
        ("sharegpt", {"conversations": [{"from": "bing", "value": "a"}]}, UNKNOWN_ROLE),
        ("sharegpt", {"conversations": turns("user: u")}, UNKNOWN_ROLE),
        ("alpaca", {"instruction": "i", "input": "", "output": ""}, EMPTY),
        ("alpaca", {"instruction": "i", "input": "", "output": None}, EMPTY),
        ("alpaca", {"instruction": None, "output": "o"}, NO_TEXT),
        ("alpaca", {"instruction": "i", "input": ["x"], "output": "o"}, NO_TEXT),
        ("text", {"text": None}, NO_TEXT),
        ("text", {"text": "\n"}, NO_TEXT),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_on_says_why(form: str, row: Row, reason: str) -> None:
    with pytest.raises(BadRow, match=f"^{re.escape(reason)}$"):
        segments(form, row)


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        ("question answer", "question_answer"),
        ("id answer question", "question_answer"),
        ("prompt completion", "prompt_completion"),
        ("prompt prompt_id messages", "messages"),
        ("id conversations", "sharegpt"),
        ("instruction input output text", "alpaca"),
        ("instruction output", "alpaca"),
        ("text label", "text"),
    ],
)
def test_a_format_is_known_by_its_columns(columns: str, form: str) -> None:
    assert format_of(columns.split(), None, "here") is FORMATS[form]


def test_the_format_that_is_asked_for_goes_before_the_first_that_fits() -> None:
    assert format_of(["instruction", "input", "output", "text"], "text", "here") is FORMATS["text"]


def test_columns_that_no_format_has_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match="'here' has the columns sentence, label, by which no format is known") as told:
        format_of(["sentence", "label"], None, "here")
    assert all(f"{name}: {', '.join(form.columns)}" in str(told.value) for name, form in FORMATS.items())


def test_a_format_without_its_columns_is_refused() -> None:
    says = (
        "The format question_answer needs the columns question, answer, but 'here' has no 'question' among "
        "Question, answer; name the columns so, or set another task.format. Did you mean 'Question'?"
    )
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        format_of(["Question", "answer"], "question_answer", "here")


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown format 'alpacca'; allowed are .*text\. Did you mean 'alpaca'\?"):
        format_of(["text"], "alpacca", "here")
