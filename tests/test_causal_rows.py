"""Rows of causal models: prompts are read, completions are learnt, and nothing that cannot be learnt slips through."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dfl_lora.data.causal import CausalRows, CausalTokenization, opening_tokens, render, trained_spans
from dfl_lora.data.formats import ASK, EMPTY, FILLED, NO_FINAL, NO_TEXT, REFUSED, REWRITTEN
from dfl_lora.data.prompts import turns_tokens
from dfl_lora.data.sources import Excerpt, load_rows
from dfl_lora.errors import UserError
from real import real

START, END = 0, 1
TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
THINKING = (
    "{% for turn in messages %}<s>{{ turn.role }}: {% if loop.last and turn.role == 'assistant' %}<think></think>"
    "{% endif %}{{ turn.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
"""Writes what was thought in the last turn alone, as the template of Qwen 3 does."""
BREAKING = "{% if messages[0].role == 'system' %}{{ messages[0].content + 1 }}{% endif %}" + TEMPLATE
"""Adds a number to a text, of which Python and not the template's language complains."""
DATED = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + TEMPLATE


def bytes_tokenizer(
    template: str | None = None, start: str | None = "<s>", end: str | None = "</s>", shift: int = 0
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose tokens are <s>, </s> and the bytes of UTF-8, in an order moved by `shift`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<s>": START, "</s>": END} | {c: END + 1 + (i + shift) % 256 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, words[start])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end)
    fast.chat_template = template
    return fast


def tokenization(
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_length: int = 512,
    side: str = "right",
    form: str | None = None,
    bad_rows: Literal["refuse", "skip"] = "refuse",
) -> CausalTokenization:
    return CausalTokenization(tokenizer or bytes_tokenizer(), "digest", max_length, side, form, bad_rows)


def pairs(*rows: tuple[str | None, str | None]) -> Dataset:
    """Returns rows of a prompt and its completion."""
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def codes(text: str) -> list[int]:
    return [int(token) for token in bytes_tokenizer()(text, add_special_tokens=False)["input_ids"]]


A, B, C, D = codes("abcd")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of token caches of this test's own."""
    monkeypatch.setenv("DFL_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_of_each_token_the_next_one_is_learnt_where_it_is_of_the_completion_or_the_end() -> None:
    made = tokenization().rows(Excerpt(pairs(("ab", "cd")), "here"))
    assert made.source.columns["input_ids"].tolist() == [START, A, B, C, D, END]
    assert made.source.targets is not None and made.source.targets.tolist() == [-100, -100, C, D, END, -100]
    assert made.source.targets.dtype == made.source.columns["input_ids"].dtype == np.int32
    assert (made.format, made.kept.tolist(), made.bad, made.num_cut) == ("prompt_completion", [0], {}, 0)
    assert made.contents == ["ab\ncd"] and made.source.labels.tolist() == [0]


def test_a_batch_of_rows_has_the_targets_of_each_token_and_is_padded_with_the_end() -> None:
    source = tokenization().rows(Excerpt(pairs(("ab", "cd"), ("", "a"), ("a", "b")), "here")).source
    batch = source.collate(np.array([2, 1]))
    assert batch.labels.tolist() == [-100, B, END, -100, A, END, -100] and batch.num_learnt == 4
    assert batch.padded()["input_ids"].tolist() == [[START, A, B, END] + [END] * 4, [START, A] + [END] * 6]


def test_a_whole_text_is_learnt_but_for_the_token_that_begins_it() -> None:
    made = tokenization().rows(Excerpt(Dataset.from_dict({"text": ["abc"]}), "here"))
    assert made.source.columns["input_ids"].tolist() == [START, A, B, C, END]
    assert made.source.targets is not None and made.source.targets.tolist() == [A, B, C, END, -100]


def test_a_tokenizer_that_puts_nothing_before_a_text_begins_with_the_text() -> None:
    tokenizer = bytes_tokenizer(start=None)
    assert opening_tokens(tokenizer) == [] and opening_tokens(bytes_tokenizer()) == [START]
    made = tokenization(tokenizer).rows(Excerpt(pairs(("a", "b")), "here"))
    assert made.source.columns["input_ids"].tolist() == [A, B, END]


TURNS = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "d"},
    {"role": "user", "content": "not read"},
]
AS_CHAT = {
    "messages": {"messages": [TURNS]},
    "sharegpt": {"conversations": [[{"from": t["role"], "value": t["content"]} for t in TURNS]]},
}


@pytest.mark.parametrize("form", AS_CHAT)
def test_a_conversation_has_the_tokens_of_its_template_and_no_others(form: str) -> None:
    tokenizer = bytes_tokenizer(TEMPLATE)
    made = tokenization(tokenizer).rows(Excerpt(Dataset.from_dict(AS_CHAT[form]), "here"))
    assert made.format == form
    assert render(tokenizer, made.source, 0) == (
        "<s>user: ab</s><s>assistant: «c</s>»<s>user: a</s><s>assistant: «d</s>»"
    )
    whole = "<s>user: ab</s><s>assistant: c</s><s>user: a</s><s>assistant: d</s>"
    assert made.contents == ["ab\nc\na\nd\nnot read"]
    assert made.source.columns["input_ids"].tolist() == codes(whole)


def test_a_completion_in_turns_is_what_is_learnt_of_a_conversation() -> None:
    tokenizer = bytes_tokenizer(TEMPLATE)
    rows = Dataset.from_list([{"prompt": TURNS[:3], "completion": TURNS[3:]}])
    made = tokenization(tokenizer).rows(Excerpt(rows, "here"))
    assert render(tokenizer, made.source, 0, marks=("[", "]")) == (
        "<s>user: ab</s><s>assistant: c</s><s>user: a</s><s>assistant: [d</s>]"
    )


@pytest.mark.parametrize("form", AS_CHAT)
@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_turns_without_a_chat_template_are_refused(form: str, bad_rows: Literal["refuse", "skip"]) -> None:
    with pytest.raises(UserError, match="need a chat template, and the tokenizer of the base model has none"):
        tokenization(bad_rows=bad_rows).rows(Excerpt(Dataset.from_dict(AS_CHAT[form]), "here"))
    with pytest.raises(UserError, match="need a chat template"):
        tokenization(bad_rows=bad_rows).rows(
            Excerpt(Dataset.from_list([{"prompt": TURNS[:1], "completion": TURNS[1:]}]), "here")
        )


@pytest.mark.parametrize(
    ("template", "why"),
    [(STRICT, "System role not supported"), (BREAKING, 'can only concatenate str (not "int") to str')],
)
def test_a_conversation_that_the_template_refuses_is_a_bad_row(template: str, why: str) -> None:
    system = [{"role": "system", "content": "s"}, *TURNS]
    rows = Dataset.from_dict({"messages": [TURNS, system]})
    made = tokenization(bytes_tokenizer(template), bad_rows="skip").rows(Excerpt(rows, "here"))
    assert made.bad == {f"{REFUSED} ({why})": 1} and made.kept.tolist() == [0]
    with pytest.raises(UserError, match="use a model with another chat template"):
        tokenization(bytes_tokenizer(template)).rows(Excerpt(rows, "here"))


def test_a_conversation_of_which_the_template_writes_earlier_turns_anew_is_skipped_or_refused() -> None:
    rows = Dataset.from_dict({"messages": [TURNS[:2], TURNS]})
    tokenizer = bytes_tokenizer(THINKING)
    made = tokenization(tokenizer, bad_rows="skip").rows(Excerpt(rows, "here"))
    assert made.bad == {REWRITTEN: 1} and made.kept.tolist() == [0]
    assert render(tokenizer, made.source, 0) == "<s>user: ab</s><s>assistant: «<think></think>c</s>»"
    says = (
        f"1 of the 2 rows of 'here' cannot be trained on: 1 with {REWRITTEN}; the first is row 1. "
        "To go on, clean the row, use a model with another chat template, or set task.bad_rows to skip."
    )
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        tokenization(tokenizer).rows(Excerpt(rows, "here"))


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    tokenizer = bytes_tokenizer(DATED)
    made = tokenization(tokenizer).rows(Excerpt(Dataset.from_dict({"messages": [TURNS[:2]]}), "here"))
    assert render(tokenizer, made.source, 0) == "26 Jul 2024<s>user: ab</s><s>assistant: «c</s>»"


def test_plain_text_needs_an_end_and_a_conversation_does_not() -> None:
    endless = bytes_tokenizer(TEMPLATE, end=None)
    with pytest.raises(
        UserError, match="ends with the end-of-text token, and the tokenizer of the base model has none"
    ):
        tokenization(endless).rows(Excerpt(pairs(("a", "b")), "here"))
    made = tokenization(endless).rows(Excerpt(Dataset.from_dict({"messages": [TURNS]}), "here"))
    assert len(made.kept) == 1


def test_no_token_is_added_to_the_tokenizer() -> None:
    tokenizer = bytes_tokenizer(TEMPLATE)
    before = tokenizer.get_vocab()
    tokenization(tokenizer).rows(Excerpt(pairs(("a", "b")), "here"))
    tokenization(tokenizer).rows(Excerpt(Dataset.from_dict({"messages": [TURNS]}), "here"))
    assert tokenizer.get_vocab() == before and tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("side", "max_length", "ids", "targets"),
    [
        ("right", 6, [START, A, B, C, D, END], [-100, -100, C, D, END, -100]),
        ("right", 4, [START, A, B, C], [-100, -100, C, -100]),
        ("left", 4, [B, C, D, END], [C, D, END, -100]),
        ("left", 2, [D, END], [END, -100]),
    ],
)
def test_rows_are_cut_on_the_side_that_the_recipe_says(
    side: str, max_length: int, ids: list[int], targets: list[int]
) -> None:
    made = tokenization(max_length=max_length, side=side).rows(Excerpt(pairs(("ab", "cd")), "here"))
    assert made.source.columns["input_ids"].tolist() == ids
    assert made.source.targets is not None and made.source.targets.tolist() == targets
    assert made.num_cut == (max_length < 6) and made.contents == ["ab\ncd"] and made.source.max_length == max_length


MIXED = (("a", "b"), ("abc", "d"), ("a", " "), ("a", "bcd"), (None, "b"), ("abcd", "d"), ("a", "c"))
"""Of which at most 4 tokens are kept: rows 1 and 5 are filled by their prompts, and row 3 is cut."""


def test_bad_rows_are_refused_with_their_number_their_reasons_and_what_to_do() -> None:
    says = (
        f"4 of the 7 rows of 'here' cannot be trained on: 2 with {FILLED}, 1 with {EMPTY}, 1 with {NO_TEXT}; the first "
        "is row 1. To go on, clean the rows, raise task.max_length, here 4, or set task.bad_rows to skip."
    )
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        tokenization(max_length=4).rows(Excerpt(pairs(*MIXED), "here"))


def test_one_bad_row_is_refused_with_advice_that_fits_it() -> None:
    rows = Dataset.from_dict({"question": ["q", "q"], "answer": ["#### 1", "2"]})
    says = (
        f"1 of the 2 rows of 'here' cannot be trained on: 1 with {NO_FINAL}; the first is row 1. "
        "To go on, clean the row, or set task.bad_rows to skip."
    )
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        tokenization().rows(Excerpt(rows, "here"))


def test_bad_rows_are_skipped_and_counted_where_the_recipe_says_so() -> None:
    how = tokenization(max_length=4, bad_rows="skip")
    made = how.rows(Excerpt(pairs(*MIXED), "here"))
    assert made.kept.dtype == np.int64 and made.kept.tolist() == [0, 3, 6]
    assert made.bad == {FILLED: 2, EMPTY: 1, NO_TEXT: 1} and made.num_cut == 1
    assert made.contents == ["a\nb", "a\nbcd", "a\nc"] and made.source.lengths.tolist() == [4, 4, 4]
    assert [render(how.tokenizer, made.source, row) for row in range(3)] == ["<s>a«b</s>»", "<s>a«bc»", "<s>a«c</s>»"]


def test_an_empty_cell_of_a_csv_is_an_empty_completion(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc,\n")
    made = tokenization(bad_rows="skip").rows(Excerpt(load_rows(str(tmp_path / "rows.csv"), None, "train"), "here"))
    assert made.bad == {EMPTY: 1} and made.kept.tolist() == [0]


@pytest.mark.parametrize("rows", [pairs(("a", ""), ("a", " ")), pairs(("abcd", "a"), ("abc", "a"))])
def test_where_no_row_is_left_none_is_skipped(rows: Dataset) -> None:
    with pytest.raises(UserError, match="2 of the 2 rows of 'here' cannot be trained on") as told:
        tokenization(max_length=4, bad_rows="skip").rows(Excerpt(rows, "here"))
    assert "skip" not in str(told.value)


def test_tokens_are_made_once_and_memory_mapped(cache: Path) -> None:
    how, rows = tokenization(max_length=4, bad_rows="skip"), pairs(*MIXED)
    one, other = (
        how.rows(Excerpt(rows, "here")),
        replace(how, tokenizer=bytes_tokenizer(shift=1)).rows(Excerpt(rows, "there")),
    )
    assert len(list(cache.iterdir())) == 1 and one.source.digest == other.source.digest == next(cache.iterdir()).name
    for source in (one.source, other.source):
        assert isinstance(source.targets, np.memmap) and not source.targets.flags.writeable
        assert isinstance(source.columns["input_ids"], np.memmap)
    assert spans(one) == spans(other)
    assert (one.kept.tolist(), one.bad, one.num_cut) == (other.kept.tolist(), other.bad, other.num_cut)


def test_what_is_skipped_once_is_refused_from_the_cache_too(cache: Path) -> None:
    rows = pairs(("a", "b"), ("abcd", "d"))
    tokenization(max_length=4, bad_rows="skip").rows(Excerpt(rows, "here"))
    with pytest.raises(UserError, match=f"1 of the 2 rows of 'here' .* with {FILLED}"):
        tokenization(max_length=4).rows(Excerpt(rows, "here"))


def test_a_damaged_cache_entry_is_made_again(cache: Path) -> None:
    how = tokenization()
    before = spans(how.rows(Excerpt(pairs(("a", "b"), ("ab", "cd")), "here")))
    for file in cache.rglob("*.npy"):
        os.truncate(file, 40)
    assert spans(how.rows(Excerpt(pairs(("a", "b"), ("ab", "cd")), "here"))) == before


def test_another_text_split_length_side_format_or_tokenizer_is_another_entry(cache: Path) -> None:
    text = Dataset.from_dict({"text": ["ab"], "prompt": ["a"], "completion": ["b"]})
    others = [
        (tokenization(), pairs(("a", "b"))),
        (tokenization(), pairs(("ab", "b"))),
        (tokenization(), pairs(("", "ab"))),
        (tokenization(max_length=12), pairs(("a", "b"))),
        (tokenization(side="left"), pairs(("a", "b"))),
        (tokenization(form="text"), text),
        (replace(tokenization(), digest="other"), pairs(("a", "b"))),
    ]
    for how, rows in others:
        how.rows(Excerpt(rows, "here"))
    assert len(list(cache.iterdir())) == len(others)


def spans(made: CausalRows) -> list[list[tuple[list[int], bool]]]:
    return [trained_spans(made.source, row) for row in range(len(made.kept))]


PLAIN = st.text(max_size=12).filter(lambda text: "<s>" not in text and "</s>" not in text)
ROWS = st.lists(st.tuples(PLAIN, PLAIN.filter(str.strip)), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_what_is_learnt_reads_as_the_completion_and_what_is_not_as_the_prompt(rows: Sequence[tuple[str, str]]) -> None:
    how = tokenization()
    made = how.rows(Excerpt(pairs(*rows), "here"))
    read = [[(how.tokenizer.decode(ids), trained) for ids, trained in row] for row in spans(made)]
    assert read == [[(f"<s>{prompt}", False), (f"{completion}</s>", True)] for prompt, completion in rows]


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(1, 30), st.sampled_from(["right", "left"]))
def test_a_cut_row_is_a_part_of_the_whole_one(rows: Sequence[tuple[str, str]], max_length: int, side: str) -> None:
    whole = tokenization().rows(Excerpt(pairs(*rows), "here"))
    try:
        cut = tokenization(max_length=max_length, side=side, bad_rows="skip").rows(Excerpt(pairs(*rows), "here"))
    except UserError:
        return
    here = slice(-max_length, None) if side == "left" else slice(max_length)
    for row, number in enumerate(cut.kept):
        flat = [(token, trained) for ids, trained in trained_spans(whole.source, number) for token in ids][here]
        flat[0] = (flat[0][0], False)  # nothing comes before it that could be told what is to follow
        assert [(t, trained) for ids, trained in trained_spans(cut.source, row) for t in ids] == flat


def real_rows(table: str, split: str) -> tuple[CausalTokenization, Dataset]:
    """Returns rows of real data, and how the real model's tokenizer reads them."""
    model, folder = real("models/stories260K-llama", table)
    return tokenization(AutoTokenizer.from_pretrained(model), max_length=4096), load_rows(str(folder), None, split)


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_row_of_gsm8k_is_learnt(split: str, count: int) -> None:
    how, rows = real_rows("gsm8k", split)
    made = how.rows(Excerpt(rows, "gsm8k"))
    assert (made.format, made.bad, made.num_cut) == ("question_answer", {}, 0)
    assert made.kept.tolist() == list(range(count))
    for row in (0, count // 2, count - 1):
        (prompt, asked), (answer, said) = trained_spans(made.source, row)
        assert (asked, said) == (False, True) and prompt[0] == 1 and answer[-1] == 2
        assert how.tokenizer.decode(prompt) == f"<s> {rows[row]['question']}{ASK}"
        assert "The final answer is: " in how.tokenizer.decode(answer)


@pytest.mark.parametrize(
    ("table", "split", "form", "count"),
    [
        ("alpaca_demo", "train", "alpaca", 999),
        ("tinystories", "train", "text", 900),
        ("tinystories", "validation", "text", 100),
    ],
)
def test_every_row_of_other_real_tables_is_learnt(table: str, split: str, form: str, count: int) -> None:
    how, rows = real_rows(table, split)
    made = how.rows(Excerpt(rows, table))
    assert (made.format, made.bad, len(made.kept), made.num_cut) == (form, {}, count, 0)
    assert render(how.tokenizer, made.source, 0).endswith("</s>»")


def test_stories_are_cut_to_what_the_model_reads() -> None:
    how, rows = real_rows("tinystories", "train")
    whole = how.rows(Excerpt(rows, "tinystories")).source.lengths
    made = replace(how, max_length=256).rows(Excerpt(rows, "tinystories"))
    assert made.source.lengths.tolist() == np.minimum(whole, 256).tolist()
    assert made.num_cut == int((whole > 256).sum()) > 0


def test_a_conversation_is_given_to_a_model_in_the_tokens_of_its_training() -> None:
    tokenizer = AutoTokenizer.from_pretrained(*real("models/stories260K-llama"))  # it puts a space before each text
    tokenizer.chat_template = TEMPLATE
    turns = [*TURNS, {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    source = tokenization(tokenizer).rows(Excerpt(Dataset.from_dict({"messages": [turns]}), "here")).source
    row = source.columns["input_ids"].tolist()
    for told in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
        prompt = turns_tokens(tokenizer, turns[:told])
        assert prompt == row[: len(prompt)]
    spelt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt != tokenizer(spelt, add_special_tokens=False)["input_ids"]  # as one text it would be other tokens
