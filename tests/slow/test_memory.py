"""One frozen base for all peers: memory grows by adapters, not by models, and is predicted before a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from real import DATA, real

ROOT = Path(__file__).parents[2]
ONE = {"peers.num_peers": 1, "train.batch_size": 128}
SIXTEEN = {"peers.num_peers": 16, "train.batch_size": 8}
SIXTY_FOUR = {
    "peers.num_peers": 64,
    "train.batch_size": 16,
    "lora.r": 16,
    "lora.target_modules": "all-linear",
    "method.schedule": "lora",
}
EVERY = {
    "peers.topology": "ring",
    "data.partition": "iid",
    "train.rounds": 2,
    "train.local.steps": 4,
    "evaluate.rows": 64,
}
LLAMA_ONE = {"peers.num_peers": 1, "train.batch_size": 8}
LLAMA_SEVEN = {"peers.num_peers": 7, "train.batch_size": 4}
LLAMA_ALL = {
    "peers.num_peers": 12,
    "train.batch_size": 4,
    "train.gradient_accumulation_steps": 2,
    "lora.target_modules": "all-linear",
    "method.schedule": "lora",
}
PREDICT = """
import json, sys
from pathlib import Path
from dfl_lora.memory import estimate
from dfl_lora.reading import load_recipe
from dfl_lora.running import build
print(json.dumps(estimate(build(load_recipe(Path(sys.argv[1]), sys.argv[2:]))).as_json()))
"""


def printed(*words: object) -> dict[str, int]:
    """Returns the JSON that a python process of its own prints."""
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    numbers: dict[str, int] = json.loads(result.stdout)
    return numbers


def settings(shape: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in (EVERY | shape).items()]


def peak_rss(out: Path, shape: dict[str, object], recipe: str = "recipes/demo.yaml") -> int:
    """Returns the peak resident bytes of a run in a process of its own."""
    words = [word for setting in settings(shape) for word in ("--set", setting)]
    return printed("-m", "dfl_lora", "run", recipe, "--out", out, "--json", *words)["peak_rss_bytes"]


@pytest.mark.slow
def test_sixteen_peers_need_at_most_1_3_times_the_memory_of_one_with_the_same_tokens_a_pass(tmp_path: Path) -> None:
    one, sixteen = peak_rss(tmp_path / "1", ONE), peak_rss(tmp_path / "16", SIXTEEN)
    print(f"peak RSS: 1 peer x 128 rows {one / 2**20:.0f} MiB, 16 peers x 8 rows {sixteen / 2**20:.0f} MiB")
    assert sixteen <= 1.3 * one


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ONE, SIXTEEN, SIXTY_FOUR], ids=["one", "sixteen", "sixty-four"])
def test_the_predicted_peak_is_within_a_fifth_of_the_measured_one(tmp_path: Path, shape: dict[str, object]) -> None:
    predicted = printed("-c", PREDICT, "recipes/demo.yaml", *settings(shape))["total"]
    peak = peak_rss(tmp_path / "run", shape)
    print(f"peak RSS: predicted {predicted / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    assert predicted == pytest.approx(peak, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [LLAMA_ONE, LLAMA_SEVEN, LLAMA_ALL], ids=["one", "seven", "twelve"])
def test_of_a_llama_the_predicted_peak_is_within_a_fifth_of_the_measured_one(
    tmp_path: Path, shape: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    real("models/stories260K-llama", "tinystories")
    monkeypatch.setenv("DFL_LORA_DATA", str(DATA))
    recipe = "recipes/tinystories.yaml"
    predicted = printed("-c", PREDICT, recipe, *settings(shape))["total"]
    peak = peak_rss(tmp_path / "run", shape, recipe)
    print(f"peak RSS: predicted {predicted / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    assert predicted == pytest.approx(peak, rel=0.2)
