"""Who talks to whom."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora.errors import UserError
from dfl_lora.graphs import (
    GRAPHS,
    Graph,
    adjacency,
    barabasi,
    clusters,
    complete,
    erdos_renyi,
    exponential,
    from_edges,
    from_rows,
    hypercube,
    line,
    none,
    random_regular,
    read_edges,
    read_numbers,
    ring,
    small_world,
    star,
    torus,
)
from example_graphs import CONNECTED, EDGES, EXAMPLES, OPTIONS

EXACT_SIZE = ["du14", "link3", "link4", "link5", "link6", "link7"]


@pytest.mark.parametrize("graph", EXAMPLES.values(), ids=EXAMPLES)
def test_neighbours_are_sorted_mutual_and_never_oneself(graph: Graph) -> None:
    for i in range(graph.num_peers):
        neighbours = graph.neighbours(i)
        assert list(neighbours) == sorted(set(neighbours) - {i})
        assert all(i in graph.neighbours(j) for j in neighbours)
        assert graph.degree(i) == len(neighbours) <= graph.max_degree
    assert graph.max_degree == max(graph.degree(i) for i in range(graph.num_peers))


def test_every_graph_but_none_is_connected() -> None:
    assert [name for name, graph in EXAMPLES.items() if not graph.connected] == ["none"]
    assert all(nx.is_connected(graph.networkx) for graph in CONNECTED.values())


@pytest.mark.parametrize("name", GRAPHS)
def test_one_peer_is_alone_under_every_name(name: str) -> None:
    alone = GRAPHS[name](1, **OPTIONS.get(name, {}))
    assert alone == Graph(1, frozenset())
    assert alone.neighbours(0) == ()
    assert alone.connected


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("num_peers", [-1, 0, 2, 3, 4, 5, 6])
def test_any_number_of_peers_makes_a_graph_or_one_clear_sentence(name: str, num_peers: int) -> None:
    try:
        graph = GRAPHS[name](num_peers, **OPTIONS.get(name, {}))
    except UserError as error:
        sentence = str(error)
        assert str(num_peers) in sentence or "between 0 and" in sentence
        assert "\n" not in sentence and sentence.endswith(".")
    else:
        assert graph.num_peers == num_peers > 0
        assert graph.connected == (name != "none")


def same(graph: Graph, oracle: nx.Graph) -> bool:
    return bool(nx.utils.graphs_equal(graph.networkx, nx.Graph(oracle)))


def test_the_plain_graphs_are_those_of_networkx() -> None:
    for n in (3, 4, 7, 10):
        assert same(ring(n), nx.cycle_graph(n))
        assert same(line(n), nx.path_graph(n))
        assert same(star(n), nx.star_graph(n - 1))
        assert same(complete(n), nx.complete_graph(n))
    for k in (1, 2, 3, 4):
        oracle = nx.convert_node_labels_to_integers(nx.hypercube_graph(k), ordering="sorted")
        assert same(hypercube(2**k), oracle)


@pytest.mark.parametrize(
    ("graph", "shape"),
    [
        (torus(12), (3, 4)),
        (torus(16), (4, 4)),
        (torus(12, rows=2), (2, 6)),
        (torus(12, columns=3), (4, 3)),
        (torus(15, rows=3, columns=5), (3, 5)),
    ],
)
def test_a_torus_joins_each_peer_to_those_around_it(graph: Graph, shape: tuple[int, int]) -> None:
    rows, columns = shape
    for r in range(rows):
        for c in range(columns):
            around = {((r + a) % rows, (c + b) % columns) for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))}
            assert set(graph.neighbours(r * columns + c)) == {i * columns + j for i, j in around - {(r, c)}}


def test_the_exponential_graph_joins_powers_of_two() -> None:
    graph = exponential(32)
    assert graph.neighbours(0) == (1, 2, 4, 8, 16, 24, 28, 30, 31)
    assert set(exponential(10).neighbours(3)) == {(3 + sign * 2**k) % 10 for k in range(4) for sign in (1, -1)}
    assert all(graph.degree(i) == 9 for i in range(32))


def test_clusters_are_complete_inside_and_joined_in_a_ring() -> None:
    graph = clusters(12, count=3, bridges=2)
    assert all((i, j) in graph.edges for start in (0, 4, 8) for i, j in combinations(range(start, start + 4), 2))
    assert graph.edges >= {(3, 4), (2, 5), (7, 8), (6, 9), (0, 11), (1, 10)}
    assert len(graph.edges) == 3 * 6 + 3 * 2
    assert clusters(5, count=5) == ring(5)
    assert clusters(5).edges == {(0, 1), (2, 3), (2, 4), (3, 4), (1, 2)}


def test_none_has_no_edges() -> None:
    assert none(5) == Graph(5, frozenset())
    assert not none(5).connected


GOLDEN = {
    "random_regular": [(0, 2), (0, 3), (1, 3), (1, 5), (2, 4), (4, 5)],
    "erdos_renyi": [(0, 1), (0, 2), (0, 4), (0, 5), (1, 2), (1, 4), (2, 3), (2, 4)],
    "small_world": [(0, 2), (1, 2), (1, 5), (2, 3), (2, 4), (3, 4)],
    "barabasi": [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 5), (2, 4), (4, 5)],
}
RANDOM: dict[str, Callable[..., Graph]] = {
    "random_regular": random_regular,
    "erdos_renyi": erdos_renyi,
    "small_world": small_world,
    "barabasi": barabasi,
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_drawn_graph_depends_on_its_seed_alone(name: str) -> None:
    assert RANDOM[name](12) == RANDOM[name](12, seed=0)
    assert len({RANDOM[name](12, seed=seed) for seed in range(8)}) > 4


def test_drawn_graphs_are_the_same_everywhere() -> None:
    """Peers on different machines draw their graph themselves: a change here breaks every run between versions."""
    assert sorted(random_regular(6, degree=2).edges) == GOLDEN["random_regular"]
    assert sorted(erdos_renyi(6).edges) == GOLDEN["erdos_renyi"]
    assert sorted(small_world(6, neighbours=2, p=0.5).edges) == GOLDEN["small_world"]
    assert sorted(barabasi(6).edges) == GOLDEN["barabasi"]


@pytest.mark.parametrize("degree", [2, 3, 7, 8, 9])
def test_a_random_regular_graph_has_one_degree(degree: int) -> None:
    graph = random_regular(10, degree=degree)
    assert {graph.degree(i) for i in range(10)} == {degree}


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.floats(0.2, 1), st.integers(0, 5))
def test_an_erdos_renyi_graph_is_connected_or_refused(num_peers: int, p: float, seed: int) -> None:
    with suppress(UserError):
        assert erdos_renyi(num_peers, p=p, seed=seed).connected
    assert erdos_renyi(num_peers, p=1.0) == complete(num_peers)


def test_a_small_world_without_moves_is_a_ring_with_wider_reach() -> None:
    graph = small_world(9, neighbours=4, p=0.0)
    assert all(set(graph.neighbours(i)) == {(i + s) % 9 for s in (-2, -1, 1, 2)} for i in range(9))
    assert len(small_world(9, neighbours=4, p=1.0, seed=3).edges) == len(graph.edges)


def test_barabasi_adds_m_edges_with_each_peer() -> None:
    assert len(barabasi(30, m=3).edges) == 3 * (30 - 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torus(7), "7 peers make no torus of at least 2 rows and at least 2 columns; change their number"),
        (lambda: torus(12, rows=5), "12 peers make no torus of 5 rows and at least 2 columns"),
        (lambda: torus(12, rows=3, columns=3), "12 peers make no torus of 3 rows and 3 columns"),
        (lambda: torus(5, columns=5), "5 peers make no torus of at least 2 rows and 5 columns"),
        (lambda: torus(3, columns=7), "3 peers make no torus of at least 2 rows and 7 columns"),
        (lambda: hypercube(12), "a power of two, such as 8 or 16, or use the topology exponential"),
        (lambda: clusters(7, count=4, bridges=2), "7 peers are too few for 4 clusters joined by 2 bridges each"),
        (lambda: random_regular(4), "4 peers of degree 4 each make no graph; the degree must be below"),
        (lambda: random_regular(7, degree=3), "7 peers of degree 3 each make no graph; .* one of the two must be even"),
        (lambda: small_world(4), r"small_world\(neighbours=4\) needs more than 4 peers, and 4 were asked for"),
        (lambda: barabasi(2), r"barabasi\(m=2\) needs more than 2 peers, and 2 were asked for; lower m"),
        (lambda: erdos_renyi(50, p=0.01), r"erdos_renyi\(p=0.01, seed=0\) of 50 peers was disconnected in each of 100"),
    ],
)
def test_a_graph_that_does_not_exist_is_refused_with_one_sentence(make: Callable[[], Graph], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(EXAMPLES)), st.sets(st.integers(0, 11)))
def test_among_the_present_are_the_edges_both_of_whose_ends_are_present(name: str, present: set[int]) -> None:
    graph = EXAMPLES[name]
    left = graph.among(present)
    assert left.num_peers == graph.num_peers
    assert left.edges == {edge for edge in graph.edges if present.issuperset(edge)}
    assert graph.among(range(graph.num_peers)) == graph
    assert all(left.neighbours(i) == () for i in range(graph.num_peers) if i not in present)


@pytest.mark.parametrize("graph", EXAMPLES.values(), ids=EXAMPLES)
def test_the_laplacian_has_as_many_zeros_as_the_graph_has_parts(graph: Graph) -> None:
    degrees = [graph.degree(i) for i in range(graph.num_peers)]
    adjacent = [[int((min(i, j), max(i, j)) in graph.edges) for j in range(len(degrees))] for i in range(len(degrees))]
    values = graph.laplacian_eigenvalues
    assert values == pytest.approx(np.linalg.eigvalsh(np.diag(degrees) - np.array(adjacent)), abs=1e-12)
    assert (values < 1e-9).sum() == nx.number_connected_components(graph.networkx)


@pytest.mark.parametrize(
    ("name", "num_peers", "options"),
    [
        ("complete", 1000, {}),
        ("ring", 10_000, {}),
        ("exponential", 10_000, {}),
        ("torus", 10_000, {}),
        ("random_regular", 10_000, {}),
        ("random_regular", 60, {"degree": 58}),
        ("erdos_renyi", 1000, {}),
    ],
)
def test_large_graphs_are_made_too(name: str, num_peers: int, options: dict[str, Any]) -> None:
    graph = GRAPHS[name](num_peers, **options)
    assert graph.num_peers == num_peers and graph.connected


@pytest.mark.parametrize("num_peers", [1, 2, 3, 8])
def test_ring_and_complete_take_any_number_of_peers(num_peers: int) -> None:
    assert len(ring(num_peers).edges) == (num_peers if num_peers > 2 else num_peers - 1)
    assert len(complete(num_peers).edges) == num_peers * (num_peers - 1) // 2


def test_both_directions_of_an_edge_are_one_edge() -> None:
    assert Graph.of(2, [(0, 1), (1, 0), [1, 0]]) == Graph(2, frozenset({(0, 1)}))


def test_a_link_in_one_row_of_the_adjacency_counts_for_both() -> None:
    assert adjacency("1", "2", "1")(3).neighbours(1) == (0, 2)


@pytest.mark.parametrize("edge", [[0, 3], [-1, 0], [1, 1], [0, 1, 2], [0], [], [0.0, 1], ["0", "1"]], ids=str)
def test_an_edge_that_is_no_pair_of_peers_is_refused(edge: list[int]) -> None:
    with pytest.raises(UserError, match="between 0 and 2") as error:
        Graph.of(3, [(0, 1), (1, 2), edge])
    assert str(edge) in str(error.value)


def test_a_large_part_of_a_disconnected_graph_is_not_listed_whole() -> None:
    with pytest.raises(UserError, match=r"2 parts, one of them \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\];"):
        Graph.of(100, [(i, i + 1) for i in range(98)])


def test_a_disconnected_graph_is_refused() -> None:
    with pytest.raises(UserError, match=r"falls into 3 parts, one of them \[0, 1\].*add edges"):
        Graph.of(5, [(0, 1), (2, 3)])


@pytest.mark.parametrize("num_peers", [0, -1])
def test_a_graph_without_peers_is_refused(num_peers: int) -> None:
    for build in (ring, complete, lambda n: Graph.of(n, [])):
        with pytest.raises(UserError, match=str(num_peers)):
            build(num_peers)


@pytest.mark.parametrize("name", EXACT_SIZE)
def test_a_graph_of_fixed_size_refuses_another(name: str) -> None:
    with pytest.raises(UserError, match=r"has 7 peers, but 8 were asked for; use 7 peers"):
        GRAPHS[name](8)


def test_graphs_and_mixing_load_without_torch() -> None:
    program = "import sys, dfl_lora.graphs, dfl_lora.mixing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("edges.txt", "# a comment\n0 1\n\n1\t2\n"),
        ("edges.csv", "0,1\n1, 2\n"),
        ("edges.json", "[[0, 1], [1, 2.0]]"),
    ],
)
def test_an_edge_list_is_read_from_text_and_json(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    edges = read_edges(tmp_path / name)
    assert edges == [[0, 1], [1, 2]]
    assert Graph.of(3, edges).degree(1) == 2


def test_rows_of_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("0.5, 5e-1\n1 -2\n")
    assert read_numbers(tmp_path / "w.csv") == [[0.5, 0.5], [1.0, -2.0]]


@pytest.mark.parametrize(
    "text",
    ["", "7", "null", "{", "[1]", '{"12": 1}', '["12", "34"]', "[[1, null]]", f"[[{'9' * 400}]]", "[" * 100_000],
    ids=lambda t: t if len(t) < 20 else "long",
)
def test_json_that_is_no_list_of_lists_of_numbers_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"give a \.json list of lists") as error:
        read_numbers(path)
    assert str(path) in str(error.value)


def test_text_without_numbers_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("0 one\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("words.txt", "bytes.txt", "missing.txt", "."):
        with pytest.raises(UserError, match=r"Cannot read rows of numbers from .*separated by commas or blanks"):
            read_numbers(tmp_path / name)


@pytest.mark.parametrize("row", ["0", "0,1,2", "0,1.5", "nan,1", "0,inf"])
def test_a_row_that_is_no_edge_is_refused(tmp_path: Path, row: str) -> None:
    path = tmp_path / "edges.csv"
    path.write_text(f"0,1\n{row}\n")
    with pytest.raises(UserError, match="each row must be two peer numbers, such as 0,1") as error:
        read_edges(path)
    assert str(path) in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text("01.,ne", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("01", max_size=2), inner, max_size=2),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    json_values.map(json.dumps) | st.text("0123456789eE+-., \n#nainf\x00", max_size=12),
    st.sampled_from(["json", "txt"]),
)
def test_any_file_is_an_edge_list_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"edges.{suffix}"
    path.write_text(text)
    with suppress(UserError):
        assert all(type(v) is int for edge in read_edges(path) for v in edge)


def test_the_edges_themselves_or_a_file_of_them_make_a_graph(tmp_path: Path) -> None:
    (tmp_path / "edges.csv").write_text("\n".join(f"{i},{j}" for i, j in EDGES))
    assert from_edges(7, edges=EDGES) == from_edges(7, path=str(tmp_path / "edges.csv")) == Graph.of(7, EDGES)
    with pytest.raises(UserError, match="between 0 and 5"):
        from_edges(6, edges=EDGES)


def test_the_weights_of_a_matrix_that_are_not_zero_make_its_edges(tmp_path: Path) -> None:
    rows = [[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 0.25, 0.75]]
    (tmp_path / "w.json").write_text(json.dumps(rows))
    assert from_rows(3, rows=rows) == from_rows(3, path=str(tmp_path / "w.json")) == line(3)


@pytest.mark.parametrize(("name", "make", "option"), [("edges", from_edges, "edges"), ("matrix", from_rows, "rows")])
def test_exactly_one_of_the_values_and_their_file_is_given(name: str, make: Callable[..., Graph], option: str) -> None:
    with pytest.raises(UserError, match=f"{name} needs exactly one of {option} and path, and neither was given"):
        make(2)
    with pytest.raises(UserError, match="and both were given"):
        make(2, **{option: [[0, 1]]}, path="file.csv")


def test_a_matrix_of_another_number_of_peers_is_refused() -> None:
    with pytest.raises(UserError, match="The matrix is of 2 peers, but num_peers is 3; give as many rows"):
        from_rows(3, rows=[[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(UserError, match=r"2 rows of \[1, 2\] numbers; it must be square"):
        from_rows(2, rows=[[1.0], [0.5, 0.5]])
