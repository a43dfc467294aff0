"""Named tensors over one flat vector.

Everything that travels, is mixed, measured or saved is one flat vector with a layout (name -> place and
shape). Entries are ordered by role (A, B, core, head), so that the roles a phase shares are one
contiguous slice in every schedule but one, and selecting them copies nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import cast

import torch
from torch import Tensor

from dfl_lora.roles import ROLES, Role, Roles

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One named tensor: its role, its place in the flat vector and its shape."""

    name: str
    role: Role
    start: int
    shape: Shape

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a flat vector of `size` numbers."""

    entries: tuple[Entry, ...]

    @staticmethod
    def of(shapes: Mapping[str, tuple[Role, Shape]]) -> "Layout":
        """Returns the layout of named (role, shape) pairs: by role, then in the order given."""
        entries, start = [], 0
        for wanted in ROLES:
            for name, (role, shape) in shapes.items():
                if role == wanted:
                    entries.append(Entry(name, role, start, shape))
                    start += prod(shape)
        return Layout(tuple(entries))

    @cached_property
    def size(self) -> int:
        return self.entries[-1].stop if self.entries else 0

    @cached_property
    def roles(self) -> Roles:
        return Roles(e.role for e in self.entries)

    @cached_property
    def by_name(self) -> Mapping[str, Entry]:
        return {e.name: e for e in self.entries}

    @cached_property
    def digest(self) -> str:
        """sha256 of names, roles and shapes: two peers with equal digests mean the same by each number."""
        content = json.dumps([[e.name, e.role, *e.shape] for e in self.entries])
        return hashlib.sha256(content.encode()).hexdigest()

    def spans(self, roles: Iterable[Role]) -> tuple[slice, ...]:
        """Returns the maximal contiguous slices that hold exactly the given roles."""
        wanted, spans = frozenset(roles), list[slice]()
        for e in self.entries:
            if e.role not in wanted:
                continue
            if spans and spans[-1].stop == e.start:
                spans[-1] = slice(spans[-1].start, e.stop)
            else:
                spans.append(slice(e.start, e.stop))
        return tuple(spans)

    def restrict(self, roles: Iterable[Role]) -> "Layout":
        """Returns the layout of the given roles alone, as `Tensors.select` packs them."""
        wanted = frozenset(roles)
        return Layout.of({e.name: (e.role, e.shape) for e in self.entries if e.role in wanted})

    @staticmethod
    def joined(parts: "Mapping[str, Layout]") -> "Layout":
        """Returns a layout of several vectors laid end to end, whose tensors are named `part/tensor`."""
        entries, start = list[Entry](), 0
        for part, layout in parts.items():
            entries += [Entry(f"{part}/{e.name}", e.role, start + e.start, e.shape) for e in layout.entries]
            start += layout.size
        return Layout(tuple(entries))


@dataclass(frozen=True)
class Tensors:
    """One flat vector [P] and its layout; `t["encoder.query.B"]` is a view."""

    flat: Tensor
    layout: Layout

    def __post_init__(self) -> None:
        if self.flat.shape != (self.layout.size,):
            raise ValueError(f"a flat vector of {tuple(self.flat.shape)} does not fit a layout of {self.layout.size}")

    @staticmethod
    def of(values: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype = torch.float32) -> "Tensors":
        """Packs named tensors into one new flat vector; names and shapes must be the layout's."""
        result = Tensors(torch.zeros(layout.size, dtype=dtype), layout)
        if values.keys() != layout.by_name.keys():
            raise ValueError(f"names differ from the layout: {sorted(values.keys() ^ layout.by_name.keys())[:4]}")
        for name, value in values.items():
            if value.shape != result[name].shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the layout says {tuple(result[name].shape)}")
            result[name].copy_(value)
        return result

    def __getitem__(self, name: str) -> Tensor:
        e = self.layout.by_name[name]
        return self.flat[e.start : e.stop].view(e.shape)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((e.name, self[e.name]) for e in self.layout.entries)

    def select(self, roles: Iterable[Role]) -> "Tensors":
        """Returns the tensors of some roles: a view where they are contiguous, else a packed copy."""
        wanted = frozenset(roles)
        spans = self.layout.spans(wanted)
        pieces = [self.flat[s] for s in spans]
        flat = pieces[0] if len(pieces) == 1 else torch.cat([*pieces, self.flat[:0]])
        return Tensors(flat, self.layout if flat.numel() == self.layout.size else self.layout.restrict(wanted))

    def assign(self, roles: Iterable[Role], value: "Tensors") -> None:
        """Writes back what `select(roles)` packed."""
        start = 0
        for s in self.layout.spans(roles):
            stop = start + s.stop - s.start
            self.flat[s].copy_(value.flat[start:stop])
            start = stop

    def join(self, **others: "Tensors") -> "Tensors":
        """Returns one message of several parts: this vector as part `x`, the others by their names."""
        flat = torch.cat([self.flat, *(o.flat for o in others.values())])
        return Tensors(flat, Layout.joined({"x": self.layout, **{name: o.layout for name, o in others.items()}}))

    def part(self, name: str, layout: Layout) -> "Tensors":
        """Returns a part of a joined message, as a view over the layout that it had before."""
        start = next((e.start for e in self.layout.entries if e.name.startswith(f"{name}/")), self.layout.size)
        return Tensors(self.flat[start : start + layout.size], layout)

    def with_flat(self, flat: Tensor) -> "Tensors":
        return Tensors(flat, self.layout)

    def is_finite(self) -> bool:
        """Tells whether every number is; a sum that is finite tells it in one reading, and one that is not may lie."""
        return bool(torch.isfinite(self.flat.sum())) or bool(torch.isfinite(self.flat).all())

    def norm(self) -> float:
        """Returns the Euclidean norm, computed in float64."""
        return cast(float, torch.linalg.vector_norm(self.flat, dtype=torch.float64).item())
