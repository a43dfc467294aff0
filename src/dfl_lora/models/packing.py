"""Packing: the tokens of several peers in one flat row of a pass, without padding, and where everything lies.

    peer 0: row 0, row 1, ..., fill | peer 1: row 0, ..., fill | ...        tokens [T]
    peer 0: row 0, row 1, ..., fill | peer 1: ...                           rows [R]

Dense layers take all tokens at once. A token's bits depend on the others only in a ragged block of rows, so each
peer's tokens, and likewise its rows, are filled up to whole blocks of ROW_BLOCK (measured: torch 2.13, CPU, float32
and bfloat16). Nobody reads what is computed at a fill. Attention takes rows of a like length together, a bucket for
each multiple of BUCKET: how far a row is padded there depends on the row alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROW_BLOCK = 16
BUCKET = 8
PASS_BLOCK = 128
"""In bfloat16 the processor's library compiles a kernel for every number of rows: passes come in fewer sizes."""
Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Bucket:
    """Rows whose attention is one product of n rows padded to L tokens."""

    tokens: Tensor
    """[n L] where each token lies in the pass; beyond a row's end its first token again, which the mask hides."""
    rows: Tensor
    """[n] where each row lies among the rows."""
    mask: Tensor | None
    """[n, 1, 1, L] added to the scores; None where every row has L tokens to see."""
    real: Tensor | None
    """[m] which of the n L places are tokens, and which are not; both None where all are."""
    beyond: Tensor | None
    numbers: Lengths
    """[n] the rows' numbers in the pass, fills not counted."""
    width: int
    """L."""

    def gather(self, whole: Tensor, firsts: bool, hidden: float | None = None) -> Tensor:
        """Returns [n, heads, L, d] of whole [T, heads, d], or with firsts [n, heads, 1, d] of [R, heads, d].

        Places beyond a row's end hold its first token, or `hidden` where that is given.
        """
        if firsts:
            return whole.index_select(0, self.rows).unsqueeze(2)
        tokens = whole.index_select(0, self.tokens)  # [n L, heads, d]
        if hidden is not None and self.beyond is not None:
            tokens[self.beyond] = hidden
        # contiguous, so that one row alone takes no other path than several
        return tokens.view(len(self.rows), -1, *whole.shape[1:]).transpose(1, 2).contiguous()

    def lay(self, answers: Tensor, whole: Tensor, firsts: bool) -> None:
        """Writes answers, shaped as `gather` returns them, where they belong; what lies beyond a row's end is lost."""
        if firsts:
            whole.index_copy_(0, self.rows, answers.squeeze(2))
            return
        tokens = answers.transpose(1, 2).flatten(0, 1)  # [n L, heads, d]
        real = tokens if self.real is None else tokens.index_select(0, self.real)
        whole.index_copy_(0, self.tokens if self.real is None else self.tokens[self.real], real)


@dataclass(frozen=True)
class Packing:
    """Where the rows of each peer and their tokens lie."""

    lengths: Sequence[Lengths]
    """Of each peer, the number of tokens of each row."""
    widths: Sequence[int]
    """Of each peer, how long its rows would be padded: dropout draws for these, so that masks are plain PEFT's."""
    device: torch.device
    dtype: torch.dtype
    """Of what is computed, so of the masks."""
    seen: Sequence[Lengths] | None = None
    """Of each peer, how many tokens of each row attention sees, where the others are padding; None: all."""
    causal: bool = False
    """Whether a token sees itself and those before it alone: what lies beyond a row's end is then never seen."""

    @cached_property
    def token_spans(self) -> list[slice]:
        """The tokens of each peer, its fill included."""
        return spans([int(own.sum()) for own in self.lengths])

    @cached_property
    def row_spans(self) -> list[slice]:
        """The rows of each peer, its fill included."""
        return spans([len(own) for own in self.lengths])

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, fills included."""
        used: int = self.token_spans[-1].stop
        return -(-used // PASS_BLOCK) * PASS_BLOCK if self.dtype == torch.bfloat16 else used

    @cached_property
    def starts(self) -> Lengths:
        """Where each row's first token lies."""
        own = (s.start + np.cumsum(n) - n for s, n in zip(self.token_spans, self.lengths, strict=True))
        return np.concatenate(list(own))

    @cached_property
    def rows(self) -> Lengths:
        """Where each row lies among the rows."""
        own = (s.start + np.arange(len(n)) for s, n in zip(self.row_spans, self.lengths, strict=True))
        return np.concatenate(list(own))

    @cached_property
    def row_index(self) -> Tensor:
        return self.index(self.rows)

    @cached_property
    def firsts(self) -> Tensor:
        """[R] where the first token of each row lies; at a fill, that of the same peer's first row."""
        firsts = np.repeat([s.start for s in self.token_spans], [s.stop - s.start for s in self.row_spans])
        firsts[self.rows] = self.starts
        return self.index(firsts)

    @cached_property
    def positions(self) -> Lengths:
        """[T] the position of each token in its row; 0 at a fill."""
        positions = np.zeros(self.num_tokens, dtype=np.int64)
        lengths = np.concatenate(self.lengths)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions[np.repeat(self.starts, lengths) + within] = within
        return positions

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The rows by their length, rounded up to a multiple of BUCKET."""
        lengths = np.concatenate(self.lengths)
        widths = -(-lengths // BUCKET) * BUCKET
        return [self.bucket(np.flatnonzero(widths == width), lengths, int(width)) for width in np.unique(widths)]

    def bucket(self, numbers: Lengths, lengths: Lengths, width: int) -> Bucket:
        """Returns the bucket of the rows with these numbers."""
        is_token = np.arange(width) < lengths[numbers, None]
        tokens = self.starts[numbers, None] + np.where(is_token, np.arange(width), 0)
        mask = real = beyond = None
        if not is_token.all():
            real, beyond = self.index(np.flatnonzero(is_token)), self.index(np.flatnonzero(~is_token))
        seen = lengths if self.seen is None else np.concatenate(self.seen)
        is_seen = np.arange(width) < seen[numbers, None]
        if not is_seen.all() and not self.causal:
            hidden = torch.from_numpy(~is_seen[:, None, None])
            mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf).to(self.device)
        return Bucket(self.index(tokens.ravel()), self.index(self.rows[numbers]), mask, real, beyond, numbers, width)

    def pack(self, columns: Sequence[Tensor], fill: int) -> Tensor:
        """Returns [T, ...] of the peers' own tokens [tokens, ...], `fill` between them."""
        first = columns[0]
        packed = torch.full((self.num_tokens, *first.shape[1:]), fill, dtype=first.dtype)
        for span, own in zip(self.token_spans, columns, strict=True):
            packed[span.start : span.start + len(own)] = own
        return packed.to(self.device)

    def inputs(self, columns: Sequence[Mapping[str, Tensor]], pads: Mapping[str, int]) -> dict[str, Tensor]:
        """Returns every column packed."""
        return {name: self.pack([own[name] for own in columns], pads.get(name, 0)) for name in columns[0]}

    def index(self, places: Lengths) -> Tensor:
        return torch.from_numpy(places.astype(np.int64)).to(self.device)


def spans(counts: Sequence[int]) -> list[slice]:
    """Returns slices of the given lengths, each rounded up to whole blocks, one after the other."""
    stops = np.cumsum([filled(count) for count in counts]).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def filled(count: int) -> int:
    """Returns a number of rows rounded up to whole blocks."""
    return -(-count // ROW_BLOCK) * ROW_BLOCK
