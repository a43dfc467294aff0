"""What is trained and what is shared."""

import pytest

from dfl_lora.roles import Role, Roles
from dfl_lora.schedules import SCHEDULES, Head, Phase, ever_trained


def roles(*names: Role) -> Roles:
    return frozenset(names)


@pytest.mark.parametrize("t", [0, 1, 17])
@pytest.mark.parametrize(
    ("name", "head", "trained", "shared"),
    [
        ("lora", "shared", roles("A", "B", "head"), roles("A", "B", "head")),
        ("lora", "private", roles("A", "B", "head"), roles("A", "B")),
        ("lora", "frozen", roles("A", "B"), roles("A", "B")),
        ("freeze_a", "shared", roles("B", "head"), roles("B", "head")),
        ("freeze_a", "private", roles("B", "head"), roles("B")),
        ("freeze_a", "frozen", roles("B"), roles("B")),
        ("share_a", "shared", roles("A", "B", "head"), roles("A", "head")),
        ("share_a", "private", roles("A", "B", "head"), roles("A")),
        ("share_a", "frozen", roles("A", "B"), roles("A")),
        ("core", "shared", roles("core", "head"), roles("core", "head")),
        ("core", "private", roles("core", "head"), roles("core")),
        ("core", "frozen", roles("core"), roles("core")),
    ],
)
def test_a_schedule_trains_and_shares_what_its_name_says(
    name: str, head: Head, trained: Roles, shared: Roles, t: int
) -> None:
    assert SCHEDULES[name](head)(t) == Phase(t, trained, shared)


@pytest.mark.parametrize("head", ["shared", "private", "frozen"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_never_trained_is_never_shared(name: str, head: Head) -> None:
    schedule = SCHEDULES[name](head)
    assert all(schedule(t).shared <= ever_trained(schedule, 8) for t in range(1, 9))


def test_ever_trained_is_the_union_over_rounds() -> None:
    def by_turns(t: int) -> Phase:
        return Phase(t, roles("A") if t % 2 else roles("B"), roles("A", "B"))

    assert ever_trained(by_turns, 2) == {"A", "B"}


def test_ever_trained_counts_the_last_round_as_the_loop_numbers_them() -> None:
    """Rounds are 1 ... rounds."""

    def head_last(t: int) -> Phase:
        return Phase(t, roles("head") if t == 3 else roles("B"), roles("B"))

    assert ever_trained(head_last, 3) == {"B", "head"}
    assert ever_trained(head_last, 2) == {"B"}


def test_a_run_of_no_rounds_still_has_something_to_train() -> None:
    assert ever_trained(SCHEDULES["lora"]("frozen"), 0) == {"A", "B"}


@pytest.mark.parametrize("mix", ["both", "trained"])
@pytest.mark.parametrize("period", [1, 2, 5])
def test_alternating_trains_b_alone_for_a_period_then_a_alone(period: int, mix: str) -> None:
    schedule = SCHEDULES["alternating"]("private", period=period, mix=mix)
    for t in range(1, 4 * period + 1):
        factor = roles("B") if (t - 1) // period in (0, 2) else roles("A")
        assert schedule(t) == Phase(t, factor | {"head"}, roles("A", "B") if mix == "both" else factor)


def test_alternating_shares_the_head_in_every_phase_unless_told_otherwise() -> None:
    for head, held in (("shared", True), ("private", False), ("frozen", False)):
        schedule = SCHEDULES["alternating"](head)
        assert {"head" in schedule(t).shared for t in range(1, 5)} == {held}
        assert {"head" in schedule(t).trained for t in range(1, 5)} == {head != "frozen"}
