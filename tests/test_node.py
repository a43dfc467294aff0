"""The node file: strict, its paths count from its folder, and it says only what is one machine's own matter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dfl_lora.errors import UserError
from dfl_lora.membership.identity import create_identity
from dfl_lora.membership.roster import Member, first_roster, write_roster
from dfl_lora.node import Node, load_node, membership
from dfl_lora.preflight import preflight
from dfl_lora.reading import resolve
from dfl_lora.recipe import Recipe
from tiny import call, text, toy, written

SENTENCES: list[tuple[object, str]] = [
    ({}, "the key 'peers' is required and missing; add it."),
    ({"peers": []}, "peers: it should have at least 1 item"),
    ({"peers": [1, 1]}, r"peers: \[1, 1\] names a peer twice; give each once."),
    ({"peers": [-1]}, "greater than or equal to 0"),
    ({"peers": [0], "listn": None}, "unknown key 'listn'; .* Did you mean 'listen'"),
    ({"peers": [0], "listen": "nowhere"}, "listen: 'nowhere' is no address; write host:port"),
    ({"peers": [0], "listen": "0.0.0.0:7000", "insecure": True}, "insecure without TLS is for this machine alone"),
    ({"peers": [0], "compute": {"thread": 1}}, "unknown key 'compute.thread'; .* Did you mean 'threads'"),
    ({"peers": [0], "deadline_s": 0}, "deadline_s: it should be greater than 0"),
    ("- peers", "holds a list, not a mapping of node file keys such as peers and roster."),
]


@pytest.mark.parametrize(("content", "said"), SENTENCES, ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_node_file_is_one_sentence(content: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_node(written(tmp_path / "node.yaml", content))


def test_a_node_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no node file at .*absent\.yaml"):
        load_node(tmp_path / "absent.yaml")


def test_paths_count_from_the_folder_of_the_node_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "home" / "node.yaml", {"peers": [2, 0], "roster": "../roster.json"})
    monkeypatch.chdir(tmp_path)
    node = load_node(Path("home/node.yaml"))
    assert node.peers == [0, 2]
    assert node.identity_folder == tmp_path / "home" / "identity"
    assert node.roster_path == tmp_path / "roster.json"
    assert node.run == tmp_path / "home" / "run"
    assert load_node(written(tmp_path / "other.yaml", {"peers": [0], "output": "/x/run"})).run == Path("/x/run")


def node_of(folder: Path, **keys: Any) -> Node:
    return load_node(written(folder / "node.yaml", {"peers": [1], **keys}))


def recipe_of(**data: Any) -> Recipe:
    return resolve(text(Path("all-MiniLM-L6-v2"), Path("train.csv"), Path("validation.csv"), data=data))


def test_what_a_node_says_takes_the_place_of_what_the_recipe_says(tmp_path: Path) -> None:
    recipe = recipe_of(validation="./validation.csv")
    node = node_of(tmp_path, data={"path": "./mine.csv"}, model="./base", compute={"threads": 3})
    here = node.over(recipe)
    assert here.data == recipe.data.model_copy(update={"path": str(tmp_path / "mine.csv")})
    assert here.model.name_or_path == str(tmp_path / "base")
    assert here.compute == recipe.compute.model_copy(update={"threads": 3})
    assert node_of(tmp_path).over(recipe) == recipe


def test_names_of_the_hub_and_of_the_generator_stay_names(tmp_path: Path) -> None:
    here = node_of(tmp_path, data={"path": "builtin/sentences"}, model="all-MiniLM-L6-v2").over(recipe_of())
    assert (here.data.path, here.model.name_or_path) == ("builtin/sentences", "all-MiniLM-L6-v2")


def test_what_is_one_machines_own_changes_no_digest(tmp_path: Path) -> None:
    recipe, base = recipe_of(validation="./validation.csv"), {"weights": "x"}
    own = {"per_peer": "./own", "validation": "./held-out"}
    here = node_of(tmp_path, data=own, model="./base", compute={"threads": 3}).over(recipe)
    assert here.digest_with(base) == recipe.digest_with(base) and here != recipe


def test_the_rows_of_the_only_peer_need_no_number_in_their_path(rows: Path, model: Path, tmp_path: Path) -> None:
    recipe = resolve(text(model, rows / "train.csv", rows / "validation.csv"))
    here = node_of(tmp_path, data={"per_peer": str(rows / "client_2.csv")}).over(recipe)
    preflight(here, [1])
    with pytest.raises(UserError, match=r"for peers \[0, 1\]; put \{i\} or \{\} where"):
        node_of(tmp_path, peers=[0, 1], data={"per_peer": str(rows / "client_2.csv")}).over(recipe)


def test_only_the_rows_of_hosted_peers_need_be_here(rows: Path, model: Path, tmp_path: Path) -> None:
    for number in (2, 3):
        (tmp_path / f"own_{number}.csv").write_bytes((rows / f"client_{number}.csv").read_bytes())
    recipe = resolve(text(model, rows / "train.csv", rows / "validation.csv"))
    here = node_of(tmp_path, peers=[1, 2], data={"per_peer": str(tmp_path / "own_{i}.csv")}).over(recipe)
    preflight(here, [1, 2])
    with pytest.raises(UserError, match="the rows of peer 0"):
        preflight(here)


@pytest.mark.parametrize(
    ("data", "recipe", "said"),
    [
        ({"validation": "./v"}, {"validation": "validation"}, "only a path in the place of a path"),
        ({"validation": "validation"}, {"validation": "./v"}, "only a path in the place of a path"),
        ({"path": "./p"}, {"per_peer": "./c_{i}", "validation": "./v"}, "data.path of the node has no effect"),
    ],
)
def test_rows_that_are_everybodys_matter_are_refused(
    data: dict[str, str], recipe: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        node_of(tmp_path, data=data).over(recipe_of(**recipe))


def test_a_peer_that_the_recipe_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hosts peer 3, but the recipe has 3 peers"):
        node_of(tmp_path, peers=[3]).over(recipe_of())


def member(folder: Path, **keys: Any) -> Node:
    """Returns the node of the only member of a federation of three peers, which hosts peer 1 at a loopback address."""
    identity = create_identity(folder / "identity")
    address = keys.pop("address", "127.0.0.1:7000")
    entry = Member.of(identity, [1], [address] if address else [])
    write_roster(folder / "roster.json", first_roster(Ed25519PrivateKey.generate(), "", 3, [entry]))
    return node_of(folder, **({"listen": "127.0.0.1:7000"} | keys))


def test_a_node_has_the_identity_that_the_roster_names(tmp_path: Path) -> None:
    identity, roster = membership(member(tmp_path), 3)
    assert roster.of_peer(1) == roster.member(identity.id)


Change = Callable[[Path], object]
CHANGES: list[tuple[dict[str, Any], Change, str]] = [
    ({}, lambda folder: (folder / "identity" / "key.pem").chmod(0o644), "key.pem can be read by others"),
    ({}, lambda folder: (folder / "identity" / "tls.pem").chmod(0o640), "tls.pem can be read by others"),
    ({"identity": "other"}, lambda folder: create_identity(folder / "other"), "which is no member of the roster"),
    ({"peers": [0]}, lambda folder: None, r"hosts peers \[0\], but by the roster this member hosts \[1\]"),
    ({"listen": None}, lambda folder: None, "others reach this member at 127.0.0.1:7000, but listen is null"),
    ({"insecure": True, "address": "10.0.0.1:7000"}, lambda folder: None, "the roster names 10.0.0.1:7000"),
]


@pytest.mark.parametrize(("keys", "change", "said"), CHANGES, ids=[said for _, _, said in CHANGES])
def test_a_node_that_does_not_go_with_its_federation_is_refused(
    keys: dict[str, Any], change: Change, said: str, tmp_path: Path
) -> None:
    node = member(tmp_path, **keys)
    change(tmp_path)
    with pytest.raises(UserError, match=said):
        membership(node, 3)


def test_the_recipe_of_another_federation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The roster is of 3 peers and the recipe of 7"):
        membership(member(tmp_path), 7)


def test_a_key_that_others_can_read_is_refused_before_anything_heavy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member(tmp_path)
    (tmp_path / "identity" / "key.pem").chmod(0o644)
    recipe = written(tmp_path / "toy.yaml", toy())
    assert call("peer", recipe, "--node", tmp_path / "node.yaml") == 2
    assert "say chmod 600" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
