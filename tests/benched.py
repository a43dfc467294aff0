"""A tiny base and tiny rows, as the benchmark takes them."""

from pathlib import Path

from dfl_lora.bench.cells import Cell, Material, MethodName
from dfl_lora.bench.suite import Scope
from encoders import write_encoder
from tiny import labelled

SCOPE = Scope(
    name="bench-tiny",
    minutes=5,
    batches={4: 2},
    weights={"4": 1.0, "flower 4": 0.1, "memory": 0.1, "mixing": 0.1, "scale": 0.1, "grid": 1.0},
    repeats=1,
    ablations=False,
    flower=("tuned",),
    memory=False,
    grid_peers=(1, 7),
    most_tokens=64,
    toy_peers=(),
    minilm_peers=(),
)


def tiny_material(folder: Path) -> Material:
    """Writes a tiny BERT and rows into a folder, once, and returns both."""
    from datasets import Dataset

    if not (folder / "bert").exists():
        write_encoder("bert", folder / "bert")
        for name, rows in (("train", labelled(300)), ("validation", labelled(40, "validation"))):
            Dataset.from_list(rows).to_pandas().to_csv(folder / f"{name}.csv", index=False)
    files = str(folder / "train.csv"), str(folder / "validation.csv")
    return Material("tiny rows", files[0], validation=files[1], model=str(folder / "bert"), r=2)


def tiny_cell(method: MethodName, steps: int = 2, rows: int = 4) -> Cell:
    return Cell(method, 3, rows, steps, {"kind": "iid"})
