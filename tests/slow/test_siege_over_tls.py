"""Ten thousand mutants over real TLS."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_of_ten_thousand_mutants_over_tls_each_is_refused_as_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "network.siege_over_tls", "10000"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    siege = json.loads(done.stdout)
    with capsys.disabled():
        table = "\n".join(f"{kind:>12} {count:>9,}" for kind, count in sorted(siege["refused"].items()))
        print(f"\n{table}\n{siege['sent']:,} mutants over TLS, {siege['resigned']:,} signed afterwards")
    assert siege["sent"] >= 10_000 <= 2 * siege["resigned"]
    assert len(siege["refused"]) >= 20 and min(siege["refused"].values()) >= 10
    assert siege["taken_in"] >= 500
    assert siege["grown_bytes"] < 32 * 2**20
