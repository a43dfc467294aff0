"""What can be known to be wrong with a recipe before anything heavy is loaded: said within a second, not a minute.

It looks as far as is cheap: at the graph and its matrix, at options without effect, at the files of the base model
(never at its weights), at columns, labels and numbers of rows. Where it cannot tell it says nothing, since everything
is checked again when it is loaded. No torch, transformers, peft or datasets here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfl_lora import hub, mixing
from dfl_lora.compatibility import check_method
from dfl_lora.data import labels, partition
from dfl_lora.data.formats import format_of
from dfl_lora.data.glance import MANY, Glance, glance
from dfl_lora.data.glue import TASKS, Columns
from dfl_lora.data.places import check_alone, check_column, check_text, is_alone, is_local, peer_path
from dfl_lora.errors import UserError
from dfl_lora.graphs import complete
from dfl_lora.latest import read_latest
from dfl_lora.mixing import Mixing
from dfl_lora.models import folder
from dfl_lora.participation import num_present
from dfl_lora.reading import load_recipe
from dfl_lora.recipe import GSM8K, Recipe, is_path
from dfl_lora.run_directory import RECIPE, held, read_lines
from dfl_lora.topologies import OWN_WEIGHTS, Topology, topology_of

TOY, TOY_DATA, TOY_ROWS, TOY_HELD_OUT = "toy", "builtin/toy", 1400, 400
TOY_MODULES = folder.Modules({"encoder.first": 8, "encoder.second": 16, "classifier": 16})
WITHOUT_EFFECT = {
    "model": ("revision",),
    "task": ("name", "text", "label", "labels", "max_length", "truncation_side"),
    "data": ("config", "train", "validation", "per_peer"),
}
"""Keys that mean nothing to the toy."""
Labelled = tuple[tuple[str, ...], partition.Rows]
"""The names of the labels, and the label of every row."""
LOOKED_AT = 64
"""Peers with rows of their own at whose tables one looks; that they exist is checked of all."""
SHORT = 8
"""Tokens of a row below which it is counted whether the special tokens leave room for any word."""


def preflight(recipe: Recipe, ids: Sequence[int] | None = None, *, real: bool = False) -> None:
    """Raises one sentence where a cheap look tells that a recipe cannot run, hosting the peers `ids` (None: all).

    `real`: other processes host the other peers.
    """
    hosted = range(recipe.peers.num_peers) if ids is None else ids
    check_method(recipe, *talks_of(recipe), real=real)
    check_participation(recipe)
    check_toy(recipe)
    check_attention(recipe)
    if recipe.task.kind == "toy":
        check_shares(recipe, Glance((), toy_rows(recipe) - TOY_HELD_OUT, no_column, {}), None)
        check_targets(TOY_MODULES, recipe)
    elif recipe.task.kind == "causal_lm":
        check_partition(recipe)
        check_labels_asked(recipe)
        check_model(recipe, 1)
        check_held_out(recipe)
        check_causal_rows(recipe, hosted)
    else:
        columns = text_columns(recipe)
        check_partition(recipe)
        check_model(recipe, len(columns.text))
        check_rows(recipe, columns, hosted)


def check_resume(run: Path) -> None:
    """Raises where a run cannot go on: it is going on, or its recipe, its checkpoint or its lines are damaged."""
    if not (run / RECIPE).exists():
        return
    with held(run):
        load_recipe(run / RECIPE)
        latest = read_latest(run / "checkpoint")
        read_lines(run, int(latest["round"]) if latest else 0)


def talks_of(recipe: Recipe) -> tuple[Topology, Mixing]:
    """Returns the graphs of all rounds and the weights on them, which an exact mean and sums bring themselves."""
    peers, wanted = recipe.peers, recipe.peers.topology
    topology = topology_of(wanted.of(peers.num_peers))
    weights = weights_of(wanted.kind, wanted.options, peers.mixing)
    if recipe.method.mixer.kind == "exact":
        return topology_of(complete(peers.num_peers)), mixing.uniform
    if recipe.method.mixer.kind == "relay_sum":
        return topology, mixing.sums
    return topology, weights


def weights_of(kind: str, options: Mapping[str, Any], name: str) -> Mixing:
    """Returns the weights on the graphs of a topology: those it brings, or those of that name."""
    if kind == "matrix":
        return mixing.given(options["rows"])
    return mixing.own if kind in OWN_WEIGHTS else mixing.MIXINGS[name]


def check_toy(recipe: Recipe) -> None:
    """Raises where a recipe mixes the toy with text, or says of the toy what has no effect on it."""
    if (recipe.task.kind == "toy") != (recipe.model.name_or_path == TOY) or (recipe.data.path == TOY_DATA) != (
        recipe.task.kind == "toy"
    ):
        raise UserError(
            f"task.kind toy goes with model.name_or_path {TOY} and data.path {TOY_DATA}, and only with them."
        )
    for part, keys in WITHOUT_EFFECT.items() if recipe.task.kind == "toy" else ():
        given, fields = getattr(recipe, part), type(getattr(recipe, part)).model_fields
        for key in keys:
            if getattr(given, key) != fields[key].default:
                raise UserError(f"{part}.{key} has no effect on the toy, which makes its own data; remove it.")


def check_participation(recipe: Recipe) -> None:
    """Raises where a share of the peers is all of them."""
    num_peers, share = recipe.peers.num_peers, recipe.peers.participation
    if share < 1 and num_present(num_peers, share) == num_peers:
        raise UserError(
            f"peers.participation {share:g} has no effect: of {num_peers} peers that is all in every round; "
            "use a smaller share, or remove it."
        )


def check_attention(recipe: Recipe) -> None:
    if recipe.train.dropout and recipe.compute.attention == "sdpa":
        raise UserError("compute.attention sdpa cannot draw dropout from the peers' streams; use eager or auto.")


def text_columns(recipe: Recipe) -> Columns:
    """Returns the columns of a known task, or those the recipe names."""
    task = recipe.task
    if task.name is not None:
        for key, value in (("text", task.text), ("labels", task.labels)):
            if value is not None:
                raise UserError(
                    f"task.{key} has no effect with task.name {task.name}, which sets it; remove one of them."
                )
        known = TASKS[task.name]
        return Columns(known.text, task.label, known.names, known.metric)
    text = [task.text] if isinstance(task.text, str) else (task.text or ["sentence"])
    if len(text) > 2:
        raise UserError(f"task.text names {len(text)} columns; give one, or two for pairs.")
    return Columns(tuple(text), task.label, None if task.labels is None else tuple(task.labels))


def check_partition(recipe: Recipe) -> None:
    """Raises where rows that are not shared out are to be partitioned."""
    how = recipe.data.partition
    if recipe.data.per_peer is not None and (how.kind, how.min_size, how.seed) != ("iid", 1, None):
        raise UserError(
            "data.partition has no effect with data.per_peer, where each peer has its own rows; remove one."
        )


def check_model(recipe: Recipe, num_texts: int) -> None:
    """Looks at the files of the base model: family, tokenizer, and whether the targets are among its modules."""
    name = recipe.model.name_or_path
    found = folder.find(name)
    if found is None:
        if is_local(name):
            raise folder.no_model(name, "there is no such folder")
        if not hub.settle("model", name):
            raise folder.no_model(name, hub.NOT_HERE)
        return
    path, known_as = found
    if recipe.model.revision is not None:
        raise UserError(f"model.revision has no effect on '{name}', which is here and not on the hub; remove it.")
    weights, config = folder.weights_in(path, name), folder.read_config(path)
    folder.check_family(config, known_as, recipe.task.kind)
    folder.check_tokenizer(path)
    causal = recipe.task.kind == "causal_lm"
    check_targets(
        folder.decoder_modules(weights) if causal else folder.modules_in(weights, config["model_type"]), recipe
    )
    limit = recipe.task.max_length
    if limit <= SHORT and (special := folder.special_tokens(path, num_texts == 2)) is not None:
        folder.check_room(limit, special)


def check_targets(modules: folder.Modules, recipe: Recipe) -> None:
    lora = recipe.lora
    modules.check(lora.target_modules)
    modules.check_rank(lora.target_modules, lora.r, orthonormal=lora.init != "kaiming")


def check_rows(recipe: Recipe, columns: Columns, hosted: Sequence[int]) -> None:
    """Looks at the rows of training and of validation: where they are, columns, labels, and how many."""
    data, num_peers = recipe.data, recipe.peers.num_peers
    if data.per_peer is not None:
        check_each("data.per_peer", data.per_peer, hosted)
        paths = [peer_path(data.per_peer, i) for i in hosted[:LOOKED_AT]]
    else:
        paths = [str(data.path)]
    tables = {path: glance(path, data.config, data.train) for path in paths}
    found = {path: look(table, columns, path) for path, table in tables.items() if table is not None}
    known = [labelled for labelled in found.values() if labelled is not None]
    everything = len(known) == (1 if data.per_peer is None else num_peers)
    names = labels.common_names([own for own, _ in known]) if everything else columns.names
    if everything:
        labels.check_several({name for pair in known for name in labels.occurring(*pair)}, paths[0])
    if data.per_peer is None and (shared := tables[paths[0]]) is not None:
        check_shares(recipe, shared, known[0][1] if known else None)
    check_held_out(recipe)
    check_validation(recipe, columns, names, hosted)


def toy_rows(recipe: Recipe) -> int:
    """Returns the rows of the toy: those that are held out, and enough for each peer to have one."""
    return max(TOY_ROWS, TOY_HELD_OUT + recipe.peers.num_peers)


def check_shares(recipe: Recipe, table: Glance, ids: partition.Rows | None) -> None:
    """Raises where the rows of a table cannot be shared out; `ids` are its labels, None where they are not known."""
    how, num_rows, num_peers = recipe.data.partition, table.num_rows, recipe.peers.num_peers
    if num_rows is None:
        return
    partition.enough(num_rows, num_peers, how.min_size)
    if recipe.task.kind == "toy" and how.kind in partition.GROUPS:
        raise UserError(f"data.partition {how.kind} groups texts, and the toy has none; use another.")
    if how.kind in partition.GROWTH:
        partition.check_growth(how.kind, num_rows, num_peers, how.min_size)
    elif how.kind == "saved":
        partition.saved_for(num_rows, num_peers, **how.options)
    values = {}
    if how.kind == "natural":
        if recipe.task.kind != "toy":
            check_column(table.columns, how.options["column"], str(recipe.data.path))
        values = {how.options["column"]: table.read(how.options["column"])}
    told = None not in values.values() and (ids is not None or how.kind in ("quantity", "shards", "natural"))
    if how.kind in partition.LIGHT and num_rows <= MANY and told:
        labels = np.zeros(num_rows, dtype=np.int64) if ids is None else ids
        share_out(recipe, partition.Table(labels, lambda name: values[name] or ()))


def share_out(recipe: Recipe, table: partition.Table) -> list[partition.Rows]:
    """Returns the row numbers of each peer."""
    how, seed = recipe.data.partition, partition_seed(recipe)
    parts: list[partition.Rows] = how.of(table, recipe.peers.num_peers, seed, how.min_size)
    return parts


def partition_seed(recipe: Recipe) -> int:
    """Returns the seed that rows are shared out by."""
    how = recipe.data.partition
    return int(recipe.train.seed if how.seed is None else how.seed)


def check_held_out(recipe: Recipe) -> None:
    """Raises where peers would be evaluated on the rows they are trained on."""
    data = recipe.data
    same_split = data.per_peer is None and data.validation == data.train
    source = Path(str(data.per_peer or data.path)).expanduser()
    own = is_path(data.validation) and Path(data.validation).expanduser() == source
    if same_split or (own and is_alone(Path(peer_path(str(source), 0)))):
        raise UserError(
            f"data.validation '{data.validation}' is what peers are trained on, so that nothing is told of rows they "
            "have not seen; give other rows, or slices such as train[:90%] and train[90%:]."
        )


def check_validation(recipe: Recipe, columns: Columns, names: tuple[str, ...] | None, hosted: Sequence[int]) -> None:
    """Looks at the rows on which peers are evaluated; `names` are the labels of the rows of training."""
    data = recipe.data
    if not is_path(data.validation):
        if is_alone(Path(str(data.path)).expanduser()):
            check_alone(str(data.path), data.validation)
        held_out = {str(data.path): glance(str(data.path), data.config, data.validation)}
    else:
        check_each("data.validation", data.validation, hosted)
        paths = [peer_path(data.validation, i) for i in hosted[:LOOKED_AT]]
        held_out = {path: glance(path, None, "validation") for path in dict.fromkeys(paths)}
    for path, table in held_out.items():
        if table is not None:
            look(table, columns, path, names)


def held_out_split(recipe: Recipe) -> str:
    """Returns the split of a path of its own that peers are evaluated on; GSM8K has none for validation."""
    return "test" if recipe.task.name == GSM8K else "validation"


def check_labels_asked(recipe: Recipe) -> None:
    """Raises where rows without labels are to be shared out by label."""
    how = recipe.data.partition
    if recipe.data.per_peer is None and how.kind in partition.BY_LABEL:
        others = ", ".join(name for name in partition.PARTITIONS if name not in partition.BY_LABEL)
        raise UserError(f"data.partition {how.kind} is by label, and rows of causal_lm have none; use {others}.")


def check_causal_rows(recipe: Recipe, hosted: Sequence[int]) -> None:
    """Looks at the columns of the rows of training and of validation, and at how many of them there are."""
    data, asked = recipe.data, recipe.task.format
    if data.per_peer is not None:
        check_each("data.per_peer", data.per_peer, hosted)
    trained = [peer_path(data.per_peer, i) for i in hosted[:LOOKED_AT]] if data.per_peer else [str(data.path)]
    for path in trained:
        table = glance(path, data.config, data.train)
        if table is not None:
            format_of(table.columns, asked, path)
            if data.per_peer is None:
                check_shares(recipe, table, None)
    if is_path(data.validation):
        check_each("data.validation", data.validation, hosted)
        places = {peer_path(data.validation, i) for i in hosted[:LOOKED_AT]}
        tables = [(path, glance(path, None, held_out_split(recipe))) for path in sorted(places)]
    else:
        tables = [(str(data.path), glance(str(data.path), data.config, data.validation))]
    for path, table in tables:
        if table is not None:
            format_of(table.columns, asked, path)


def check_each(key: str, template: str, hosted: Sequence[int]) -> None:
    """Raises with the first peer whose own rows are not there, where those of a peer are in this place at all."""
    paths = [peer_path(template, i) for i in hosted]
    there = [Path(path).expanduser().exists() for path in paths]
    if len(set(paths)) > 1 and not all(there) and (any(there) or is_local(template)):
        k = there.index(False)
        raise UserError(
            f"{key}: there is no '{paths[k]}', the rows of peer {hosted[k]} ({hosted[k] + 1} in the template); "
            f"put them there, or change the template or the number of peers ({len(hosted)} here)."
        )


def look(table: Glance, columns: Columns, path: str, names: tuple[str, ...] | None = None) -> Labelled | None:
    """Checks the columns of a table and its labels, which must be among `names`; returns the names and the labels."""
    labelled = None
    check_column(table.columns, columns.label, path)
    values, own = table.read(columns.label), table.class_labels.get(columns.label)
    if values is not None:
        given = labels.checked(values, columns.label, path)
        names = names or labels.names_of(given, own, columns, path)
        labelled = names, labels.numbers_of(given, own, names, columns.label, path)
    for name in columns.text:
        check_column(table.columns, name, path)
        check_text(table.read(name) or [], name, path)
    return labelled


def no_column(name: str) -> list[object]:
    raise UserError(f"The toy has no column '{name}'; use a partition by label or by size.")
