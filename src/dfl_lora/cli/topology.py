"""`dfl-lora topology NAME`: a graph, its W and how fast its peers agree, before any run."""

import json
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfl_lora.cli.options import Json
from dfl_lora.errors import UserError, nearest
from dfl_lora.mixing import MIXINGS
from dfl_lora.topologies import OWN_WEIGHTS, TOPOLOGIES, topology_of

if TYPE_CHECKING:
    from dfl_lora.graphs import Graph
    from dfl_lora.mixing import Matrix, Mixing
    from dfl_lora.topologies import Topology

MOST_PEERS = 1000
"""W is held and its eigenvalues are computed whole."""
LONGEST = 60
"""Letters of a name in the title and in the name of the file."""
MOST_ROWS = 16
"""With more peers, neither neighbours nor weights are printed."""


def topology(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"{', '.join(TOPOLOGIES)}; options as in 'clusters(count=3)'.")
    ],
    peers: Annotated[int, typer.Option("--peers", min=1, max=MOST_PEERS, help="How many peers.")] = 7,
    mixing: Annotated[
        str | None, typer.Option("--mixing", help=f"The weights W: {', '.join(MIXINGS)}; default metropolis.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The picture, .png, .svg or .pdf; default topology-NAME.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a graph, its W and its spectrum, and say how fast its peers agree.

    Where the graph changes from round to round: all edges, and the mean of W, of a cycle or of some rounds drawn.
    """
    from dfl_lora.mixing import expected_profile, matrix
    from dfl_lora.report import spectrum

    picture = out or (None if as_json else Path(f"topology-{file_name(name)}.png"))
    if picture is not None:
        spectrum.check_place(picture)
    who, weights, of_whom = chosen(name, peers, mixing)
    about = {"topology": name, "mixing": of_whom, "cycle": who.cycle}
    if who.changes:
        graph, w = merged(who, weights)
        facts = {**about, **facts_of_changing(who, weights, graph, w)}
    else:
        graph, w = who(1), matrix(who(1), weights)
        facts = {**about, **facts_of(graph, w), "expected_profile": expected_profile(graph, weights)}
    if picture is not None:
        panels = spectrum.OF_ROUNDS if who.changes else spectrum.OF_ONE
        spectrum.picture(graph, w, f"{shortened(name)}, {peers} peers", caption(facts), picture, panels)
    if as_json:
        print(json.dumps(finite({**facts, "w": w.tolist()})))
    else:
        show(graph, w, facts)
        print(f"picture: {picture}")


def chosen(name: str, num_peers: int, mixing: str | None) -> "tuple[Topology, Mixing, str]":
    """Returns the topology, its mixing, and what the mixing is called."""
    from dfl_lora.choices import choice
    from dfl_lora.preflight import weights_of
    from dfl_lora.reading import parse
    from dfl_lora.recipe import Topology as Wanted

    if mixing is not None and mixing not in MIXINGS:
        raise UserError(f"--mixing is '{mixing}'; allowed are {', '.join(MIXINGS)}.{nearest(mixing, MIXINGS)}")
    wanted = parse(choice(TOPOLOGIES, "link3", Wanted), name, "topology")
    own = wanted.kind in OWN_WEIGHTS
    if own and mixing is not None:
        raise UserError(
            f"The topology {wanted.kind} brings its own weights, and --mixing {mixing} was given; leave it out."
        )
    called = mixing or "metropolis"
    topology = topology_of(wanted.of(num_peers))
    return topology, weights_of(wanted.kind, wanted.options, called), "its own weights" if own else called


def merged(topology: "Topology", weights: "Mixing") -> "tuple[Graph, Matrix]":
    """Returns all edges, and the mean of W, of the rounds that are looked at."""
    import numpy as np

    from dfl_lora.graphs import Graph
    from dfl_lora.mixing import matrix

    n, edges = topology.num_peers, set[tuple[int, int]]()
    total = np.zeros((n, n))
    for graph in topology.looked_at():
        edges |= graph.edges
        total += matrix(graph, weights)
    return Graph(n, frozenset(edges)), total / topology.num_looked_at


def facts_of(graph: "Graph", w: "Matrix") -> dict[str, Any]:
    """Returns what is known of a graph and its W; inf is what never happens."""
    import networkx as nx

    from dfl_lora import mixing

    return {
        "num_peers": graph.num_peers,
        "num_edges": len(graph.edges),
        "degrees": [graph.degree(i) for i in range(graph.num_peers)],
        "diameter": nx.diameter(graph.networkx, usebounds=True) if graph.connected else float("inf"),
        "spectral_gap": mixing.gap(w),
        "rho": mixing.rho(w),
        "rounds_to_a_thousandth": mixing.rounds_to(w, 1e-3),
        "exact_in": mixing.exact_in(graph),
        "messages": mixing.messages(graph),
        "chebyshev": {str(k): mixing.chebyshev_contraction(w, k) for k in (3, 8)},
        "expected_consensus": mixing.expected_consensus(w),
        "eigenvalues": sorted(mixing.eigenvalues(w).tolist(), reverse=True),
        "neighbours": [list(graph.neighbours(i)) for i in range(graph.num_peers)],
    }


def facts_of_changing(topology: "Topology", weights: "Mixing", graph: "Graph", w: "Matrix") -> dict[str, Any]:
    """Returns what is known of a topology whose graph changes: of all rounds, of their edges, and of the mean of W."""
    from dfl_lora.outlook import outlook

    predicted, of_edges = outlook(topology, weights), facts_of(graph, w)
    return {
        **of_edges,
        "num_rounds": predicted.num_rounds,
        "spectral_gap": 1.0 - predicted.rho,
        "rho": predicted.rho,
        "rounds_to_a_thousandth": predicted.rounds_to_a_thousandth,
        "exact_in": predicted.exact_in,
        "messages": predicted.messages,
        "chebyshev": {},
        "expected_consensus": predicted.expected_consensus,
        "expected_profile": predicted.expected_profile,
        "rounds": [sorted(graph.edges) for graph in topology.looked_at()],
    }


def spoken(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the facts as a person reads them."""
    degrees, left = facts["degrees"], facts["chebyshev"]
    least, most = min(degrees), max(degrees)
    plain = {k: number(facts["rho"] ** int(k)) for k in left}
    of_the_ring = f"{number(facts['expected_profile'])} x the ring's"
    return {
        "edges": f"{facts['num_edges']}{over(facts)} ({number(facts['messages'])} messages a round)",
        "degree": str(least) if least == most else f"{least} to {most}, {sum(degrees) / len(degrees):.3g} on average",
        "diameter": number(facts["diameter"]),
        "mixing": facts["mixing"],
        "spectral gap": f"{number(facts['spectral_gap'])} (rho {number(facts['rho'])})",
        "rounds to 1e-3": number(facts["rounds_to_a_thousandth"], "never"),
        f"{exchanges(facts)} to the exact mean": number(facts["exact_in"], "never"),
        **{f"left after {k}, Chebyshev": f"{number(left[k])} (plain {plain[k]})" for k in left},
        "expected consensus": f"{number(facts['expected_consensus'])} ({of_the_ring})",
    }


def caption(facts: Mapping[str, Any]) -> str:
    """Returns the line below the picture."""
    said = (
        f"edges: {facts['num_edges']}{over(facts)}",
        f"mixing: {facts['mixing']}",
        f"diameter: {number(facts['diameter'])}",
        f"rounds to 1e-3: {number(facts['rounds_to_a_thousandth'], 'never')}",
        f"{exchanges(facts)} to the exact mean: {number(facts['exact_in'], 'never')}",
        f"expected consensus: {number(facts['expected_profile'])} x the ring's",
    )
    return "   ·   ".join(said)


def over(facts: Mapping[str, Any]) -> str:
    """Returns in how many rounds the edges are, where that is not one."""
    return f" over {facts['num_rounds']} rounds" if "num_rounds" in facts else ""


def exchanges(facts: Mapping[str, Any]) -> str:
    """Returns what is counted until peers are at the mean: polynomials of one graph, or rounds as they are."""
    return "rounds" if "num_rounds" in facts else "exchanges"


def show(graph: "Graph", w: "Matrix", facts: Mapping[str, Any]) -> None:
    """Prints the facts, and for few peers the neighbours and W."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dfl_lora.report.spectrum import short

    console = Console(highlight=False)
    table = Table("", escape(f"{shortened(facts['topology'])}, {graph.num_peers} peers"))
    for fact, value in spoken(facts).items():
        table.add_row(fact, value)
    console.print(table)
    if graph.num_peers <= MOST_ROWS:
        rows = Table("peer", "neighbours")
        for i in range(graph.num_peers):
            rows.add_row(str(i), ", ".join(map(str, graph.neighbours(i))) or "nobody")
        console.print(rows)
        if "rounds" in facts and facts["cycle"]:
            in_turn = Table("round", "who talks")
            for t, edges in enumerate(facts["rounds"], 1):
                in_turn.add_row(str(t), "  ".join(f"{i}-{j}" for i, j in edges))
            console.print(in_turn)
        if "rounds" in facts:
            print("the mean of W over the rounds")
        print("W ", *(f"{j:>3}" for j in range(len(w))))
        for i, row in enumerate(w):
            print(f"{i:<2}", *(f"{short(v) if v else '·':>3}" for v in row))


def number(value: float, endless: str = "infinite") -> str:
    return endless if not isfinite(value) else str(value) if isinstance(value, int) else f"{value:.4g}"


def finite(value: Any) -> Any:
    """Returns what JSON can hold: null where there is no finite number."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def file_name(name: str) -> str:
    """Returns a name with options as a part of a file's name: erdos_renyi(p=0.3) as erdos_renyi-p-0.3."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")[:LONGEST] or "graph"


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
