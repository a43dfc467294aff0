"""Formats of rows of text: the columns they are known by, and which parts of the text of a row are trained.

    question_answer    question, ASK, then *answer*, in which "The final answer is: " stands for #### (GSM8K)
    prompt_completion  prompt, then *completion*: two texts, or two lists of turns
    messages           turns {"role", "content"} as the model's chat template writes them: *what the assistant says*
    sharegpt           the same from turns {"from", "value"}
    alpaca             the prompt of Stanford Alpaca around instruction and input, then *output*
    text               *the whole text*

Trained is what stands between asterisks. Turns need a chat template that grows by turns: what it makes of the first
turns is how what it makes of all of them begins. A template that writes earlier turns anew, as Qwen 3's do, takes
conversations with one turn of the assistant alone. What follows the last turn of the assistant is dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dfl_lora.errors import UserError, nearest

ASK = "\nAnswer the above question. First think step by step and then answer the final number.\n"
GOLD, FINAL_ANSWER = "####", "The final answer is: "

BELOW = "Below is an instruction that describes a task"
COMPLETES = "Write a response that appropriately completes the request."
ALPACA = f"{BELOW}. {COMPLETES}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
ALPACA_INPUT = (
    f"{BELOW}, paired with an input that provides further context. {COMPLETES}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

EMPTY = "an empty completion"
NO_ASSISTANT = "a conversation without an assistant turn"
NO_FINAL = f"an answer without {GOLD}"
NO_TEXT = "no text"
MIXED = "turns in only one of prompt and completion"
NO_TURNS = "a conversation that is not a list of turns"
REWRITTEN = "a conversation that the chat template does not write turn after turn"
REFUSED = "a conversation that the chat template refuses"
UNKNOWN_ROLE = "a turn of an unknown role"
FILLED = "a prompt that fills max_length"

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}

Row = Mapping[str, object]
Turn = dict[str, str]
"""Of a role and a content."""


class Segment(NamedTuple):
    """A part of the text of a row, and whether it is trained."""

    text: str
    trained: bool


class Chat(Protocol):
    """A chat template: turns made into text, which can end with what comes before the assistant speaks."""

    def __call__(self, messages: Sequence[Turn], add_generation_prompt: bool) -> str: ...


class BadRow(Exception):
    """A row that cannot be trained on; says which of a few reasons it is."""


class Refusal(BadRow):
    """A conversation that the chat template refuses, and `why`, in its own words."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{REFUSED} ({why})")
        self.why = why


@dataclass(frozen=True)
class Format:
    """The columns of a format, and how a row of it becomes segments."""

    name: str
    columns: tuple[str, ...]
    segments: Callable[[Row, Chat], list[Segment]]
    optional: tuple[str, ...] = ()
    needs_chat: bool = False

    def has_turns(self, row: Row) -> bool:
        """Tells whether the text of a row is what the chat template makes of its turns."""
        return self.needs_chat or all(isinstance(row.get(name), list) for name in self.columns)


def question_answer(row: Row, chat: Chat) -> list[Segment]:
    """Returns the prompt of a question and its answer; raises where there is no final answer."""
    question, answer = text_of(row, "question"), text_of(row, "answer")
    if GOLD not in answer:
        raise BadRow(NO_FINAL)
    return completed(question + ASK, answer.replace(GOLD, FINAL_ANSWER))


def prompt_completion(row: Row, chat: Chat) -> list[Segment]:
    """Returns the prompt and its completion; of turns, those of the completion are trained."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if completion is None:
        raise BadRow(EMPTY)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise BadRow(MIXED)
    if isinstance(prompt, list):
        before = turns_of(prompt)
        return spoken([*before, *turns_of(completion)], chat, first=len(before))
    return completed(text_of(row, "prompt"), text_of(row, "completion"))


def messages(row: Row, chat: Chat) -> list[Segment]:
    """Returns a conversation, of which the turns of the assistant are trained."""
    return spoken(turns_of(row.get("messages")), chat)


def sharegpt(row: Row, chat: Chat) -> list[Segment]:
    """Returns a conversation in the words of ShareGPT, of which the turns of the assistant are trained."""
    return spoken(turns_of(row.get("conversations"), "from", "value", SHAREGPT_ROLES), chat)


def alpaca(row: Row, chat: Chat) -> list[Segment]:
    """Returns the prompt of an instruction, with its input where it has one, and the output."""
    instruction, output = text_of(row, "instruction"), text_of(row, "output", EMPTY)
    given = "" if row.get("input") is None else text_of(row, "input")
    template = ALPACA_INPUT if given.strip() else ALPACA
    return completed(template.format(instruction=instruction, input=given), output)


def text(row: Row, chat: Chat) -> list[Segment]:
    """Returns the whole text, trained."""
    whole = text_of(row, "text")
    if not whole.strip():
        raise BadRow(NO_TEXT)
    return [Segment(whole, True)]


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("question_answer", ("question", "answer"), question_answer),
        Format("prompt_completion", ("prompt", "completion"), prompt_completion),
        Format("messages", ("messages",), messages, needs_chat=True),
        Format("sharegpt", ("conversations",), sharegpt, needs_chat=True),
        Format("alpaca", ("instruction", "output"), alpaca, optional=("input",)),
        Format("text", ("text",), text),
    )
}


def format_of(columns: Sequence[str], asked: str | None, path: str) -> Format:
    """Returns the format that is asked for, else the first whose columns are there; raises where there is none."""
    if asked is None:
        for form in FORMATS.values():
            if set(form.columns) <= set(columns):
                return form
        known = "; ".join(f"{form.name}: {', '.join(form.columns)}" for form in FORMATS.values())
        raise UserError(
            f"'{path}' has the columns {', '.join(columns)}, by which no format is known; "
            f"name its columns as one of the formats has them ({known})."
        )
    if asked not in FORMATS:
        raise UserError(f"Unknown format '{asked}'; allowed are {', '.join(FORMATS)}.{nearest(asked, FORMATS)}")
    form = FORMATS[asked]
    for name in form.columns:
        if name not in columns:
            raise UserError(
                f"The format {asked} needs the columns {', '.join(form.columns)}, but '{path}' has no '{name}' among "
                f"{', '.join(columns)}; name the columns so, or set another task.format.{nearest(name, columns)}"
            )
    return form


def text_of(row: Row, name: str, missing: str = NO_TEXT) -> str:
    """Returns the text of a column; raises where it has none, with what is `missing` where there is nothing."""
    value = row.get(name)
    if isinstance(value, str | int | float) and value == value:  # a table may hold a text such as 42 as a number
        return str(value)
    raise BadRow(missing if value is None else NO_TEXT)


def completed(prompt: str, completion: str) -> list[Segment]:
    """Returns a prompt and its completion, which is trained; raises where it is empty."""
    if not completion.strip():
        raise BadRow(EMPTY)
    return [Segment(prompt, False), Segment(completion, True)]


def turns_of(value: object, who: str = "role", what: str = "content", roles: Mapping[str, str] = ROLES) -> list[Turn]:
    """Returns turns as roles and contents; raises where they are none."""
    if not isinstance(value, list):
        raise BadRow(NO_TURNS)
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise BadRow(NO_TURNS)
        role, content = turn.get(who), turn.get(what)
        if not isinstance(role, str) or role not in roles:
            raise BadRow(UNKNOWN_ROLE)
        if not isinstance(content, str):
            raise BadRow(NO_TEXT)
        turns.append({"role": roles[role], "content": content})
    return turns


def spoken(turns: Sequence[Turn], chat: Chat, first: int = 0) -> list[Segment]:
    """Returns a conversation up to the last turn of the assistant; its turns from number `first` on are trained."""
    segments: list[Segment] = []
    done = ""
    for i, turn in enumerate(turns):
        if i < first or turn["role"] != "assistant":
            continue
        if not turn["content"].strip():
            raise BadRow(EMPTY)
        until = chat(turns[: i + 1], False)
        before = opening(turns[:i], until, chat)
        if not before.startswith(done):
            raise BadRow(REWRITTEN)
        segments += [Segment(before[len(done) :], False), Segment(until[len(before) :], True)]
        done = until
    if not segments:
        raise BadRow(NO_ASSISTANT)
    return segments


def opening(turns: Sequence[Turn], until: str, chat: Chat) -> str:
    """Returns the part of a text `until` the end of an answer that stands before what the assistant says."""
    if not turns:
        return ""
    for add_generation_prompt in (True, False):
        before = chat(turns, add_generation_prompt)
        if until.startswith(before) and until != before:
            return before
    raise BadRow(REWRITTEN)
