"""From a finished run to what others load: one adapter folder, or the base with it merged in."""

import shutil
from pathlib import Path

from dfl_lora.errors import UserError
from dfl_lora.files import new_folder
from dfl_lora.models import adapters
from dfl_lora.models.base import locate
from dfl_lora.models.plain import merge
from dfl_lora.reading import load_recipe
from dfl_lora.records import labels_of


def export_run(run: Path, name: str, to: Path, merged: bool) -> None:
    """Writes adapter `name` of a run to a folder, which appears whole or not at all."""
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
            recipe = load_recipe(run / "recipe.yaml")
            merge(source, locate(recipe.model.name_or_path, recipe.model.revision), labels_of(run), partial)
        else:
            shutil.copytree(source, partial, dirs_exist_ok=True)
