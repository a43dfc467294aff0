"""The border against a million frames that no honest peer sends."""

import time

import pytest

from network.siege import FRAME_KINDS, besieged

MILLION = 10**6


@pytest.mark.slow
def test_of_a_million_mutants_none_is_taken_in_and_every_check_refuses_a_thousand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = time.monotonic()
    siege = besieged(seed=1, count=MILLION)
    with capsys.disabled():
        seconds = time.monotonic() - start
        print(f"\n{siege.table()}\n{MILLION:,} mutants, {siege.resigned:,} signed afterwards, {seconds:.0f} s")
    assert min(siege.refused[kind] for kind in FRAME_KINDS) >= 1000
    assert siege.refused.total() == MILLION
    assert siege.resigned >= MILLION / 2
    assert siege.grown_bytes < 64 * 2**20
