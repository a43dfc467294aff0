"""Named tensors over one flat vector."""

import math
from itertools import chain, combinations

import pytest
import torch

from dfl_lora.roles import ROLES, Role
from dfl_lora.tensors import Entry, Layout, Tensors

SHAPES: dict[str, tuple[Role, tuple[int, ...]]] = {
    "head": ("head", (2, 3)),
    "q.A": ("A", (2, 4)),
    "q.B": ("B", (3, 2)),
    "v.A": ("A", (2, 2)),
    "v.B": ("B", (5,)),
}
LAYOUT = Layout.of(SHAPES)
SUBSETS = [frozenset(c) for c in chain.from_iterable(combinations(ROLES, k) for k in range(4))]


@pytest.fixture
def numbers() -> Tensors:
    return Tensors(torch.arange(float(LAYOUT.size)), LAYOUT)


def test_a_layout_orders_by_role_and_then_as_given() -> None:
    assert [e.name for e in LAYOUT.entries] == ["q.A", "v.A", "q.B", "v.B", "head"]
    assert [(e.start, e.stop) for e in LAYOUT.entries] == [(0, 8), (8, 12), (12, 18), (18, 23), (23, 29)]
    assert LAYOUT.size == 29
    assert LAYOUT.by_name["v.B"] == Entry("v.B", "B", 18, (5,))


def test_an_empty_layout_has_no_numbers() -> None:
    assert Layout.of({}).size == 0
    assert Tensors.of({}, Layout.of({})).norm() == 0


def test_a_scalar_takes_one_place() -> None:
    assert Layout.of({"scale": ("head", ())}).size == 1


@pytest.mark.parametrize(
    "other",
    [
        {**SHAPES, "q.B": ("B", (2, 3))},
        {**SHAPES, "q.B": ("A", (3, 2))},
        {k.replace("q", "k"): v for k, v in SHAPES.items()},
        {k: v for k, v in SHAPES.items() if k != "head"},
        {k: SHAPES[k] for k in ("v.A", "q.A", "q.B", "v.B", "head")},
    ],
    ids=["shape", "role", "name", "missing", "order"],
)
def test_the_digest_tells_layouts_apart(other: dict[str, tuple[Role, tuple[int, ...]]]) -> None:
    assert Layout.of(other).digest != LAYOUT.digest
    assert Layout.of(other) != LAYOUT


def test_the_digest_is_the_same_on_every_machine() -> None:
    assert Layout.of(dict(SHAPES)).digest == LAYOUT.digest
    assert LAYOUT.digest == "cdb9b69e58b4979cbcd2321a808c5566fe270030a9a2721aa643c2d41bcb3e22"


@pytest.mark.parametrize(
    ("roles", "spans"),
    [
        ((), []),
        (("A",), [(0, 12)]),
        (("B",), [(12, 23)]),
        (("A", "B"), [(0, 23)]),
        (("B", "head"), [(12, 29)]),
        (("A", "head"), [(0, 12), (23, 29)]),
        (("head", "B", "A"), [(0, 29)]),
    ],
)
def test_roles_are_one_slice_in_all_cases_but_one(roles: tuple[Role, ...], spans: list[tuple[int, int]]) -> None:
    assert [(s.start, s.stop) for s in LAYOUT.spans(roles)] == spans


@pytest.mark.parametrize("roles", SUBSETS, ids=lambda r: "+".join(sorted(r)) or "none")
def test_what_is_selected_keeps_its_names_and_values(numbers: Tensors, roles: frozenset[Role]) -> None:
    chosen = numbers.select(roles)
    assert chosen.layout == LAYOUT.restrict(roles)
    assert [name for name, _ in chosen.items()] == [e.name for e in LAYOUT.entries if e.role in roles]
    for name, value in chosen.items():
        assert torch.equal(value, numbers[name])


@pytest.mark.parametrize("roles", SUBSETS, ids=lambda r: "+".join(sorted(r)) or "none")
def test_assign_writes_back_what_select_packed_and_nothing_else(numbers: Tensors, roles: frozenset[Role]) -> None:
    chosen = numbers.select(roles)
    negative = chosen.with_flat(-chosen.flat - 1)
    before = {name: value.clone() for name, value in numbers.items()}
    numbers.assign(roles, negative)
    for e in LAYOUT.entries:
        assert torch.equal(numbers[e.name], -before[e.name] - 1 if e.role in roles else before[e.name])


def test_a_contiguous_selection_is_a_view_and_the_other_a_copy(numbers: Tensors) -> None:
    numbers.select({"B", "head"})["q.B"].zero_()
    assert not numbers["q.B"].any()
    numbers.select({"A", "head"})["head"].zero_()
    assert numbers["head"].all()


def test_selecting_every_role_there_is_keeps_the_layout() -> None:
    only_b = Tensors(torch.ones(3), Layout.of({"B": ("B", (3,))}))
    assert only_b.select({"B", "head"}).layout is only_b.layout


def test_a_named_tensor_is_a_view_of_its_shape(numbers: Tensors) -> None:
    assert torch.equal(numbers["v.A"], torch.tensor([[8.0, 9.0], [10.0, 11.0]]))
    numbers["v.A"][1, 0] = -1.0
    assert numbers.flat[10] == -1.0


def test_packing_and_naming_are_inverse(numbers: Tensors) -> None:
    packed = Tensors.of(dict(numbers.items()), LAYOUT)
    assert torch.equal(packed.flat, numbers.flat)
    assert packed.flat.dtype == torch.float32
    assert Tensors.of(dict(numbers.items()), LAYOUT, torch.float64).flat.dtype == torch.float64


def test_packing_copies(numbers: Tensors) -> None:
    packed = Tensors.of(dict(numbers.items()), LAYOUT)
    packed.flat.zero_()
    assert numbers.flat.sum() > 0


def test_packing_refuses_missing_and_unknown_names(numbers: Tensors) -> None:
    values = dict(numbers.items())
    head = values.pop("head")
    with pytest.raises(ValueError, match=r"names differ from the layout: \['head'\]"):
        Tensors.of(values, LAYOUT)
    with pytest.raises(ValueError, match=r"\['bias'\]"):
        Tensors.of({**values, "head": head, "bias": head}, LAYOUT)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 1), (3, 2), (6,)], ids=str)
def test_packing_refuses_another_shape_even_where_it_would_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        Tensors.of({"w": torch.ones(shape)}, Layout.of({"w": ("B", (2, 3))}))


@pytest.mark.parametrize("shape", [(28,), (30,), (29, 1), ()], ids=str)
def test_a_vector_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit a layout of 29"):
        Tensors(torch.zeros(shape), LAYOUT)


def test_a_joined_message_comes_apart_into_its_parts(numbers: Tensors) -> None:
    z = numbers.with_flat(-numbers.flat)
    message = numbers.join(z=z)
    assert message.layout == Layout.joined({"x": LAYOUT, "z": LAYOUT})
    assert message.layout.size == 2 * LAYOUT.size
    assert torch.equal(message["z/q.B"], z["q.B"])
    assert torch.equal(message["x/q.B"], numbers["q.B"])
    for name, part in (("x", numbers), ("z", z)):
        assert message.part(name, LAYOUT).layout is LAYOUT
        assert torch.equal(message.part(name, LAYOUT).flat, part.flat)


def test_parts_of_a_message_may_have_roles_of_their_own(numbers: Tensors) -> None:
    head = numbers.select({"head"})
    message = numbers.join(z=head, v=head.with_flat(2 * head.flat))
    assert message.layout.size == LAYOUT.size + 2 * head.layout.size
    assert torch.equal(message.part("z", head.layout).flat, head.flat)
    assert torch.equal(message.part("v", head.layout).flat, 2 * head.flat)


def test_messages_of_different_parts_have_different_digests(numbers: Tensors) -> None:
    digests = {m.layout.digest for m in (numbers, numbers.join(), numbers.join(z=numbers), numbers.join(v=numbers))}
    assert len(digests) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_makes_a_vector_not_finite(numbers: Tensors, bad: float) -> None:
    assert numbers.is_finite()
    numbers["v.B"][3] = bad
    assert not numbers.is_finite()


def test_the_norm_is_computed_in_float64() -> None:
    big = Tensors(torch.tensor([3e30, 4e30]), Layout.of({"w": ("B", (2,))}))
    assert big.norm() == pytest.approx(5e30, rel=1e-6)
    assert isinstance(big.norm(), float)
