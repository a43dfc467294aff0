"""Who talks to whom."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora.errors import UserError
from dfl_lora.graphs import GRAPHS, Graph, adjacency, complete, named, read_edges, read_numbers, ring

PUBLISHED = {
    "du14": "1,2 | 0,2 | 0,1,3 | 2,4 | 3,5 | 4,6 | 5",
    "link3": "1,6 | 0,2 | 1,3 | 2,4 | 3,5 | 4,6 | 0,5",
    "link4": "1,2,6 | 0,2,3 | 0,1,3 | 1,2,4 | 3,5,6 | 4,6 | 0,4,5",
    "link5": "1,2,5,6 | 0,2,3,6 | 0,1,3,4 | 1,2,4,5 | 2,3,5,6 | 0,3,4,6 | 0,1,4,5",
    "link6": "1,2,3,5,6 | 0,2,3,4,5 | 0,1,3,4,5 | 0,1,2,4,5 | 1,2,3,5,6 | 0,1,2,3,4,6 | 0,4,5",
    "link7": "1,2,3,4,5,6 | 0,2,3,4,5,6 | 0,1,3,4,5,6 | 0,1,2,4,5,6 | 0,1,2,3,5,6 | 0,1,2,3,4,6 | 0,1,2,3,4,5",
}
EXACT_SIZE = sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_graphs_have_the_published_neighbours(name: str) -> None:
    graph = named(name, 7)
    assert " | ".join(",".join(map(str, graph.neighbours(i))) for i in range(7)) == PUBLISHED[name]


def test_link3_is_the_ring_and_link7_is_complete() -> None:
    assert named("link3", 7) == ring(7)
    assert named("link7", 7) == complete(7)


@pytest.mark.parametrize("name", GRAPHS)
def test_neighbours_are_sorted_mutual_and_never_oneself(name: str) -> None:
    graph = named(name, 7)
    for i in range(7):
        neighbours = graph.neighbours(i)
        assert list(neighbours) == sorted(set(neighbours) - {i})
        assert all(i in graph.neighbours(j) for j in neighbours)
        assert graph.degree(i) == len(neighbours) > 0


@pytest.mark.parametrize("name", GRAPHS)
def test_every_named_graph_is_connected_and_lets_one_peer_be_alone(name: str) -> None:
    assert nx.is_connected(named(name, 7).networkx)
    assert named(name, 1) == Graph(1, frozenset())
    assert named(name, 1).neighbours(0) == ()


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
        named(name, 8)


def test_an_unknown_topology_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown topology 'rnig'; allowed are ring, complete.*Did you mean 'ring'\?"):
        named("rnig", 7)


def test_an_unknown_topology_like_none_of_them_names_all() -> None:
    with pytest.raises(UserError) as error:
        named("zzz", 7)
    assert str(error.value) == f"Unknown topology 'zzz'; allowed are {', '.join(GRAPHS)}."


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
