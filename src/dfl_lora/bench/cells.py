"""Cells: one setting of the benchmark each, as a recipe; and the rows and the model they are made of."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dfl_lora.reading import resolve
from dfl_lora.recipe import Recipe

MethodName = Literal["LoRA", "DFL-LoRA"]
SCHEDULES: dict[MethodName, str] = {"LoRA": "lora", "DFL-LoRA": "freeze_a"}
SEED_ROWS, SEED_EVALUATED, FEWEST_EVALUATED = 9621, 872, 16
"""The seed's round: a peer of SST-2 trains on 9,621 rows and is evaluated on 872."""
BUILT_IN = "builtin/sentences"


@dataclass(frozen=True)
class Material:
    """A base model, where LoRA is placed on it, and rows."""

    rows: str
    """What the rows are, in words."""
    path: str
    config: str | None = None
    task: str | None = None
    train: str = "train"
    validation: str = "validation"
    model: str = "all-MiniLM-L6-v2"
    targets: tuple[str, ...] = ("query", "value")
    r: int = 4
    lora_alpha: int = 32


def material(folders: Sequence[Path] | None = None) -> Material:
    """Returns SST-2 where a folder of data sets is at hand (DFL_LORA_DATA, ../shared/data), else the generator."""
    named = os.environ.get("DFL_LORA_DATA")
    for folder in folders or [Path(named or "data"), Path("../shared/data")]:
        if (folder / "glue" / "sst2").is_dir():
            return Material("SST-2", str(folder / "glue"), "sst2", "sst2")
    return Material("built-in sentences (no folder of data sets: set DFL_LORA_DATA)", BUILT_IN)


@dataclass(frozen=True)
class Cell:
    """How many peers do how many local steps on how many rows each."""

    method: MethodName
    num_peers: int
    batch_size: int
    steps: int
    partition: dict[str, Any] = field(default_factory=lambda: {"kind": "dirichlet", "alpha": 0.2})
    tokens: int | None = None
    """The tokens a peer and step that the cell stands for in the grid."""
    evaluate: int | None = None
    """The rows evaluated a peer and round; None: in the seed's proportion to those trained on."""

    @property
    def name(self) -> str:
        tokens = f", {self.tokens} tokens a peer and step" if self.tokens else ""
        return f"{self.method}, {self.num_peers} peers x {self.batch_size} rows x {self.steps} steps{tokens}"

    @property
    def evaluated(self) -> int:
        """The rows evaluated a peer and round."""
        return self.evaluate or max(FEWEST_EVALUATED, round(self.batch_size * self.steps * SEED_EVALUATED / SEED_ROWS))

    def recipe(self, material: Material, rounds: int, **parts: Any) -> Recipe:
        """Returns the cell as a recipe; `parts` are set over it (compute, evaluate)."""
        topology = {1: "none", 7: "link3"}.get(self.num_peers, "ring")
        content = {
            "name": "bench",
            "model": {"name_or_path": material.model},
            "lora": {"r": material.r, "lora_alpha": material.lora_alpha, "target_modules": list(material.targets)},
            "task": {"name": material.task},
            "data": {
                "path": material.path, "config": material.config, "train": material.train,
                "validation": material.validation, "partition": dict(self.partition),
            },
            "peers": {"num_peers": self.num_peers, "topology": topology},
            "method": {"schedule": SCHEDULES[self.method]},
            "train": {
                "rounds": rounds, "local": {"steps": self.steps}, "batch_size": self.batch_size,
                "lr_scheduler_type": "constant",
            },
            "evaluate": {"rows": self.evaluated, "metric": "accuracy"},
        }  # fmt: skip
        return resolve(content | parts)
