"""`dfl-lora train`: the seed's command with the seed's flags, and its log."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dfl_lora.cli.interruption import resumable
from dfl_lora.cli.options import Json, Out, Overwrite, Resume, Settings, both
from dfl_lora.data.glue import TASKS
from dfl_lora.errors import UserError, nearest
from dfl_lora.recipe import GSM8K
from dfl_lora.topologies import TOPOLOGIES

SCHEDULES = {"LoRA": "lora", "DFL-LoRA": "freeze_a", "ConLoRA": "freeze_a"}


def train(
    context: typer.Context,
    model_checkpoint: Annotated[str, typer.Option(*both("model_checkpoint"), help="Base model: folder or hub name.")],
    dataset_path_template: Annotated[
        str, typer.Option(*both("dataset_path_template"), help="Each client's folder, with {i} or {} from 1.")
    ],
    val_dataset_path_template: Annotated[
        str, typer.Option(*both("val_dataset_path_template"), help="Validation data; may hold {i} or {}.")
    ],
    num_clients: Annotated[int, typer.Option(*both("num_clients"), min=1, help="Peers; 1 trains alone.")],
    lora_r: Annotated[int, typer.Option(*both("lora_r"), min=1, help="LoRA rank.")],
    lora_alpha: Annotated[
        float, typer.Option(*both("lora_alpha"), help="LoRA alpha; the product is scaled by alpha/r.")
    ],
    target_modules: Annotated[str, typer.Option(*both("target_modules"), help="Comma-separated module names.")],
    training_type: Annotated[
        Literal["LoRA", "DFL-LoRA", "ConLoRA"],
        typer.Option(*both("training_type"), help="DFL-LoRA (once ConLoRA) freezes A."),
    ],
    dataset_type: Annotated[str, typer.Option(*both("dataset_type"), help=f"The task: {', '.join(TASKS)}, {GSM8K}.")],
    name: Annotated[str, typer.Option("--name", help=f"Topology: {', '.join(TOPOLOGIES)}.")],
    num_rounds: Annotated[int, typer.Option(*both("num_rounds"), min=1, help="Rounds of one epoch each.")] = 256,
    batch_size: Annotated[
        int, typer.Option(*both("batch_size"), min=1, help="Rows of a step; of gsm8k 5, four times, unless given.")
    ] = 128,
    log_path: Annotated[Path, typer.Option(*both("log_path"), help="The log file.")] = Path("federated_training.log"),
    seed: Annotated[int, typer.Option("--seed", help="Names every draw of the run.")] = 0,
    settings: Settings = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train as the seed's script did: one epoch of Adam a round, in row order, heads private."""
    from dfl_lora.preflight import check_resume, preflight
    from dfl_lora.reading import resolve
    from dfl_lora.run_directory import check_log, prepare

    template = dataset_path_template
    if "{i}" not in template and "{}" not in template:
        raise UserError(f"--dataset_path_template is '{template}'; put {{i}} or {{}} where the client's number stands.")
    if dataset_type not in (*TASKS, GSM8K):
        hint = nearest(dataset_type, (*TASKS, GSM8K))
        raise UserError(f"--dataset_type is '{dataset_type}'; allowed are {', '.join(TASKS)}, {GSM8K}.{hint}")
    validation = val_dataset_path_template  # a bare name is a folder here, not a split
    validation = validation if "/" in validation else f"./{validation}"
    content = recipe_of(model_checkpoint, template, validation, num_clients, lora_r, lora_alpha)
    content["name"] = f"{dataset_type}-{training_type}-{name.partition('(')[0]}"
    content["lora"]["target_modules"] = targets(target_modules)
    content["task"]["name"] = dataset_type
    content["peers"]["topology"] = name
    content["method"]["schedule"] = SCHEDULES[training_type]
    content["train"] |= {"rounds": num_rounds, "batch_size": batch_size, "seed": seed}
    if dataset_type == GSM8K:
        source = context.get_parameter_source("batch_size")
        of_causal(content, given=source is not None and source.name != "DEFAULT")
    recipe = resolve(content, settings or (), "the flags")
    directory = out or Path(recipe.output.dir or f"runs/{recipe.name}")
    prepare(directory, resume, overwrite)
    check_log(log_path)
    preflight(recipe)
    if resume:
        check_resume(directory)
    with resumable(directory, resume):
        from dfl_lora.cli.screen import Screen
        from dfl_lora.cli.seed_log import SeedLog
        from dfl_lora.simulate import run_recipe

        with Screen(directory, quiet=as_json) as screen, SeedLog(log_path) as log:
            summary = run_recipe(recipe, directory, [screen, log], resume=resume, overwrite=overwrite)
    if as_json:
        print(json.dumps(summary))


def of_causal(content: dict[str, Any], *, given: bool) -> None:
    """Writes the seed's setting of GSM8K into a recipe; `given`: the rows of a step are what was asked for."""
    content["task"] = {"name": GSM8K, "max_length": 512}
    content["lora"]["lora_dropout"] = 0.1
    del content["method"]["head"]
    if not given:
        content["train"] |= {"batch_size": 5, "gradient_accumulation_steps": 4}


def targets(text: str) -> str | list[str]:
    """Returns the comma-separated module names, or the one word all-linear."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--target_modules is empty; name modules such as q_lin,v_lin.")
    return "all-linear" if names == ["all-linear"] else names


def recipe_of(model: str, train: str, validation: str, num_peers: int, r: int, alpha: float) -> dict[str, Any]:
    """Returns the seed's setting as a recipe: everything that its flags do not say."""
    return {
        "model": {"name_or_path": model},
        "lora": {"r": r, "lora_alpha": alpha},
        "task": {"truncation_side": "left"},
        "data": {"per_peer": train, "validation": validation},
        "peers": {"num_peers": num_peers},
        "method": {"head": "private"},
        "train": {
            "local": {"epochs": 1},
            "order": "seed",
            "shuffle": False,
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
        },
    }
