"""Graphs: who talks to whom, and named ones.

A graph is undirected and has no self loops; a named one is connected (unless it is `none`). Weights live in `mixing`,
unless a graph brings its own. No torch here: a graph must be checked before anything heavy is loaded. A graph that is
drawn depends on its name, its options and the number of peers alone: every machine draws the same one.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from math import isqrt, nan
from pathlib import Path
from random import Random
from typing import Annotated, TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dfl_lora.choices import Positive, Share
from dfl_lora.errors import UserError

Edge = tuple[int, int]
Rows = TypeVar("Rows", list[list[int]], list[list[float]])
AtLeastTwo = Annotated[int, Field(ge=2)]
Even = Annotated[int, Field(ge=2, multiple_of=2)]
Probability = Annotated[float, Field(ge=0, le=1)]
DENSE = 2048
"""Up to so many peers W and L are written out, and all their eigenvalues are known."""
MATRIX = 4_000_000
"""Restarts of Lanczos times the number of peers, some seconds, after which an eigenvalue is not known."""
DRAWS = 100
"""A random graph is drawn at most this often until it is connected."""


@dataclass(frozen=True)
class Graph:
    """An undirected graph over peers 0 ... num_peers - 1."""

    num_peers: int
    edges: frozenset[Edge]
    weights: tuple[float, ...] = ()
    """Those of the sorted edges, where a graph brings its own."""

    @staticmethod
    def of(num_peers: int, edges: Iterable[Sequence[int]]) -> "Graph":
        """Returns a checked graph: pairs of distinct peers within range, connected."""
        if num_peers < 1:
            raise UserError(f"A graph of {num_peers} peers was asked for; give at least 1.")
        pairs = set()
        for edge in edges:
            if not is_pair(edge, num_peers):
                raise UserError(
                    f"The edge {list(edge)} is not a pair of different peers between 0 and {num_peers - 1}; "
                    "write edges as pairs such as [0, 1], or change peers.num_peers."
                )
            i, j = edge
            pairs.add((i, j) if i < j else (j, i))
        graph = Graph(num_peers, frozenset(pairs))
        if not graph.connected:
            groups = [sorted(g) for g in nx.connected_components(graph.networkx)]
            some = f"[{', '.join(map(str, groups[0][:10]))}{', ...' if len(groups[0]) > 10 else ''}]"
            raise UserError(
                f"The graph is disconnected: it falls into {len(groups)} parts, one of them {some}; "
                "gossip never agrees across parts, so add edges between them."
            )
        return graph

    def among(self, present: Collection[int]) -> "Graph":
        """Returns the same peers with only the edges both of whose ends are present; it may be disconnected."""
        here = frozenset(present)
        edges = frozenset((i, j) for i, j in self.edges if i in here and j in here)
        return Graph(self.num_peers, edges, tuple(w for edge, w in self.weight.items() if edge in edges))

    @cached_property
    def networkx(self) -> nx.Graph:
        graph = nx.empty_graph(self.num_peers)
        graph.add_edges_from(self.edges)
        return graph

    @cached_property
    def connected(self) -> bool:
        return bool(nx.is_connected(self.networkx))

    @cached_property
    def max_degree(self) -> int:
        return max(map(len, self._neighbours))

    @cached_property
    def laplacian_eigenvalues(self) -> NDArray[np.float64]:
        """The eigenvalues of L = D - A, smallest first: as many zeros as the graph has parts."""
        return np.sort(np.asarray(nx.laplacian_spectrum(self.networkx, weight=None), dtype=np.float64))

    @cached_property
    def largest_laplacian_eigenvalue(self) -> float:
        """The last of them; of more than DENSE peers by Lanczos."""
        if self.num_peers <= DENSE or not self.edges:
            return float(self.laplacian_eigenvalues[-1])
        sparse = nx.laplacian_matrix(self.networkx, weight=None).astype(np.float64)
        return extreme(sparse.dot, self.num_peers, "LA")

    @cached_property
    def weight(self) -> Mapping[Edge, float]:
        """The own weight of every edge; empty where the graph brings none."""
        return dict(zip(sorted(self.edges), self.weights, strict=True)) if self.weights else {}

    @cached_property
    def _neighbours(self) -> tuple[tuple[int, ...], ...]:
        found = [list[int]() for _ in range(self.num_peers)]
        for i, j in sorted(self.edges):
            found[i].append(j)
            found[j].append(i)
        return tuple(map(tuple, found))

    def neighbours(self, peer: int) -> tuple[int, ...]:
        """Returns the neighbours of a peer, in the order of their ids."""
        return self._neighbours[peer]

    def degree(self, peer: int) -> int:
        return len(self._neighbours[peer])


def extreme(times: Callable[[NDArray[np.float64]], NDArray[np.float64]], size: int, which: str) -> float:
    """Returns an eigenvalue of a symmetric matrix given by its product with a vector; nan where Lanczos finds none.

    `which` is LM, the largest modulus, or LA, the largest. The same matrix gives the same number.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    operator = LinearOperator((size, size), matvec=times, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    try:
        found = eigsh(
            operator, 1, which=which, v0=start, ncv=60, tol=1e-10, maxiter=MATRIX // size, return_eigenvectors=False
        )
    except ArpackNoConvergence:
        return nan
    return float(found[0])


def is_pair(edge: Sequence[int], num_peers: int) -> bool:
    """Says whether an edge joins two different peers of a graph."""
    if len(edge) != 2 or not (isinstance(edge[0], int) and isinstance(edge[1], int)):
        return False
    return edge[0] != edge[1] and 0 <= edge[0] < num_peers and 0 <= edge[1] < num_peers


GraphOf = Callable[..., Graph]
"""A named graph: (num_peers, *, options) -> Graph. One peer is alone under every name."""


def ring(num_peers: int) -> Graph:
    """Peer i talks to i - 1 and i + 1."""
    return Graph.of(num_peers, [(i, (i + 1) % num_peers) for i in range(num_peers) if num_peers > 1])


def line(num_peers: int) -> Graph:
    """Peer i talks to i - 1 and i + 1; the two ends have one neighbour."""
    return Graph.of(num_peers, [(i, i + 1) for i in range(num_peers - 1)])


def star(num_peers: int) -> Graph:
    """Everyone talks to peer 0 only."""
    return Graph.of(num_peers, [(0, i) for i in range(1, num_peers)])


def complete(num_peers: int) -> Graph:
    """Everyone talks to everyone: one exchange gives the server's average."""
    return Graph.of(num_peers, combinations(range(num_peers), 2))


def none(num_peers: int) -> Graph:
    """Nobody talks to anybody: each peer learns alone."""
    return star(num_peers).among(())


def torus(num_peers: int, *, rows: AtLeastTwo | None = None, columns: AtLeastTwo | None = None) -> Graph:
    """A grid of rows and columns whose borders meet: four neighbours each. Unless given, it is the most square one."""
    if num_peers < 2:
        return Graph.of(num_peers, ())
    widest = max(i for i in range(1, isqrt(num_peers) + 1) if num_peers % i == 0)
    high = rows or (num_peers // columns if columns else widest)
    wide = columns or num_peers // high
    if high * wide != num_peers or min(high, wide) < 2:
        raise UserError(
            f"{num_peers} peers make no torus of {rows or 'at least 2'} rows and {columns or 'at least 2'} columns; "
            "change their number to rows x columns, or use the topology ring."
        )
    return of_networkx(nx.grid_2d_graph(high, wide, periodic=True))


def hypercube(num_peers: int) -> Graph:
    """Peers talk whose numbers differ in one binary digit; the number of peers is a power of two."""
    dimension = max(num_peers, 1).bit_length() - 1
    if num_peers > 1 and num_peers != 2**dimension:
        raise UserError(
            f"A hypercube of {num_peers} peers was asked for; their number must be a power of two, "
            f"such as {2**dimension} or {2 ** (dimension + 1)}, or use the topology exponential."
        )
    return Graph.of(num_peers, [(i, i ^ 1 << k) for i in range(num_peers) for k in range(dimension)])


def exponential(num_peers: int) -> Graph:
    """Peer i talks to i - 2^k and i + 2^k for every 2^k below the number of peers: few steps to everyone."""
    if num_peers < 2:
        return Graph.of(num_peers, ())
    return of_networkx(nx.circulant_graph(num_peers, [1 << k for k in range((num_peers - 1).bit_length())]))


def clusters(num_peers: int, *, count: AtLeastTwo = 2, bridges: Positive = 1) -> Graph:
    """Groups in which everyone talks to everyone; each is joined to the next by bridges, the last to the first.

    The peers are shared out in order, in groups whose sizes differ by at most one.
    """
    if num_peers < 2:
        return Graph.of(num_peers, ())
    if count * bridges > num_peers:
        raise UserError(
            f"{num_peers} peers are too few for {count} clusters joined by {bridges} bridges each, which need "
            f"{count * bridges}; lower count or bridges, or add peers."
        )
    starts = [num_peers * g // count for g in range(count + 1)]
    groups = [range(start, end) for start, end in pairwise(starts)]
    inside = [edge for group in groups for edge in combinations(group, 2)]
    joined = [(groups[g], groups[(g + 1) % count]) for g in range(count if count > 2 else 1)]
    return Graph.of(num_peers, [*inside, *((a[-1 - k], b[k]) for a, b in joined for k in range(bridges))])


def random_regular(num_peers: int, *, degree: AtLeastTwo = 4, seed: int = 0) -> Graph:
    """Everyone has the same number of neighbours, drawn at random: sparse, and yet it mixes fast."""
    if num_peers > 1 and (degree >= num_peers or degree * num_peers % 2):
        raise UserError(
            f"{num_peers} peers of degree {degree} each make no graph; the degree must be below the number of peers, "
            "and one of the two must be even."
        )
    sparse = min(degree, num_peers - 1 - degree)  # networkx takes minutes to draw the last edges of a dense one

    def draw(random: Random) -> nx.Graph:
        graph = nx.random_regular_graph(sparse, num_peers, seed=random)
        return graph if sparse == degree else nx.complement(graph)

    return drawn(num_peers, f"random_regular(degree={degree}, seed={seed})", draw)


def erdos_renyi(num_peers: int, *, p: Share = 0.3, seed: int = 0) -> Graph:
    """Each pair talks with probability p, drawn once."""
    name = f"erdos_renyi(p={p}, seed={seed})"
    return drawn(num_peers, name, lambda random: nx.fast_gnp_random_graph(num_peers, p, seed=random))


def small_world(num_peers: int, *, neighbours: Even = 4, p: Probability = 0.1, seed: int = 0) -> Graph:
    """A ring of peers that talk to their nearest neighbours, each edge moved elsewhere with probability p."""
    enough(num_peers, "small_world", "neighbours", neighbours)
    name = f"small_world(neighbours={neighbours}, p={p}, seed={seed})"
    return drawn(num_peers, name, lambda random: nx.watts_strogatz_graph(num_peers, neighbours, p, seed=random))


def barabasi(num_peers: int, *, m: Positive = 2, seed: int = 0) -> Graph:
    """Peers come one by one and choose m others, popular ones rather: a few hubs with many neighbours."""
    enough(num_peers, "barabasi", "m", m)
    name = f"barabasi(m={m}, seed={seed})"
    return drawn(num_peers, name, lambda random: nx.barabasi_albert_graph(num_peers, m, seed=random))


def enough(num_peers: int, name: str, option: str, value: int) -> None:
    """Checks that a peer can have that many neighbours, unless it is alone."""
    if value >= num_peers > 1:
        raise UserError(
            f"{name}({option}={value}) needs more than {value} peers, and {num_peers} were asked for; "
            f"lower {option}, or add peers."
        )


def drawn(num_peers: int, name: str, draw: Callable[[Random], nx.Graph]) -> Graph:
    """Returns the first connected graph of at most 100 draws, each from a seed of its own."""
    if num_peers < 2:
        return Graph.of(num_peers, ())
    for attempt in range(DRAWS):
        graph = draw(Random(f"{name} {num_peers} {attempt}"))
        if nx.is_connected(graph):
            return of_networkx(graph)
    raise UserError(
        f"{name} of {num_peers} peers was disconnected in each of {DRAWS} draws; give options that make more edges."
    )


def of_networkx(graph: nx.Graph) -> Graph:
    """Returns a graph of networkx, its nodes numbered in their order."""
    numbers = {node: i for i, node in enumerate(graph)}
    return Graph.of(len(numbers), [(numbers[a], numbers[b]) for a, b in graph.edges])


def adjacency(*rows: str) -> GraphOf:
    """Returns a graph of fixed size from rows such as "1,2", the neighbours of peers 0, 1, ...; one peer is alone."""
    edges = [(i, int(j)) for i, row in enumerate(rows) for j in row.split(",")]

    def build(num_peers: int) -> Graph:
        """A published graph, of a fixed number of peers."""
        if num_peers < 2:
            return Graph.of(num_peers, ())
        if num_peers != len(rows):
            raise UserError(
                f"This topology has {len(rows)} peers, but {num_peers} were asked for; "
                f"use {len(rows)} peers, or the topology ring, which takes any number."
            )
        return Graph.of(num_peers, edges)

    return build


def from_edges(num_peers: int, *, edges: list[list[int]] | None = None, path: str | None = None) -> Graph:
    """The edges themselves, pairs of peers, or a file of them, two peers a row."""
    pairs = given_or_read("edges", "edges", edges, path, read_edges)
    return Graph.of(num_peers, pairs if num_peers > 1 else ())


def from_rows(num_peers: int, *, rows: list[list[float]] | None = None, path: str | None = None) -> Graph:
    """The rows of W themselves, or a file of them, one a line; weights that are not zero make the edges."""
    w = square(given_or_read("matrix", "rows", rows, path, read_numbers))
    if num_peers < 2:
        return Graph.of(num_peers, ())
    if len(w) != num_peers:
        raise UserError(
            f"The matrix is of {len(w)} peers, but num_peers is {num_peers}; "
            "give as many rows and columns as peers, or change their number."
        )
    return Graph.of(num_peers, [(int(i), int(j)) for i, j in np.argwhere(np.triu((w != 0) | (w.T != 0), 1))])


def given_or_read(name: str, option: str, given: Rows | None, path: str | None, read: Callable[[Path], Rows]) -> Rows:
    """Returns what was given, or what the file holds: exactly one of the two."""
    if given is not None and path is None:
        return given
    if given is None and path is not None:
        return read(Path(path))
    both = "both were" if path is not None else "neither was"
    raise UserError(f"The topology {name} needs exactly one of {option} and path, and {both} given.")


def square(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Returns rows of numbers as a matrix, or raises if they are not square."""
    if not rows or any(len(row) != len(rows) for row in rows):
        lengths = sorted({len(row) for row in rows})
        raise UserError(f"The matrix has {len(rows)} rows of {lengths} numbers; it must be square.")
    return np.asarray(rows, dtype=np.float64)


GRAPHS: Mapping[str, GraphOf] = {
    "ring": ring,
    "line": line,
    "star": star,
    "complete": complete,
    "torus": torus,
    "hypercube": hypercube,
    "exponential": exponential,
    "clusters": clusters,
    "random_regular": random_regular,
    "erdos_renyi": erdos_renyi,
    "small_world": small_world,
    "barabasi": barabasi,
    "du14": adjacency("1,2", "0,2", "0,1,3", "2,4", "3,5", "4,6", "5"),
    "link3": adjacency("1,6", "0,2", "1,3", "2,4", "3,5", "4,6", "0,5"),
    "link4": adjacency("1,2,6", "0,2,3", "0,1,3", "1,2,4", "3,5,6", "4,6", "0,4,5"),
    "link5": adjacency("1,2,5,6", "0,2,3,6", "0,1,3,4", "1,2,4,5", "2,3,5,6", "0,3,4,6", "0,1,4,5"),
    "link6": adjacency("1,2,3,5,6", "0,2,3,4,5", "0,1,3,4,5", "0,1,2,4,5", "1,2,3,5,6", "0,1,2,3,4,6", "0,4,5"),
    "link7": adjacency(*[",".join(str(j) for j in range(7) if j != i) for i in range(7)]),
    "none": none,
    "edges": from_edges,
    "matrix": from_rows,
}
"""Graphs by name. du14 and link3 ... link7 are the seed's: the number counts the peer itself, so link3 is ring(7)."""


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
