"""Simulate all peers in this process: the network is the memory they share."""

from collections.abc import Sequence
from pathlib import Path

from dfl_lora.fitting import fitted
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.recipe import Recipe
from dfl_lora.run_directory import Line, held, prepare
from dfl_lora.running import Observer, build_for, open_run


def run_recipe(recipe: Recipe, run: Path, observers: Sequence[Observer], *, resume: bool, overwrite: bool) -> Line:
    """Runs a recipe to its end in directory `run` and returns the summary."""
    prepare(run, resume, overwrite)
    federation, network = fitted(build_for(recipe, run, resume=resume), recipe), MemoryNetwork()
    run.mkdir(parents=True, exist_ok=True)
    with held(run):
        prepare(run, resume, overwrite)
        running = open_run(federation, run, observers, resume=resume)
        running.begin(network)
        running.go(network)
        return running.end()
