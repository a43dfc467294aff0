"""`dfl-lora topology`: what is said of a graph before any run, and its picture."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from changing import NAMES, changing
from dfl_lora.graphs import GRAPHS, Graph, clusters, ring
from dfl_lora.mixing import MIXINGS, matrix, metropolis
from dfl_lora.report.spectrum import picture
from example_graphs import CIRCLE, EDGES, SIZES
from tiny import call, files_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """Returns what --json prints."""
    assert call("topology", *words, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_facts_of_link4_as_json(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    found = facts(capsys, "link4")
    assert found["num_peers"] == 7 and found["num_edges"] == 10 and found["messages"] == 20
    assert found["degrees"] == [3, 3, 3, 3, 3, 2, 3]
    assert found["neighbours"][0] == [1, 2, 6]
    assert found["diameter"] == 3 and found["exact_in"] == 6 and found["rounds_to_a_thousandth"] == 28
    assert found["spectral_gap"] == pytest.approx(0.221, abs=5e-4) and found["rho"] == pytest.approx(0.779, abs=5e-4)
    assert found["chebyshev"] == {"3": pytest.approx(0.217, abs=5e-4), "8": pytest.approx(0.005, abs=5e-4)}
    assert found["expected_profile"] == pytest.approx(0.81, abs=0.005)
    assert found["mixing"] == "metropolis"
    assert np.array(found["w"]) == pytest.approx(matrix(GRAPHS["link4"](7), metropolis))
    assert found["eigenvalues"] == pytest.approx(np.linalg.eigvalsh(np.array(found["w"]))[::-1], abs=1e-12)
    assert files_of(here) == {}


@pytest.mark.parametrize("mixing", MIXINGS)
def test_every_mixing_can_be_asked_for(capsys: pytest.CaptureFixture[str], mixing: str) -> None:
    found = facts(capsys, "ring", "--peers", 5, "--mixing", mixing)
    assert found["mixing"] == mixing
    assert np.array(found["w"]) == pytest.approx(matrix(ring(5), MIXINGS[mixing]))


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in ("edges", "matrix")])
def test_every_name_of_a_graph_can_be_asked_for(capsys: pytest.CaptureFixture[str], name: str) -> None:
    found = facts(capsys, name, "--peers", SIZES.get(name, 7))
    graph = GRAPHS[name](SIZES.get(name, 7))
    assert found["neighbours"] == [list(graph.neighbours(i)) for i in range(graph.num_peers)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_graphs_that_change_can_be_asked_for(capsys: pytest.CaptureFixture[str], name: str) -> None:
    topology, weights = changing(name)
    found = facts(capsys, name, "--peers", topology.num_peers)
    assert found["cycle"] == topology.cycle and found["num_rounds"] == topology.num_looked_at
    assert found["rounds"] == [[list(edge) for edge in sorted(graph.edges)] for graph in topology.looked_at()]
    mean = sum(matrix(graph, weights) for graph in topology.looked_at()) / topology.num_looked_at
    assert np.array(found["w"]) == pytest.approx(mean)
    assert found["spectral_gap"] == 1 - found["rho"] and found["chebyshev"] == {}


def test_graphs_in_turn_are_told_with_who_meets_when(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert call("topology", "base(k=1)", "--peers", 7) == 0
    shown = capsys.readouterr().out
    for word in ("9 over 5 rounds (5.6 messages a round)", "rounds to the exact mean", "0-4  1-5  2-6", "mean of W"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert [*files_of(here)] == ["topology-base-k-1.png"]
    found = facts(capsys, "base(k=1)", "--peers", 7)
    assert found["exact_in"] == found["rounds_to_a_thousandth"] == 5 and found["rho"] == 0
    assert found["mixing"] == "its own weights"


def test_a_topology_with_weights_takes_no_mixing(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("topology", "base(k=1)", "--mixing", "lazy") == 2
    assert "base brings its own weights, and --mixing lazy was given" in capsys.readouterr().err


def test_the_picture_lies_in_the_current_directory_unless_told(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert call("topology", "torus", "--peers", 12) == 0
    shown = capsys.readouterr().out
    assert "torus, 12 peers" in shown and "picture: topology-torus.png" in shown
    assert [*files_of(here)] == ["topology-torus.png"]
    assert (here / "topology-torus.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_person_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("topology", "ring") == 0
    shown = capsys.readouterr().out
    for word in ("7 (14 messages a round)", "0.251 (rho 0.749)", "0.1813 (plain 0.4202)", "1.667 (1 x the ring's)"):
        assert word in shown
    assert "1, 6" in shown
    assert ".33 .33   ·   ·   ·   · .33\n" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_sixteen_peers_fit_a_terminal_of_80_columns_and_more_are_not_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("topology", "complete", "--peers", 16) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count(" .06") == 256
    assert call("topology", "complete", "--peers", 17) == 0
    assert "neighbours" not in capsys.readouterr().out


def test_a_graph_that_never_agrees_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "none", "--peers", 3)
    assert found["rho"] == 1 and found["spectral_gap"] == 0
    for key in ("diameter", "rounds_to_a_thousandth", "exact_in", "expected_consensus", "expected_profile"):
        assert found[key] is None
    assert call("topology", "none", "--peers", 3) == 0
    shown = capsys.readouterr().out
    assert shown.count("never") == 2 and "nobody" in shown


def test_one_peer_is_drawn_too(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert call("topology", "link4", "--peers", 1, "--out", "one.svg") == 0
    assert ElementTree.parse(here / "one.svg").getroot().tag.endswith("svg")


def test_options_make_the_graph_and_the_name_of_its_file(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    found = facts(capsys, "clusters(count=3, bridges=2)", "--peers", 12)
    graph = clusters(12, count=3, bridges=2)
    assert found["neighbours"] == [list(graph.neighbours(i)) for i in range(12)]
    assert call("topology", "clusters(count=3, bridges=2)", "--peers", 12) == 0
    assert [*files_of(here)] == ["topology-clusters-count-3-bridges-2.png"]


def test_edges_and_a_matrix_come_from_a_file_or_as_they_are(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "edges.json").write_text(json.dumps(EDGES))
    (here / "w.json").write_text(json.dumps(CIRCLE))
    written = facts(capsys, "edges(path=edges.json)")
    assert written == {**facts(capsys, f"edges(edges={EDGES})"), "topology": "edges(path=edges.json)"}
    given = facts(capsys, "matrix(path=w.json)")
    assert given["mixing"] == "its own weights" and given["w"] == CIRCLE
    assert call("topology", f"matrix(rows={CIRCLE})") == 0
    assert all(len(name) < 90 for name in files_of(here))


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")])
def test_the_ending_says_what_picture_and_the_same_graph_gives_the_same(here: Path, ending: str, start: bytes) -> None:
    for name in ("one", "two"):
        picture(ring(9), matrix(ring(9), metropolis), "ring", "a ring", here / "new" / f"{name}.{ending}")
    assert (here / "new" / f"one.{ending}").read_bytes().startswith(start)
    assert (here / "new" / f"one.{ending}").read_bytes() == (here / "new" / f"two.{ending}").read_bytes()


@pytest.mark.parametrize("graph", [ring(13), clusters(70, count=5), Graph(3, frozenset())], ids=["13", "70", "apart"])
def test_a_picture_shows_its_title_and_no_number_it_has_no_room_for(here: Path, graph: Graph) -> None:
    picture(graph, matrix(graph, metropolis), "a $title$ of <mine>", "said", here / "graph.svg")
    words = [element.text for element in ElementTree.parse(here / "graph.svg").iter() if element.tag.endswith("text")]
    assert "a $title$ of <mine>" in words and "said" in words and "eigenvalues of W" in words
    assert (words.count(".33") > 0) == (graph.num_peers <= 12 and bool(graph.edges))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rign",), ["'rign'", "link4", "Did you mean 'ring'?"]),
        (("erdos_renyi(q=0.3)",), ["q", "allowed", "p, seed"]),
        (("erdos_renyi(p=1.5)",), ["p", "less than or equal to 1", "1.5"]),
        (("clusters(count=x)",), ["count", "'x'"]),
        (("small_world(neighbours=3)",), ["neighbours", "multiple of 2"]),
        (("ring(",), ["'ring('", "name with options"]),
        (("edges",), ["exactly one of edges and path", "neither was given"]),
        (("matrix(path=absent.csv)",), ["absent.csv"]),
        (("matrix(rows=[[0.5, 0.5], [0.5, 0.5]])",), ["2 peers", "num_peers is 7"]),
        (("matrix(rows=[[0.5, 0.5], [0.5, 0.6]])", "--peers", 2), ["row 1 sums to 1.1"]),
        (("matrix(rows=[[0.5, 0.5], [0.5, 0.5]])", "--peers", 2, "--mixing", "lazy"), ["its own weights", "lazy"]),
        (("torus",), ["7 peers make no torus"]),
        (("link4", "--peers", 8), ["7 peers, but 8 were asked for"]),
        (("ring", "--mixing", "lasy"), ["'lasy'", "metropolis", "Did you mean 'lazy'?"]),
        (("ring", "--peers", 0), ["--peers"]),
        (("ring", "--peers", 1001), ["--peers", "1000"]),
        (("ring", "--out", "ring.gif"), ["ring.gif", ".png, .svg, .pdf"]),
        (("ring", "--out", "folder.png"), ["folder.png is a folder", ".png"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], here: Path, words: tuple[object, ...], said: list[str]
) -> None:
    (here / "folder.png").mkdir()
    assert call("topology", *words) == 2
    out, complaint = capsys.readouterr()
    assert out == "" and len(complaint.splitlines()) == 1
    assert all(part in complaint for part in said), complaint
    assert [*files_of(here)] == ["folder.png"]


def test_no_torch_is_loaded_for_a_graph(here: Path) -> None:
    program = (
        "import sys; from dfl_lora.cli import main; "
        "code = main(['topology', 'ring', '--json']); sys.exit(code or 'torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], check=False, cwd=here, stdout=subprocess.DEVNULL).returncode
        == 0
    )
