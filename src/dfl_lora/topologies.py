"""Topologies: a graph for every round. The same one, several in turn, or one drawn anew in each round.

A single round may leave peers alone or apart: what connects is the union of the rounds. Round 1 has the first graph of
a cycle, so that a topology which is exact after m rounds is so after rounds 1 to m. What is drawn depends on the name
of the topology, its options, the number of peers and the round alone: every machine draws the same, and a run that goes
on draws what it would have drawn. Weights come from the mixing (under metropolis two that meet in a pair take half of
each other), but for those of `matrix` and `base`, which bring their own.

Sources: base, see `base_graph`; one_peer_exponential, the undirected form of the one-peer graph of Ying et al.,
"Exponential Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021, arXiv 2110.13363;
random_matching, as in Boyd, Ghosh, Prabhakar, Shah, "Randomized Gossip Algorithms", 2006, with all pairs at once;
epidemic, de Vos et al., "Epidemic Learning", NeurIPS 2023, arXiv 2310.01972.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random

import networkx as nx

from dfl_lora.base_graph import base as base_rounds
from dfl_lora.choices import Positive, Share
from dfl_lora.errors import UserError
from dfl_lora.graphs import GRAPHS, Edge, Graph, complete, enough

ROUNDS = 50
"""So many rounds of a topology that is drawn are looked at before a run, and their union must be connected."""
EDGES = 200_000
"""Fewer rounds are looked at where they would have more edges than that."""
OWN_WEIGHTS = frozenset({"matrix", "base"})
"""The topologies that bring their own W."""


@dataclass(frozen=True)
class Topology:
    """A graph for every round, from round 1 on."""

    num_peers: int
    graph: Callable[[int], Graph]
    cycle: int | None = 1
    """How many graphs come in turn; None: each is drawn."""

    def __call__(self, t: int) -> Graph:
        return self.graph(t)

    @property
    def changes(self) -> bool:
        return self.cycle != 1

    @cached_property
    def num_looked_at(self) -> int:
        """The first so many rounds stand for all: a cycle, or some that are drawn."""
        return self.cycle or max(2, min(ROUNDS, EDGES // max(1, len(self(1).edges))))

    def looked_at(self) -> Iterator[Graph]:
        """Yields the graphs of these rounds."""
        return map(self, range(1, self.num_looked_at + 1))

    @cached_property
    def union(self) -> Graph:
        """Who may ever talk to whom: what a network links. Of a topology that is drawn, everybody to everybody."""
        if not self.changes:
            return self(1)
        if self.cycle is None:
            return complete(self.num_peers)
        return Graph(self.num_peers, frozenset[Edge]().union(*(graph.edges for graph in self.looked_at())))

    def __str__(self) -> str:
        if self.cycle is None:
            return "another graph drawn in every round"
        if self.changes:
            return f"{self.cycle} graphs in turn"
        edges = len(self(1).edges)
        return f"{edges} edge{'' if edges == 1 else 's'}"


def topology_of(made: Graph | Topology) -> Topology:
    """Returns what a row of the table made as a topology; a graph is the same in every round."""
    return made if isinstance(made, Topology) else Topology(made.num_peers, lambda t: made)


def in_turn(graphs: Sequence[Graph]) -> Topology:
    """Returns the topology of graphs that come in turn, the first in round 1."""
    return Topology(graphs[0].num_peers, lambda t: graphs[(t - 1) % len(graphs)], len(graphs))


def base(num_peers: int, *, k: Positive = 1) -> Topology:
    """At most k partners in a round, other ones in the next, and the exact mean of any number of peers after a few."""
    if num_peers < 2:
        return alone(num_peers)
    enough(num_peers, "base", "k", k)
    return in_turn([weighted(num_peers, edges) for edges in base_rounds(num_peers, k)])


def weighted(num_peers: int, edges: Iterable[tuple[int, int, float]]) -> Graph:
    """Returns a graph that brings its own weights."""
    weights = dict(sorted((pair(i, j), weight) for i, j, weight in edges))
    return Graph(num_peers, frozenset(weights), tuple(weights.values()))


def one_peer_exponential(num_peers: int) -> Topology:
    """Peers meet in pairs whose numbers differ in one binary digit, another in each round; exact after all digits.

    The published graph is directed: there peer i sends to i + 2^t, and its number may be any.
    """
    if num_peers < 2:
        return alone(num_peers)
    digits = num_peers.bit_length() - 1
    if num_peers != 2**digits:
        raise UserError(
            f"A one-peer exponential graph of {num_peers} peers was asked for; their number must be a power of two, "
            f"such as {2**digits} or {2 ** (digits + 1)}, or use the topology base, which takes any number."
        )
    rounds = [frozenset((i, i | 1 << d) for i in range(num_peers) if not i >> d & 1) for d in range(digits)]
    return in_turn([Graph(num_peers, edges) for edges in rounds])


def random_matching(num_peers: int, *, seed: int = 0) -> Topology:
    """All peers meet in pairs that are drawn anew in each round; of an odd number one stays alone."""

    def draw(random: Random) -> Iterator[Edge]:
        order = random.sample(range(num_peers), num_peers)
        return map(pair, order[::2], order[1::2])

    return anew(num_peers, f"random_matching(seed={seed})", draw)


def random_edges(num_peers: int, *, p: Share = 0.3, seed: int = 0) -> Topology:
    """Each pair talks with probability p, drawn anew in each round: contacts that come and go."""

    def draw(random: Random) -> Iterator[Edge]:
        return (pair(i, j) for i, j in nx.fast_gnp_random_graph(num_peers, p, seed=random).edges)

    return anew(num_peers, f"random_edges(p={p}, seed={seed})", draw)


def epidemic(num_peers: int, *, s: Positive = 2, seed: int = 0) -> Topology:
    """Each peer draws s others anew in each round, and two talk where either drew the other.

    The published one is directed: a peer sends to those it drew and takes in from those who drew it, which keeps the
    mean on average only. Here both ends take in, and the mean stays; a peer has 2 s neighbours on average, at most.
    """
    enough(num_peers, "epidemic", "s", s)

    def draw(random: Random) -> Iterator[Edge]:
        drawn = ((i, j) for i in range(num_peers) for j in random.sample(range(num_peers - 1), s))
        return (pair(i, j + (j >= i)) for i, j in drawn)

    return anew(num_peers, f"epidemic(s={s}, seed={seed})", draw)


def alone(num_peers: int) -> Topology:
    """Returns the topology of one peer; raises where there are fewer."""
    return topology_of(Graph.of(num_peers, ()))


def pair(i: int, j: int) -> Edge:
    return (i, j) if i < j else (j, i)


def anew(num_peers: int, name: str, draw: Callable[[Random], Iterable[Edge]]) -> Topology:
    """Returns the topology that draws each round from a seed of its own; raises where ROUNDS of them do not connect."""
    if num_peers < 2:
        return alone(num_peers)

    @lru_cache(maxsize=2)
    def graph(t: int) -> Graph:
        return Graph(num_peers, frozenset(draw(Random(f"{name} {num_peers} {t}"))))

    parts, together = num_peers, nx.utils.UnionFind()
    for t in range(1, ROUNDS + 1):
        for i, j in graph(t).edges:
            parts -= together[i] != together[j]
            together.union(i, j)
        if parts == 1:
            return Topology(num_peers, graph, None)
    raise UserError(
        f"{name} of {num_peers} peers leaves {parts} parts that never meet in {ROUNDS} rounds; "
        "give options that make more edges."
    )


TOPOLOGIES: Mapping[str, Callable[..., Graph | Topology]] = {
    **GRAPHS,
    "base": base,
    "one_peer_exponential": one_peer_exponential,
    "random_matching": random_matching,
    "random_edges": random_edges,
    "epidemic": epidemic,
}
"""Topologies by name: (num_peers, *, options) -> the graph of all rounds, or a topology."""
