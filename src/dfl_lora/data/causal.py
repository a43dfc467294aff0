"""Rows of causal language models: segments of text made into tokens, and of each token the one that is to follow it.

    tokens    <s> segment segment ... </s>     <s>: what the tokenizer puts before a text; </s>: its end-of-text token
    targets   target[p] = token[p + 1] where that is trained, else -100; of the last token of a row always -100

A segment becomes tokens by itself, so that where a prompt ends does not depend on what follows it; tokenizers that
begin a text with a space (SentencePiece) do so with every segment. What a chat template writes has its own tokens
around it, and gets none. No token is ever added to a tokenizer. Rows are cut to `max_length` after that.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dfl_lora.data.batches import Rows, TokenSource
from dfl_lora.data.formats import FILLED, REFUSED, REWRITTEN, BadRow, Format, Refusal, Segment, Turn, format_of
from dfl_lora.data.sources import Excerpt, column
from dfl_lora.data.token_cache import cached
from dfl_lora.errors import UserError

IGNORED = -100
"""The target of a token after which nothing is learnt."""
DATE = "26 Jul 2024"
"""Today, for the templates of Llama 3, which else write another text every day; without a clock they write this."""


@dataclass(frozen=True)
class CausalRows:
    """Tokenised rows, and which rows of the table they are."""

    source: TokenSource
    kept: Rows
    """Of each row its number in the table."""
    bad: Mapping[str, int]
    """How many rows were left out, by reason."""
    num_cut: int
    """The kept rows that were longer than max_length."""
    contents: list[str]
    """Of each row what its columns say, without what a format or a template puts around it."""
    format: str


@dataclass(frozen=True)
class Spelt:
    """A row of the table in segments; `has_turns` where a chat template wrote them."""

    number: int
    segments: list[Segment]
    has_turns: bool
    content: str


@dataclass(frozen=True)
class CausalTokenization:
    """How rows become tokens; its parts and the segments name the cache entry."""

    tokenizer: PreTrainedTokenizerBase
    digest: str
    max_length: int
    truncation_side: str
    format: str | None
    bad_rows: Literal["refuse", "skip"]

    def rows(self, excerpt: Excerpt) -> CausalRows:
        """Tokenises rows once and returns them memory-mapped from a private cache, named by their content."""
        rows, path = excerpt.rows, excerpt.path
        how = format_of(rows.column_names, self.format, path)
        if how.needs_chat:
            self.check_template()
        spelt, bad = self.spelt(rows, how, path)
        if not all(row.has_turns for row in spelt):
            self.check_end()
        key = self.key(how, spelt)
        arrays = cached(key, lambda: self.arrays(spelt))
        kept = [spelt[i] for i in arrays["kept"]]
        bad |= dict.fromkeys({row.number for row in spelt} - {row.number for row in kept}, FILLED)
        if bad and (self.bad_rows == "refuse" or not kept):
            raise self.refused({excerpt.number(row): why for row, why in bad.items()}, len(rows), excerpt.where)
        return CausalRows(
            self.source(arrays, key),
            np.array([row.number for row in kept], dtype=np.int64),
            dict(Counter(bad.values()).most_common()),
            int(arrays["was_cut"].sum()),
            [row.content for row in kept],
            how.name,
        )

    def source(self, arrays: Mapping[str, NDArray[Any]], key: str) -> TokenSource:
        """Returns the table of the cached arrays."""
        offsets = np.asarray(arrays["offsets"])
        labels = np.zeros(len(offsets) - 1, dtype=np.int64)
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        pads = {"input_ids": int(end if end is not None else pad or 0)}
        columns = {"input_ids": arrays["input_ids"]}
        return TokenSource(columns, offsets, labels, pads, self.max_length, key, arrays["targets"])

    def spelt(self, rows: Dataset, how: Format, path: str) -> tuple[list[Spelt], dict[int, str]]:
        """Returns the rows in segments, and of those that are bad their number and the reason."""
        names = [*how.columns, *(name for name in how.optional if name in rows.column_names)]
        good, bad = list[Spelt](), dict[int, str]()
        for number, values in enumerate(zip(*(column(rows, name, path) for name in names), strict=True)):
            row = dict(zip(names, values, strict=True))
            try:
                segments = how.segments(row, self.chat)
            except BadRow as reason:
                bad[number] = str(reason)
            else:
                parts, content = [part for part in segments if part.text], content_of(list(row.values()))
                good.append(Spelt(number, parts, how.has_turns(row), content))
        return good, bad

    def chat(self, messages: Sequence[Turn], add_generation_prompt: bool) -> str:
        """Returns what the tokenizer's chat template makes of turns."""
        self.check_template()
        return templated(self.tokenizer, messages, add_generation_prompt)

    def key(self, how: Format, spelt: Sequence[Spelt]) -> str:
        """Returns the digest of all that the tokens depend on."""
        parts = [self.digest, self.max_length, self.truncation_side, how.name]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for row in spelt:
            digest.update(json.dumps([row.has_turns, row.segments]).encode())
        return digest.hexdigest()

    def arrays(self, spelt: Sequence[Spelt]) -> dict[str, NDArray[Any]]:
        """Returns the tokens and targets of the rows in which something is learnt, and which of the rows those are."""
        texts = [segment.text for row in spelt for segment in row.segments]
        pieces: Iterator[list[int]] = iter(
            self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        )
        before = opening_tokens(self.tokenizer)
        ids, targets, kept, was_cut = [], [], [], []
        for i, row in enumerate(spelt):
            runs = [(next(pieces), segment.trained) for segment in row.segments]
            if not row.has_turns:
                runs = [(before, False), *runs, ([self.tokenizer.eos_token_id], True)]
            own, following = self.joined(runs)
            if (following >= 0).any():
                ids.append(own)
                targets.append(following)
                kept.append(i)
                was_cut.append(sum(len(run) for run, _ in runs) > self.max_length)
        nothing = np.empty(0, dtype=np.int32)
        return {
            "input_ids": np.concatenate([nothing, *ids]),
            "targets": np.concatenate([nothing, *targets]),
            "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
            "kept": np.array(kept, dtype=np.int64),
            "was_cut": np.array(was_cut, dtype=np.bool_),
        }

    def joined(self, runs: Sequence[tuple[list[int], bool]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns the tokens of a row, cut, and the token that is to follow each."""
        here = slice(-self.max_length, None) if self.truncation_side == "left" else slice(self.max_length)
        ids = np.array([token for run, _ in runs for token in run], dtype=np.int32)[here]
        trained = np.repeat([trained for _, trained in runs], [len(run) for run, _ in runs])[here]
        targets = np.full_like(ids, IGNORED)
        targets[:-1] = np.where(trained[1:], ids[1:], IGNORED)
        return ids, targets

    def check_template(self) -> None:
        """Raises where the tokenizer has no chat template."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                "Rows of turns need a chat template, and the tokenizer of the base model has none; use a model that "
                "has one, such as an instruct version, or rows of prompt and completion in plain text."
            )

    def check_end(self) -> None:
        """Raises where the tokenizer has no end-of-text token."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "A completion ends with the end-of-text token, and the tokenizer of the base model has none; use a "
                "model whose tokenizer has an eos_token, or set task.tokens to seed."
            )

    def refused(self, bad: Mapping[int, str], num_rows: int, where: str) -> UserError:
        """Returns the sentence for rows that cannot be trained on."""
        counts = Counter(bad.values()).most_common()
        why = ", ".join(f"{count:,} with {reason}" for reason, count in counts)
        first = min(bad)
        advice = [f"clean the {'row' if len(bad) == 1 else 'rows'}"]
        if FILLED in bad.values():
            advice.append(f"raise task.max_length, here {self.max_length}")
        if any(why == REWRITTEN or why.startswith(REFUSED) for why in bad.values()):
            advice.append("use a model with another chat template")
        if len(bad) < num_rows:
            advice.append("set task.bad_rows to skip")
        last = f", or {advice.pop()}" if len(advice) > 1 else ""
        return UserError(
            f"{len(bad):,} of the {num_rows:,} rows of {where} cannot be trained on: {why}; the first is row {first}. "
            f"To go on, {', '.join(advice)}{last}."
        )


def templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    """Returns what the chat template of a tokenizer makes of turns; raises Refusal where it takes them not."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, date_string=DATE
        )
    except Exception as error:  # whatever a template raises, such as for two turns of one role, or a system turn
        raise Refusal(" ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__) from None
    return text


def content_of(value: object) -> str:
    """Returns the texts of columns: of turns, what is said and not who says it."""
    if isinstance(value, Mapping):
        return content_of([value.get(name) for name in ("content", "value")])
    if isinstance(value, list):
        return "\n".join(text for part in value if (text := content_of(part)))
    return value if isinstance(value, str) else ""


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that a tokenizer puts before a text, such as <s>."""
    whole: list[int] = tokenizer("x")["input_ids"]
    plain: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(plain)] == plain), [])


def trained_spans(source: TokenSource, row: int) -> list[tuple[list[int], bool]]:
    """Returns the tokens of a row in runs, and whether each run is trained."""
    assert source.targets is not None
    here = slice(int(source.offsets[row]), int(source.offsets[row + 1]))
    ids = source.columns["input_ids"][here].tolist()
    trained = [False, *(source.targets[here] >= 0).tolist()]  # a target is the token after it
    runs = groupby(zip(ids, trained, strict=False), key=lambda pair: pair[1])
    return [([token for token, _ in run], is_trained) for is_trained, run in runs]


def render(
    tokenizer: PreTrainedTokenizerBase, source: TokenSource, row: int, marks: tuple[str, str] = ("«", "»")
) -> str:
    """Returns the text of a row, read back from its tokens, with marks around what is trained."""
    parts = []
    for ids, is_trained in trained_spans(source, row):
        text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        parts.append(f"{marks[0]}{text}{marks[1]}" if is_trained else text)
    return "".join(parts)
