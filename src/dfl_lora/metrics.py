"""Metrics: how good a peer's answers are, from the labels of its validation rows.

    accuracy   the share of rows answered right
    f1         2 tp / (2 tp + fp + fn) of label 1 where there are two labels, else the mean over the labels that occur
    matthews   the correlation of labels and answers (Gorodkin 2004 for more than two): 1 right, 0 no better than chance
    loss       the mean cross-entropy; the only one of which less is better

0/0 counts as 0. The metrics are not linear in the rows (but accuracy and loss), so answers over several tables
are pooled before they are measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """The labels of an evaluation [rows], the answers given [rows], the mean loss, and how many labels there are."""

    truth: Labels
    given: Labels
    loss: float
    num_labels: int

    @classmethod
    def pooled(cls, tables: Sequence["Answers"]) -> "Answers":
        """Returns the answers over all tables together, each row counted once."""
        rows = sum(len(table.truth) for table in tables)
        return cls(
            np.concatenate([table.truth for table in tables]),
            np.concatenate([table.given for table in tables]),
            sum(table.loss * len(table.truth) for table in tables) / rows,
            max(table.num_labels for table in tables),
        )


def accuracy(answers: Answers) -> float:
    """Returns the share of rows answered right."""
    return float(np.mean(answers.truth == answers.given))


def f1(answers: Answers) -> float:
    """Returns F1 of label 1, or of all labels that occur in rows or answers (macro) where there are more than two."""
    from sklearn.metrics import f1_score

    average = "binary" if answers.num_labels == 2 else "macro"
    return float(f1_score(answers.truth, answers.given, average=average, zero_division=0))


def matthews(answers: Answers) -> float:
    """Returns the correlation of labels and answers, 0 where one of them does not vary."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(answers.given)) == 1 or len(np.unique(answers.truth)) == 1:
        return 0.0  # 0/0, of which scikit-learn warns
    return float(matthews_corrcoef(answers.truth, answers.given))


def loss(answers: Answers) -> float:
    """Returns the mean cross-entropy."""
    return answers.loss


METRICS: dict[str, Callable[[Answers], float]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "loss": loss}


def key_of(metric: str) -> str:
    """Returns the key of a metric in rounds.jsonl and summary.json, where `loss` is that of the training."""
    return "eval_loss" if metric == "loss" else metric


def ends_of(key: str) -> tuple[str, str]:
    """Returns which ends of the spread over peers are the worst and the best."""
    return ("max", "min") if key == "eval_loss" else ("min", "max")


def recorded(metric: str) -> tuple[str, ...]:
    """Returns the metrics that a run records whose own is `metric`: always accuracy and loss."""
    return tuple(dict.fromkeys(("accuracy", metric, "loss")))
