"""From a finished run to what others load: one adapter folder, or the base with it merged in."""

import shutil
from pathlib import Path

from dfl_lora.errors import UserError
from dfl_lora.files import new_folder
from dfl_lora.models import adapters
from dfl_lora.models.plain import merge
from dfl_lora.records import labels_of
from dfl_lora.trained import open_trained


def export_run(run: Path, name: str, to: Path, merged: bool, base: str | None = None) -> None:
    """Writes adapter `name` of a run to a folder, which appears whole or not at all.

    Merged, it is merged into the run's base, or into `base` where that lies elsewhere now.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run directory: it has no recipe.yaml.")
    source = run / "adapters" / name
    if not source.is_dir():  # a federation of processes: each peer has a run directory of its own
        source = run / name / "adapters" / name
    if not source.is_dir():
        there = sorted({f.name for place in ("adapters", "peer-*/adapters") for f in run.glob(f"{place}/[cp]*")})
        raise UserError(
            f"{run} has no adapter {name}; it has {', '.join(there) or 'none yet: the run is not finished'}."
        )
    adapters.read_adapter(source)
    with new_folder(to) as partial:
        if merged:
            merge(source, open_trained(run, base, [name]).files(), labels_of(run), partial)
        else:
            shutil.copytree(source, partial, dirs_exist_ok=True)
