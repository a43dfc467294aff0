"""Randomness by name."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora.streams import numpy_stream, stream, torch_stream

names = st.lists(st.integers() | st.text('ab1,"', max_size=4), max_size=4)


def test_a_name_gives_the_same_seed_for_ever() -> None:
    assert stream(0, "batches", 3, 1) == 7131163260151890974
    assert stream(0) == 7520536977032167579


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.integers(), names, names)
def test_different_names_give_different_seeds_of_63_bits(
    a: int, b: int, x: list[str | int], y: list[str | int]
) -> None:
    assert 0 <= stream(a, *x) < 2**63
    assert (stream(a, *x) == stream(b, *y)) == ((a, x) == (b, y))


def test_names_that_look_alike_do_not_collide() -> None:
    seeds = {stream(1, "2"), stream(1, 2), stream(12), stream(1, "a", "bc"), stream(1, "ab", "c"), stream(1, "abc")}
    assert len(seeds) == 6


def test_generators_are_fresh_each_time() -> None:
    first, second = torch.rand(4, generator=torch_stream(7, "A")), torch.rand(4, generator=torch_stream(7, "A"))
    assert torch.equal(first, second)
    assert np.array_equal(numpy_stream(7, "split").random(4), numpy_stream(7, "split").random(4))


def test_generators_follow_the_name() -> None:
    assert not torch.equal(
        torch.rand(4, generator=torch_stream(7, "A", 0)), torch.rand(4, generator=torch_stream(7, "A", 1))
    )
    assert not np.array_equal(numpy_stream(7, "split").random(4), numpy_stream(8, "split").random(4))


def test_drawing_by_name_leaves_the_global_generators_alone() -> None:
    before = torch.random.get_rng_state()
    torch.rand(4, generator=torch_stream(7, "A"))
    assert torch.equal(before, torch.random.get_rng_state())
