"""A small graph for every row of the table: seven peers where the row can, each drawn or given once."""

from typing import Any

from dfl_lora.graphs import GRAPHS, Graph

SIZES = {"torus": 12, "hypercube": 8}
EDGES = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [1, 4]]
CIRCLE = [[0.5 if i == j else 0.25 if (i - j) % 7 in (1, 6) else 0.0 for j in range(7)] for i in range(7)]
OPTIONS: dict[str, dict[str, Any]] = {"edges": {"edges": EDGES}, "matrix": {"rows": CIRCLE}, "clusters": {"count": 3}}


def example(name: str) -> Graph:
    """Returns the graph of that name that the tests look at."""
    return GRAPHS[name](SIZES.get(name, 7), **OPTIONS.get(name, {}))


EXAMPLES = {name: example(name) for name in GRAPHS}
CONNECTED = {name: graph for name, graph in EXAMPLES.items() if name != "none"}
SEVEN = {name: graph for name, graph in CONNECTED.items() if graph.num_peers == 7}
