"""Graphs: who talks to whom, and named topologies (a graph for every round).

A graph is undirected, connected (unless it is `none`) and has no self loops; the weights live in
`mixing`. No torch here: a graph must be checked before anything heavy is loaded.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx

from dfl_lora.errors import UserError, nearest

Edge = tuple[int, int]


@dataclass(frozen=True)
class Graph:
    """An undirected graph over peers 0 ... num_peers - 1."""

    num_peers: int
    edges: frozenset[Edge]

    @staticmethod
    def of(num_peers: int, edges: Iterable[Sequence[int]]) -> "Graph":
        """Returns a checked graph: pairs of distinct peers within range, connected."""
        if num_peers < 1:
            raise UserError(f"A graph of {num_peers} peers was asked for; give at least 1.")
        pairs = set()
        for edge in edges:
            if len(edge) != 2 or not all(isinstance(v, int) and 0 <= v < num_peers for v in edge) or edge[0] == edge[1]:
                raise UserError(
                    f"The edge {list(edge)} is not a pair of different peers between 0 and {num_peers - 1}; "
                    "write edges as pairs such as [0, 1], or change peers.num_peers."
                )
            pairs.add((min(edge), max(edge)))
        graph = Graph(num_peers, frozenset(pairs))
        if not nx.is_connected(graph.networkx):
            groups = [sorted(g) for g in nx.connected_components(graph.networkx)]
            raise UserError(
                f"The graph is disconnected: it falls into {len(groups)} parts, one of them {groups[0]}; "
                "gossip never agrees across parts, so add edges between them."
            )
        return graph

    @cached_property
    def networkx(self) -> nx.Graph:
        graph: nx.Graph = nx.empty_graph(self.num_peers)
        graph.add_edges_from(sorted(self.edges))
        return graph

    @cached_property
    def _neighbours(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(self.networkx[i])) for i in range(self.num_peers))

    def neighbours(self, peer: int) -> tuple[int, ...]:
        """Returns the neighbours of a peer, in the order of their ids."""
        return self._neighbours[peer]

    def degree(self, peer: int) -> int:
        return len(self._neighbours[peer])


Topology = Callable[[int], Graph]
"""A graph for every round; a static one is `lambda t: graph`."""

GraphOf = Callable[[int], Graph]
"""A named graph: num_peers -> Graph."""


def ring(num_peers: int) -> Graph:
    """Peer i talks to i - 1 and i + 1."""
    return Graph.of(num_peers, [(i, (i + 1) % num_peers) for i in range(num_peers) if num_peers > 1])


def complete(num_peers: int) -> Graph:
    """Everyone talks to everyone: one exchange gives the server's average."""
    return Graph.of(num_peers, [(i, j) for i in range(num_peers) for j in range(i)])


def adjacency(*rows: str) -> GraphOf:
    """Returns a graph of fixed size from rows such as "1,2", the neighbours of peers 0, 1, ...; one peer is alone."""
    edges = [(i, int(j)) for i, row in enumerate(rows) for j in row.split(",")]

    def build(num_peers: int) -> Graph:
        if num_peers == 1:
            return ring(1)
        if num_peers != len(rows):
            raise UserError(
                f"This topology has {len(rows)} peers, but {num_peers} were asked for; "
                f"use {len(rows)} peers, or the topology ring, which takes any number."
            )
        return Graph.of(num_peers, edges)

    return build


GRAPHS: dict[str, GraphOf] = {
    "ring": ring,
    "complete": complete,
    "du14": adjacency("1,2", "0,2", "0,1,3", "2,4", "3,5", "4,6", "5"),
    "link3": adjacency("1,6", "0,2", "1,3", "2,4", "3,5", "4,6", "0,5"),
    "link4": adjacency("1,2,6", "0,2,3", "0,1,3", "1,2,4", "3,5,6", "4,6", "0,4,5"),
    "link5": adjacency("1,2,5,6", "0,2,3,6", "0,1,3,4", "1,2,4,5", "2,3,5,6", "0,3,4,6", "0,1,4,5"),
    "link6": adjacency("1,2,3,5,6", "0,2,3,4,5", "0,1,3,4,5", "0,1,2,4,5", "1,2,3,5,6", "0,1,2,3,4,6", "0,4,5"),
    "link7": adjacency(*[",".join(str(j) for j in range(7) if j != i) for i in range(7)]),
}
"""Graphs by name. du14 and link3 ... link7 are the seed's: the number counts the peer itself, so link3 is ring(7)."""


def named(name: str, num_peers: int) -> Graph:
    """Returns the graph of that name, or raises with the nearest one."""
    if name not in GRAPHS:
        raise UserError(f"Unknown topology '{name}'; allowed are {', '.join(GRAPHS)}.{nearest(name, GRAPHS)}")
    return GRAPHS[name](num_peers)


def read_numbers(path: Path) -> list[list[float]]:
    """Reads rows of numbers from a .json list of lists or a comma or blank separated text file."""
    try:
        text = path.read_text()
        if path.suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
                raise TypeError("it is not a list of lists")
            return [[float(v) for v in row] for row in rows]
        lines = [line.replace(",", " ").split() for line in text.splitlines()]
        return [[float(v) for v in line] for line in lines if line and not line[0].startswith("#")]
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"Cannot read rows of numbers from {path}: {error}; give a .json list of lists or a text file, "
            "one row a line, numbers separated by commas or blanks."
        ) from None


def read_edges(path: Path) -> list[list[int]]:
    """Reads an edge list, one pair of peers a row."""
    rows = read_numbers(path)
    if not all(len(row) == 2 and all(v.is_integer() for v in row) for row in rows):
        raise UserError(f"{path} is not an edge list; each row must be two peer numbers, such as 0,1.")
    return [[int(v) for v in row] for row in rows]
