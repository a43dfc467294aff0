"""The tasks of GLUE (arXiv 1804.07461): text columns, label names in the order of their numbers, and metric.

Columns and label order are those of nyu-mll/glue on the hub, whose configurations have the names of this table.
Two of GLUE's parts are left out: STS-B asks for a degree of likeness from 0 to 5, a regression and not a
classification, and AX has no labels to train or score on. MRPC and QQP are scored by F1, since one label is
twice as frequent as the other, CoLA by Matthews' correlation; the rest by accuracy.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """The text columns of a task (one sentence or a pair), its label column, the label names where fixed, its metric.

    The metric is a name of the table dfl_lora.metrics.METRICS.
    """

    text: tuple[str, ...]
    label: str = "label"
    names: tuple[str, ...] | None = None
    metric: str = "accuracy"


ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, Columns] = {
    "sst2": Columns(("sentence",), names=("negative", "positive")),
    "mnli": Columns(("premise", "hypothesis"), names=("entailment", "neutral", "contradiction")),
    "qnli": Columns(("question", "sentence"), names=ENTAILMENT),
    "cola": Columns(("sentence",), names=("unacceptable", "acceptable"), metric="matthews"),
    "mrpc": Columns(("sentence1", "sentence2"), names=("not_equivalent", "equivalent"), metric="f1"),
    "qqp": Columns(("question1", "question2"), names=("not_duplicate", "duplicate"), metric="f1"),
    "rte": Columns(("sentence1", "sentence2"), names=ENTAILMENT),
    "wnli": Columns(("sentence1", "sentence2"), names=ENTAILMENT[::-1]),
}
