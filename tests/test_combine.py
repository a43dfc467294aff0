"""How a neighbourhood becomes one value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora.combine import Inbox, mean
from dfl_lora.mixing import Row
from dfl_lora.products import COMBINES
from dfl_lora.tensors import Layout, Tensors

LAYOUT = Layout.of({"q.B": ("B", (2,)), "head": ("head", (1,))})
ROW = Row(1, {0: 0.25, 2: 0.25, 4: 0.125})


def vector(*values: float, dtype: torch.dtype = torch.float32) -> Tensors:
    return Tensors(torch.tensor(values, dtype=dtype), LAYOUT)


OWN = vector(1, 2, 3)
GOOD = {0: vector(5, 6, 7), 2: vector(-3, 2, 3), 4: vector(1, 10, 3)}


def inbox(arrived: dict[int, Tensors | None], own: Tensors = OWN, sent: Tensors | None = None) -> Inbox:
    return Inbox.receive(ROW, own, sent or own, arrived)


def test_the_mean_weighs_each_neighbour_by_the_row() -> None:
    result = mean(inbox(dict(GOOD)))
    assert result.flat.tolist() == [1 + 0.25 * 4 - 0.25 * 4, 2 + 0.25 * 4 + 0.125 * 8, 3 + 0.25 * 4]
    assert result.layout is LAYOUT


def test_the_mean_is_the_weighted_sum_with_the_own_weight() -> None:
    expected = ROW.own * OWN.flat + sum(ROW.weights[j] * m.flat for j, m in GOOD.items())
    assert torch.allclose(mean(inbox(dict(GOOD))).flat, expected)


def test_combining_leaves_the_own_value_and_the_messages_as_they_were() -> None:
    own, message = vector(1, 2, 3), vector(4, 5, 6)
    mean(inbox({0: message}, own))
    assert own.flat.tolist() == [1, 2, 3]
    assert message.flat.tolist() == [4, 5, 6]


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    messages = {j: vector(*torch.randn(3, generator=generator).tolist()) for j in (0, 2, 4)}
    backwards = dict(reversed(messages.items()))
    assert torch.equal(mean(inbox(dict(messages))).flat, mean(inbox(dict(backwards))).flat)


def test_the_own_value_enters_as_it_was_sent() -> None:
    """x_i + sum_j w_ij (q_j - q_i): the difference between x_i and q_i stays."""
    sent = vector(0, 2, 4)
    same = {j: vector(0, 2, 4) for j in ROW.weights}
    assert torch.equal(mean(inbox(dict(same), OWN, sent)).flat, OWN.flat)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=3, max_size=3),
    st.dictionaries(st.integers(0, 6), st.floats(0, 1), max_size=6),
)
def test_equal_peers_stay_equal_to_the_bit(values: list[float], weights: dict[int, float]) -> None:
    own = vector(*values)
    arrived: dict[int, Tensors | None] = {j: vector(*values) for j in weights}
    assert torch.equal(mean(Inbox.receive(Row(7, weights), own, own, arrived)).flat, own.flat)


@pytest.mark.parametrize("missing", ROW.weights)
def test_a_missing_message_gives_its_weight_to_the_own_value(missing: int) -> None:
    arrived: dict[int, Tensors | None] = {j: m for j, m in GOOD.items() if j != missing}
    received = mean(inbox(arrived)).flat
    own_instead = mean(inbox({**GOOD, missing: OWN})).flat
    assert torch.equal(received, own_instead)
    assert inbox(arrived).refused == {}


def test_an_empty_inbox_leaves_the_own_value_to_the_bit() -> None:
    assert torch.equal(mean(inbox({})).flat, OWN.flat)


@pytest.mark.parametrize(
    ("sender", "message", "fault"),
    [
        (3, vector(9, 9, 9), "stranger"),
        (1, vector(9, 9, 9), "stranger"),
        (3, None, "stranger"),
        (0, None, "malformed"),
        (0, vector(9, 9, 9, dtype=torch.float64), "malformed"),
        (0, vector(9, 9, 9, dtype=torch.float16), "malformed"),
        (0, Tensors(torch.ones(4), Layout.of({"q.B": ("B", (4,))})), "malformed"),
        (0, Tensors(torch.ones(3), Layout.of({"k.B": ("B", (2,)), "head": ("head", (1,))})), "malformed"),
        (0, Tensors(torch.ones(3), Layout.of({"q.B": ("B", (1,)), "head": ("head", (2,))})), "malformed"),
        (0, vector(9, math.nan, 9), "non-finite"),
        (0, vector(9, 9, math.inf), "non-finite"),
        (0, vector(-math.inf, 9, 9), "non-finite"),
    ],
)
def test_a_bad_message_is_refused_and_has_no_effect(sender: int, message: Tensors | None, fault: str) -> None:
    others: dict[int, Tensors | None] = {j: m for j, m in GOOD.items() if j != sender}
    box = inbox({**others, sender: message})
    assert box.refused == {sender: fault}
    assert box.received == others
    assert torch.equal(mean(box).flat, mean(inbox(others)).flat)


def test_every_refusal_is_listed_and_the_rest_received() -> None:
    box = inbox({6: OWN, 4: None, 2: vector(math.nan, 0, 0), 0: GOOD[0]})
    assert box.refused == {2: "non-finite", 4: "malformed", 6: "stranger"}
    assert list(box.received) == [0]


def test_the_table_holds_the_weighted_mean() -> None:
    assert COMBINES["mean"] is mean
