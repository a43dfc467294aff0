"""One process of a federation: its peers of the recipe, on a network of real peers, with a run directory of its own.

The loop is that of a simulation. Before it the neighbours are waited for; after it what the other end of an edge did
not take in is taken back, and the adapters of the hosted peers are written: nobody here has a consensus to write.
"""

import hashlib
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dfl_lora.build import Federation
from dfl_lora.compatibility import check_method
from dfl_lora.errors import UserError
from dfl_lora.fitting import fitted
from dfl_lora.membership.identity import Identity
from dfl_lora.membership.reception import listen_at
from dfl_lora.membership.roster import Roster, read_roster, write_roster
from dfl_lora.networks.contract import Contract, Limits
from dfl_lora.networks.real import PeerNetwork
from dfl_lora.networks.refused_handshakes import Listening
from dfl_lora.node import Node
from dfl_lora.preflight import TOY, talks_of
from dfl_lora.recipe import Recipe
from dfl_lora.rounds import Record, take_back
from dfl_lora.run_directory import RECIPE, Line, held, prepare
from dfl_lora.running import Observer, Running, Start, build_for, open_run
from dfl_lora.watching import Look, Watch

INSECURE = "insecure: nothing is encrypted and nobody is who they say; for tests on one machine alone"
ELSEWHERE = "end the process that listens there, or change listen in the node file and the address in the roster"


@dataclass(frozen=True)
class Rounds:
    """Tells a watch of each round that is over."""

    watch: Watch

    def started(self, federation: Federation, lines: Sequence[Line], start: Start | None) -> None:
        self.watch.turn("running", len(lines))

    def finished_round(self, record: Record, line: Line) -> None:
        self.watch.turn("running", record.round)

    def ended(self, summary: Mapping[str, Any], run: Path) -> None: ...


def host(
    recipe: Recipe,
    node: Node,
    identity: Identity,
    roster: Roster,
    run: Path,
    observers: Sequence[Observer],
    tell: Callable[[str], None],
    *,
    resume: bool,
    overwrite: bool,
) -> Line:
    """Runs a node's peers of a recipe to the end in directory `run` and returns the summary; `tell` shows events."""
    check_method(recipe, *talks_of(recipe), real=True)
    open_more_files()
    prepare(run, resume, overwrite)
    federation = fitted(build_for(node.over(recipe), run, node.peers, resume=resume), recipe)
    if roster.recipe not in ("", federation.digest):
        raise UserError(
            f"The federation was founded on the recipe with digest {roster.recipe[:12]}, and here it is "
            f"{federation.digest[:12]}; take the recipe and the base model of the federation."
        )
    # where this machine's rows are stays in the node file: the recipe that is written down is everybody's
    shared = federation.recipe.model_copy(update={"data": recipe.data})
    federation = replace(federation, recipe=shared)
    run.mkdir(parents=True, exist_ok=True)
    with held(run):
        prepare(run, resume, overwrite)
        goes_on = resume and (run / RECIPE).exists()  # then nothing is lost, and perhaps nobody needs to listen
        if node.listen is not None and not goes_on:  # before anything is written, or an older run is replaced
            listen_at(node.listen, ELSEWHERE).close()
        contract = contract_of(federation)
        running = open_run(federation, run, observers, resume=resume)
        about = {
            "name": shared.name, "recipe_digest": federation.digest, "rounds": shared.train.rounds,
            "member": identity.id, "peers": node.peers, "listen": node.listen, "insecure": node.insecure,
        }  # fmt: skip
        with Watch(run, about, tell) as watch:
            running.observers = (*observers, Rounds(watch))
            if node.insecure:
                watch.happened({"event": "warning", "member": None, "peers": [], "why": INSECURE})
            take_part(running, node, identity, roster, contract, watch)
            return running.end()


def open_more_files() -> None:
    """Lets this process open as many files as the system lets it: each link is one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def take_part(
    running: Running, node: Node, identity: Identity, roster: Roster, contract: Contract, watch: Watch
) -> None:
    """Runs the rounds that are left with the neighbours, and settles with them what the last one left open."""
    applied = [tuple(edge) for edge in running.kept.get("applied", ())]
    if running.kept.get("settled"):
        return running.announce()
    f = running.federation
    assemble_s = node.grace_s if running.done else node.assemble_s  # the others may be gone by then
    limits = Limits(node.deadline_s, node.grace_s, assemble_s, node.norm_bound)
    network = PeerNetwork(
        identity, roster, node.peers, f.topology.union, contract, limits,
        listen=node.listen, insecure=node.insecure, observe=watch.happened,
        keep=lambda newer: keep(node.roster_path, newer), applied=applied, first=running.next_round,
    )  # fmt: skip
    with Listening(lambda who: watch.happened(refused(who))), network, watch.of(looking(network, node.roster_path)):
        watch.turn("assembling", len(running.lines))
        network.assemble()
        running.begin(network)
        running.go(network, lambda: {"applied": network.applied()})
        watch.turn("settling", len(running.lines))
        take_back(f.peers, network.finish(), f.method)
        running.save({"applied": network.applied(), "settled": True})
    return None


def looking(network: PeerNetwork, path: Path) -> Look:
    """Returns a look at the network, which first adopts the roster in the file where somebody was admitted there."""
    read = 0

    def look() -> Mapping[str, Any]:
        nonlocal read
        with suppress(OSError, UserError):  # a file that cannot be read now is read later
            written = path.stat().st_mtime_ns
            if written != read:
                network.adopt(read_roster(path))
                read = written
        return network.snapshot()

    return look


def refused(who: str) -> Mapping[str, Any]:
    """Returns the event of a stranger whose handshake failed."""
    return {"event": "refused", "member": None, "peers": [], "why": who}


def contract_of(federation: Federation) -> Contract:
    """Returns what all members must agree on: before a checkpoint is loaded all peers stand at the start."""
    base = federation.export.files.weights if federation.export else TOY
    return Contract(federation.digest, base, digest_of(federation.peers.common.flat), digest_of(federation.peers.x[0]))


def digest_of(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().cpu().numpy().tobytes()).hexdigest()


def keep(path: Path, newer: Roster) -> None:
    """Writes down a roster that came from a neighbour, unless the file has a later one by now."""
    if newer.supersedes(read_roster(path)):
        write_roster(path, newer)
