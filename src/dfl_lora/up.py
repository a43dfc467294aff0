"""A whole federation on this machine: a process for each peer of a recipe, which talk over loopback with mutual TLS.

DIR/peer-000/node ...  keys, roster and node file of each, made anew at each start, so that no two starts share a run
                       id; the organiser's key is thrown away. output.txt has what the process says
DIR/peer-000 ...       their run directories             DIR   what they leave together (gathering.py)

Ports must be in the signed roster before anybody listens. They are drawn below those that the system gives to calls
going out, tried all at once and let go again; where one is taken nevertheless, the federation is founded again.
Each process has max(1, processors / peers) threads, unless the recipe says how many. No process outlives this one:
their standard input is a pipe from it (companion.py).
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dfl_lora import machine
from dfl_lora.build import Federation
from dfl_lora.files import remove, write_atomically
from dfl_lora.gathering import Rounds, folder_of, gather, tail
from dfl_lora.membership.identity import create_identity
from dfl_lora.membership.roster import Member, first_roster, write_roster
from dfl_lora.recipe import Recipe
from dfl_lora.run_directory import NODE, RECIPE, Line, held, prepare
from dfl_lora.running import Observer, build_for, open_run
from dfl_lora.strict_yaml import yaml_text

HOST = "127.0.0.1"
LOWEST_PORT, OUTGOING = 10_000, Path("/proc/sys/net/ipv4/ip_local_port_range")
OUTPUT = "output.txt"
STARTS = 3
"""Of a federation, where a port was taken."""
TAKEN = "Cannot listen at"
LOOK_S, PATIENCE_S = 0.2, 15.0


class Onlooker(Observer, Protocol):
    """Who watches a federation."""

    def tell(self, line: Line, furthest: int) -> None:
        """All peers have finished a round; the fastest has finished round `furthest`."""
        ...

    def happened(self, sentence: str) -> None: ...


class PortTaken(Exception):
    """A port was free when it was drawn, and no more when its process began to listen."""


def up(recipe: Recipe, run: Path, screen: Onlooker, *, resume: bool, overwrite: bool) -> Line:
    """Runs each peer of a recipe in a process of its own, and returns the summary of the federation in `run`."""
    prepare(run, resume, overwrite)
    federation = build_for(with_threads(recipe), run, resume=resume)
    run.mkdir(parents=True, exist_ok=True)
    with held(run):
        prepare(run, resume, overwrite)
        running = open_run(federation, run, [screen], resume=resume)
        running.announce()
        for start in range(1, STARTS + 1):
            try:
                carry_out(federation, run, screen, resume=resume)
                break
            except PortTaken:
                if start == STARTS:
                    raise
        return gather(running)


def with_threads(recipe: Recipe) -> Recipe:
    """Returns the recipe with as many threads as each process has for itself, where it does not say how many."""
    if recipe.compute.threads != "auto":
        return recipe
    threads = max(1, int(machine.processors()) // recipe.peers.num_peers)
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"threads": threads})})


def carry_out(federation: Federation, run: Path, screen: Onlooker, *, resume: bool) -> None:
    """Founds the federation, runs its processes to their end, and raises where one of them failed."""
    found(federation, run)
    peers, threads = federation.peers.ids, int(federation.recipe.compute.threads)
    with processes(run, peers, threads, resume) as started:
        household = Household(run, screen, started, Rounds(run, peers))
        while household.at_work and not household.hopeless:
            sleep(LOOK_S)
            household.look()
        household.look()
    household.check()


@dataclass
class Household:
    """The processes of a federation, and how far they are."""

    run: Path
    screen: Onlooker
    started: Mapping[int, "subprocess.Popen[bytes]"]
    rounds: Rounds
    failed: dict[int, int] = field(default_factory=dict)
    """Exit codes by peer."""

    @property
    def at_work(self) -> bool:
        return any(process.poll() is None for process in self.started.values())

    @property
    def hopeless(self) -> bool:
        """Tells whether one failed before any had finished a round: its neighbours would wait for it to come."""
        return bool(self.failed) and not self.rounds.furthest

    def look(self) -> None:
        """Tells of the rounds that are over and of the processes that have failed since the last look."""
        for peer, process in self.started.items():
            code = process.poll()
            if code and peer not in self.failed:
                said = tail(folder_of(self.run, peer) / NODE / OUTPUT)
                if TAKEN in said and not self.rounds.furthest:
                    raise PortTaken(said)
                self.failed[peer] = code
                self.screen.happened(f"peer {peer} ended with exit code {code}; it said last:\n{said}")
        for line in self.rounds.read(without=self.failed):
            self.screen.tell(line, self.rounds.furthest)

    def check(self) -> None:
        """Raises where a process failed."""
        if self.failed:
            others = "no round was over, so all were stopped" if self.hopeless else "the others went on without it"
            said = ", ".join(f"peer {peer} (exit code {code})" for peer, code in sorted(self.failed.items()))
            raise RuntimeError(f"{said} did not reach the end; {others}. See {self.run}/peer-*/{NODE}/{OUTPUT}.")


@contextmanager
def processes(
    run: Path, peers: Sequence[int], threads: int, resume: bool
) -> Iterator[Mapping[int, "subprocess.Popen[bytes]"]]:
    """Starts a process for each peer; when the block ends, however it does, those that are left are ended."""
    started = dict[int, subprocess.Popen[bytes]]()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        for peer in peers:
            folder = folder_of(run, peer)
            words = ["peer", run / RECIPE, "--node", folder / NODE / "node.yaml", "--out", folder]
            with (folder / NODE / OUTPUT).open("wb") as output:
                started[peer] = subprocess.Popen(
                    [sys.executable, "-m", "dfl_lora.companion", *map(str, words), *(["--resume"] if resume else [])],
                    stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0,
                )  # fmt: skip
        yield started
    finally:
        end(list(started.values()))


def end(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Asks the processes that are left to end, and after a while makes them; an interruption makes them at once."""
    try:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until = monotonic() + PATIENCE_S
        while any(process.poll() is None for process in started) and monotonic() < until:
            sleep(LOOK_S / 4)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin:
                process.stdin.close()


def found(federation: Federation, run: Path) -> None:
    """Makes the keys of all peers, one signed roster, and the node files."""
    identities, members = [], []
    for peer, port in zip(federation.peers.ids, free_ports(len(federation.peers)), strict=True):
        folder = folder_of(run, peer) / NODE
        remove(folder)
        folder.mkdir(parents=True)
        identities.append(create_identity(folder / "identity"))
        members.append(Member.of(identities[-1], [peer], [f"{HOST}:{port}"]))
    roster = first_roster(Ed25519PrivateKey.generate(), federation.digest, federation.topology.num_peers, members)
    compute = federation.recipe.compute.model_dump(mode="json")
    for member in members:
        folder = folder_of(run, member.peers[0]) / NODE
        write_roster(folder / "roster.json", roster)
        node = {"peers": list(member.peers), "listen": member.addresses[0], "compute": compute, "output": ".."}
        write_atomically(folder / "node.yaml", yaml_text(node).encode())


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens at, drawn below those that calls going out take."""
    try:
        first_outgoing = int(OUTGOING.read_text().split()[0])
    except (OSError, ValueError):
        first_outgoing = 49152
    below = range(LOWEST_PORT, max(first_outgoing, 2 * LOWEST_PORT))
    ports = list[int]()
    with ExitStack() as tried:
        while len(ports) < count:
            port = LOWEST_PORT + secrets.randbelow(len(below))
            listening = tried.enter_context(socket.socket())
            try:
                listening.bind((HOST, port))
            except OSError:
                continue
            ports.append(port)
    return ports
