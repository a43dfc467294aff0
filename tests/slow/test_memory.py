"""One frozen base for all peers: memory grows by adapters, not by models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def peak_rss(out: Path, num_peers: int, batch_size: int) -> int:
    """Returns the peak resident bytes of a run in a process of its own."""
    settings = [
        f"peers.num_peers={num_peers}",
        "peers.topology=ring",
        "data.partition=iid",
        f"train.batch_size={batch_size}",
        "train.rounds=2",
        "train.local.steps=4",
        "evaluate.rows=64",
    ]
    command = [sys.executable, "-m", "dfl_lora", "run", "recipes/demo.yaml", "--out", str(out), "--json"]
    command += [word for setting in settings for word in ("--set", setting)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(json.loads(result.stdout)["peak_rss_bytes"])


@pytest.mark.slow
def test_sixteen_peers_need_at_most_1_3_times_the_memory_of_one_with_the_same_tokens_a_pass(tmp_path: Path) -> None:
    one, sixteen = peak_rss(tmp_path / "1", 1, 128), peak_rss(tmp_path / "16", 16, 8)
    print(f"peak RSS: 1 peer x 128 rows {one / 2**20:.0f} MiB, 16 peers x 8 rows {sixteen / 2**20:.0f} MiB")
    assert sixteen <= 1.3 * one
