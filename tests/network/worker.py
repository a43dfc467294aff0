"""A member in a process of its own: it does toy rounds when it is told to, and tells all that happens in lines of JSON.

Standard input has a command a line, standard output an event or an answer a line. The rounds are the loop's own `mix`
over a real `PeerNetwork`, after a step that everybody can compute.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dfl_lora.codecs.frames import Frame
from dfl_lora.graphs import Graph
from dfl_lora.membership.identity import load_identity
from dfl_lora.membership.roster import read_roster
from dfl_lora.networks import Arrived, Network
from dfl_lora.networks.contract import Contract, Limits
from dfl_lora.networks.real import PeerNetwork
from dfl_lora.networks.refused_handshakes import Listening
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix, take_back
from dfl_lora.schedules import SCHEDULES
from dfl_lora.tensors import Layout, Tensors

CONTRACT = Contract("a" * 64, "b" * 64, "c" * 64, "d" * 64)


@dataclass(frozen=True)
class Present:
    """Delivers at once between the peers that are there: what real peers should come to."""

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        return Arrived({i: {j: outgoing[j] for j in graph.neighbours(i) if j in outgoing} for i in outgoing})


class Toy:
    """Peers that make a step drawn by peer and round, and mix."""

    def __init__(self, graph: Graph, hosted: Sequence[int], size: int) -> None:
        layout = Layout.of({"m.A": ("A", (size, 2)), "m.B": ("B", (2, size))})
        start = Tensors(torch.zeros(layout.size), layout)
        self.graph, self.t = graph, 0
        self.peers = Peers(sorted(hosted), start, Tensors(torch.zeros(0), Layout.of({})))
        self.method = Method(SCHEDULES["lora"]("shared"), lambda t: graph)

    def round(self, network: Network) -> None:
        """Does one round."""
        self.t += 1
        for n, peer in enumerate(self.peers):
            generator = torch.Generator().manual_seed(1000 * self.t + peer.id)
            self.peers.x[n] += torch.randn(self.peers.x.shape[1], generator=generator)
        mix(self.peers, self.method.schedule(self.t), self.graph, self.t, self.method, network)

    def leave(self, id: int) -> None:
        """Goes on without a peer."""
        stay = [n for n, peer in enumerate(self.peers) if peer.id != id]
        x, self.peers = (
            self.peers.x[stay],
            Peers([self.peers.ids[n] for n in stay], Tensors(self.peers.x[0], self.peers.layout), self.peers.common),
        )
        self.peers.x.copy_(x)

    def digests(self) -> dict[str, str]:
        """Returns what the peers have come to, to the bit."""
        rows = zip(self.peers, self.peers.x, strict=True)
        return {str(peer.id): hashlib.sha256(row.numpy().tobytes()).hexdigest() for peer, row in rows}


def say(line: Mapping[str, Any]) -> None:
    os.write(1, json.dumps({"time": time.monotonic(), **line}).encode() + b"\n")


def look(network: PeerNetwork, listening: Listening) -> dict[str, Any]:
    own = psutil.Process()
    return {
        "network": network.snapshot(),
        "handshakes": dict(listening.counts),
        "rss": own.memory_info().rss,
        "fds": own.num_fds(),
        "threads": own.num_threads(),
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    identity, roster = load_identity(Path(spec["identity"])), read_roster(Path(spec["roster"]))
    graph = Graph(roster.num_peers, frozenset((i, j) for i, j in spec["edges"]))
    toy = Toy(graph, spec["hosted"], spec["size"])
    limits = Limits(**spec["limits"])
    network = PeerNetwork(
        identity, roster, spec["hosted"], graph, CONTRACT, limits, listen=spec["listen"], insecure=False, observe=say
    )
    with Listening(lambda why: say({"event": "refused", "member": None, "why": why})) as listening, network:
        say({"answer": "ready", "port": network.port})
        for line in sys.stdin:
            said = json.loads(line)
            if said["do"] == "end":
                break
            if said["do"] == "rounds":
                network.conversation.limits = Limits(**{**spec["limits"], **said.get("limits", {})})
                start = time.monotonic()
                for _ in range(said["count"]):
                    toy.round(network)
                seconds = time.monotonic() - start
                say({"answer": "rounds", "round": toy.t, "digests": toy.digests(), "seconds": seconds})
            else:
                say({"answer": "look", **look(network, listening)})
        take_back(toy.peers, network.finish(), toy.method)
    say({"answer": "end", "digests": toy.digests()})


if __name__ == "__main__":
    main()
