"""The end of a run: nothing is evaluated twice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.metrics import Answers
from dfl_lora.peers import Peers
from dfl_lora.reading import resolve
from dfl_lora.simulate import run_recipe
from tiny import toy


def ended(run: Path, monkeypatch: pytest.MonkeyPatch, *, resume: bool = False, **parts: Any) -> tuple[Any, list[int]]:
    """Runs the toy and returns its summary, and how many peers each evaluation had."""
    evaluate, seen = StackedLearner.evaluate, list[int]()

    def counted(self: StackedLearner, peers: Peers) -> Mapping[int, Answers]:
        seen.append(len(peers))
        return evaluate(self, peers)

    monkeypatch.setattr(StackedLearner, "evaluate", counted)
    return run_recipe(resolve(toy(**parts)), run, [], resume=resume, overwrite=False), seen


@pytest.mark.parametrize("peers", [{"num_peers": 1, "topology": "none"}, {"num_peers": 4, "topology": "complete"}])
def test_peers_that_all_are_the_mean_are_not_evaluated_again(
    peers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run, which has not evaluated them itself, ends with the same answers. The rate is 0 in float32."""
    whole, seen = ended(tmp_path / "run", monkeypatch, peers=peers, train={"learning_rate": 1e-60})
    assert seen == [peers["num_peers"]] * 2
    monkeypatch.undo()
    again, seen = ended(tmp_path / "run", monkeypatch, resume=True, peers=peers, train={"learning_rate": 1e-60})
    assert seen == [1]
    clocked = {"seconds", "peak_rss_bytes", "tokens_per_second"}
    assert {k: v for k, v in again.items() if k not in clocked} == {k: v for k, v in whole.items() if k not in clocked}


def test_the_mean_of_peers_that_differ_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(tmp_path / "run", monkeypatch)[1] == [3, 3, 1]
