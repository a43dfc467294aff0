"""What was trained, as one uses it: the adapters of a run, one adapter folder, or a model with one merged in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dfl_lora import hub
from dfl_lora.errors import UserError
from dfl_lora.models import adapters, folder
from dfl_lora.models.base import Files, load_tokenizer, locate
from dfl_lora.reading import load_recipe
from dfl_lora.recipe import Recipe
from dfl_lora.records import labels_of
from dfl_lora.run_directory import RECIPE

CONSENSUS = "consensus"
CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
CLASSIFIERS = ("ForSequenceClassification",)


@dataclass(frozen=True)
class Trained:
    """The adapters in a place and the base they go on."""

    place: Path
    adapters: Mapping[str, Path | None]
    """By whose they are, the consensus last; None is the model itself."""
    base: str
    """Of a name or a folder."""
    revision: str | None
    causal: bool
    """Whether they go on texts; else they tell labels."""
    labels: tuple[str, ...] | None
    """The names of the labels in the order of their numbers, where they are told."""
    recipe: Recipe | None
    """Of the run they are from, where that is at hand."""

    @property
    def is_run(self) -> bool:
        return (self.place / RECIPE).is_file()

    def files(self) -> Files:
        """Finds the base; raises where it is not to be had."""
        if folder.find(self.base) is None and not hub.settle("model", self.base):
            raise UserError(
                f"The base of {self.place}, {self.base}, is not here and cannot be fetched; give a folder that holds "
                "it with --base."
            )
        return locate(self.base, self.revision)

    def tokenizer(self, files: Files) -> PreTrainedTokenizerBase:
        """Returns the tokenizer of the base, or that which the adapters brought, since it has more words."""
        own = next(iter(self.adapters.values()))
        if own is None or not (own / "tokenizer.json").is_file():
            return load_tokenizer(files)
        return load_tokenizer(replace(files, path=own))


def names_of(peers: Sequence[int], consensus: bool) -> list[str]:
    """Returns the names of the adapters of peers and of the consensus."""
    return [*(f"peer-{peer:03d}" for peer in peers), *([CONSENSUS] if consensus else [])]


def open_trained(place: Path, base: str | None = None, whose: Sequence[str] = ()) -> Trained:
    """Finds what a run directory, an adapter folder or a model folder holds; `whose` adapters of a run (none: all)."""
    if (place / RECIPE).is_file():
        return of_run(place, base, whose)
    adapter, model = (place / adapters.CONFIG).is_file(), (place / "config.json").is_file()
    if not (adapter or model):
        raise UserError(
            f"{place} is no run directory ({RECIPE}), no adapter folder ({adapters.CONFIG}) and no model folder "
            "(config.json); give one of them."
        )
    if whose:
        raise UserError(
            f"--peer and --consensus choose among the adapters of a run, and {place} is "
            f"{'one adapter' if adapter else 'a model'}; leave them out."
        )
    if model and not adapter and base is not None:
        raise UserError(f"--base has no effect on {place}, which is a whole model; leave it out.")
    return of_adapter(place, base) if adapter else of_model(place)


def of_run(run: Path, base: str | None, whose: Sequence[str]) -> Trained:
    recipe = load_recipe(run / RECIPE)
    if recipe.task.kind == "toy":
        raise UserError(f"{run} is a run of the toy, which has no adapters; give a run on text.")
    there = adapters_in(run)
    if not there:
        raise UserError(f"{run} has no adapters yet: the run is not finished; end it with --resume.")
    for name in whose:
        if name not in there:
            raise UserError(f"{run} has no adapter {name}; it has {', '.join(there)}.")
    causal = recipe.task.kind == "causal_lm"
    return Trained(
        run,
        {name: path for name, path in there.items() if not whose or name in whose},
        base or recipe.model.name_or_path,
        None if base else recipe.model.revision,
        causal,
        None if causal else tuple(labels_of(run)),
        recipe,
    )


def adapters_in(run: Path) -> dict[str, Path]:
    """Returns the adapter folders of a run; in that of a federation of processes each peer has a run of its own."""
    peers = [path for place in ("peer-*/adapters", "adapters") for path in run.glob(f"{place}/peer-[0-9]*")]
    paths = [*sorted(peers, key=lambda path: path.name), run / "adapters" / CONSENSUS]
    return {path.name: path for path in paths if path.is_dir()}


def of_adapter(place: Path, base: str | None) -> Trained:
    """Opens an adapter folder; in a run directory it has the run's base and recipe."""
    config, _ = adapters.read_adapter(place)
    inside = place.resolve().parent
    run = inside.parent
    recipe = load_recipe(run / RECIPE) if inside.name == "adapters" and (run / RECIPE).is_file() else None
    name = base or (recipe.model.name_or_path if recipe else config.get("base_model_name_or_path"))
    if not name:
        raise UserError(f"{place} does not name its base; give its folder with --base.")
    causal = config.get("task_type") == adapters.CAUSAL
    revision = None if base else (recipe.model.revision if recipe else config.get("revision"))
    labels = tuple(labels_of(run)) if recipe and not causal else None
    return Trained(place, {place.resolve().name: place}, str(name), revision, causal, labels, recipe)


def of_model(place: Path) -> Trained:
    config = folder.read_config(place)
    architecture = str(next(iter(config.get("architectures") or []), "model without a head"))
    causal = architecture.endswith(CAUSAL_HEADS)
    if not causal and not architecture.endswith(CLASSIFIERS):
        raise UserError(
            f"{place} is a {architecture}; give a run directory, an adapter folder, or a model that tells labels "
            "(...ForSequenceClassification) or goes on texts (...ForCausalLM)."
        )
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # not written where they are these
    labels = None if causal else tuple(str(names[key]) for key in sorted(names, key=int))
    return Trained(place, {place.resolve().name: None}, str(place), None, causal, labels, None)
