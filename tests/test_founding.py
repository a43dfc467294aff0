"""`found`, `invite` and `join`: what they write, what of one machine others never see, and two real processes."""

import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dfl_lora.build import checked_digest
from dfl_lora.membership.identity import load_identity, load_key, public_of, write_key
from dfl_lora.membership.invitation import Invitation, read_token
from dfl_lora.membership.roster import read_roster
from dfl_lora.models.base import locate
from dfl_lora.node import load_node
from dfl_lora.preflight import preflight
from dfl_lora.reading import load_recipe
from forging import ORGANISER
from tiny import Content, call, files_of, text, toy, written

HERE = ("--address", "127.0.0.1:7000")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the founder of the toy's federation; do not change it."""
    folder = tmp_path_factory.mktemp("federation")
    assert call("found", written(folder / "toy.yaml", toy()), "--to", folder / "founder", *HERE) == 0
    return folder / "founder"


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "dfl_lora", *map(str, words)]


def test_a_founder_has_keys_a_roster_of_itself_a_recipe_and_a_node_file(federation: Path) -> None:
    identity, roster = load_identity(federation / "identity"), read_roster(federation / "roster.json")
    assert public_of(load_key(federation / "organiser.key")) == roster.organiser != identity.public
    assert (roster.epoch, roster.num_peers, [m.id for m in roster.members]) == (1, 3, [identity.id])
    assert roster.members[0].peers == (0,) and roster.members[0].addresses == ("127.0.0.1:7000",)
    recipe, node = load_recipe(federation / "recipe.yaml"), load_node(federation / "node.yaml")
    assert recipe.digest == roster.recipe == checked_digest(recipe, None)
    assert node.peers == [0] and node.listen == "127.0.0.1:7000" and node.compute.dtype == "float32"
    assert node.identity_folder == federation / "identity" and node.roster_path == federation / "roster.json"
    assert (federation / "organiser.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("own", [False, True])
def test_what_belongs_to_one_machine_is_in_its_node_file_and_not_in_the_recipe_of_all(
    own: bool, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content: Content = text(model, rows / "train.csv", rows / "validation.csv")
    if own:
        content["data"] = {"per_peer": f"{rows}/client_{{i}}.csv", "validation": str(rows / "validation.csv")}
        content["task"] = {"labels": ["no", "yes"]}
    recipe = written(tmp_path / "text.yaml", content)
    monkeypatch.chdir(rows.parent)
    assert call("found", recipe, "--to", tmp_path / "founder", *HERE, "--peer", 2, "--peer", 1) == 0
    said = (tmp_path / "founder/recipe.yaml").read_text()
    assert str(rows) not in said and str(model) not in said and "compute" not in said and "output" not in said
    monkeypatch.chdir(tmp_path)
    shared, node = load_recipe(tmp_path / "founder/recipe.yaml"), load_node(tmp_path / "founder/node.yaml")
    here, expected = node.over(shared), load_recipe(recipe)
    assert node.peers == [1, 2]
    assert (here.data, here.model, here.compute) == (expected.data, expected.model, expected.compute)
    assert checked_digest(here, locate(here.model.name_or_path)) == shared.digest


SHAPES: dict[str, dict[str, str]] = {
    "a table": {"path": "train.csv", "validation": "validation.csv"},
    "a folder with both splits": {"path": "."},
    "own rows": {"per_peer": "client_{i}.csv", "validation": "validation.csv"},
    "own rows and own validation": {"per_peer": "client_{i}.csv", "validation": "held_out_{i}.csv"},
    "own rows and a folder of which the validation is read": {"per_peer": "client_{i}.csv", "path": "."},
    "own rows and a table that nobody reads": {
        "per_peer": "client_{i}.csv", "path": "train.csv", "validation": "validation.csv",
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_founders_node_file_goes_with_its_recipe_wherever_rows_are(
    shape: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    content: Content = text(model, rows / "train.csv", rows / "validation.csv", task={"labels": ["no", "yes"]})
    folder = shutil.copytree(rows, tmp_path / "rows")
    for number in (1, 2, 3):
        shutil.copy(rows / "validation.csv", folder / f"held_out_{number}.csv")
    content["data"] = {key: str(folder / place) for key, place in SHAPES[shape].items()}
    assert call("found", written(tmp_path / "text.yaml", content), "--to", tmp_path / "founder", *HERE) == 0
    shared, node = load_recipe(tmp_path / "founder/recipe.yaml"), load_node(tmp_path / "founder/node.yaml")
    assert str(tmp_path) not in (tmp_path / "founder/recipe.yaml").read_text()
    here = node.over(shared)
    preflight(here, node.peers)
    assert checked_digest(here, locate(here.model.name_or_path)) == shared.digest


def test_two_processes_invite_and_join_over_loopback(federation: Path, tmp_path: Path) -> None:
    founder = tmp_path / "founder"
    founder.mkdir()
    for name, content in files_of(federation).items():
        place = founder / name
        place.mkdir(mode=0o700) if content is None else place.write_bytes(content)
    for key in (founder / "organiser.key", founder / "identity/key.pem", founder / "identity/tls.pem"):
        key.chmod(0o600)
    words = ("invite", founder / "node.yaml", "--count", 2, "--listen", "127.0.0.1:0")
    with subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as inviter:
        try:
            assert inviter.stdout is not None
            tokens = [inviter.stdout.readline().strip() for _ in range(2)]
            own = [tmp_path / "second", tmp_path / "third"]
            reached = ([], ["--address", "127.0.0.1:7002"])
            for token, to, flags in zip(tokens, own, reached, strict=True):
                joined = subprocess.run(command("join", token, "--to", to, *flags), capture_output=True, text=True)
                assert joined.returncode == 0 and not joined.stderr, joined.stderr
                assert "hosts peer" in joined.stdout and f"--node {to}/node.yaml" in joined.stdout
            rest, said = inviter.communicate(timeout=30)
        finally:
            inviter.kill()
    assert inviter.returncode == 0 and rest == "" and said.count("has joined from 127.0.0.1") == 2
    for i, (to, token) in enumerate(zip(own, tokens, strict=True), 1):
        identity, roster = load_identity(to / "identity"), read_roster(to / "roster.json")
        assert roster.epoch == 1 + i and roster.of_peer(i) == roster.member(identity.id)
        assert (to / "recipe.yaml").read_bytes() == (founder / "recipe.yaml").read_bytes()
        assert load_node(to / "node.yaml").peers == [i]
        assert read_token(token).secret.hex() not in said + joined.stdout
    assert [load_node(to / "node.yaml").listen for to in own] == [None, "127.0.0.1:7002"]
    assert read_roster(founder / "roster.json").epoch == 3 and read_roster(own[1] / "roster.json").epoch == 3


def test_an_inviter_that_is_interrupted_says_so_and_ends(federation: Path) -> None:
    words = ("invite", federation / "node.yaml", "--listen", "127.0.0.1:0")
    with subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as inviter:
        try:
            assert inviter.stdout is not None and inviter.stdout.readline().startswith("dfl1:")
            assert inviter.stderr is not None and inviter.stderr.readline().startswith("Waiting at 127.0.0.1:")
            inviter.terminate()
            _, said = inviter.communicate(timeout=30)
        finally:
            inviter.kill()
    assert inviter.returncode == 130
    assert said == "dfl-lora: Interrupted; the invitations that were not used are void.\n"


def test_an_invitation_that_nobody_uses_ends_with_its_time(
    federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, start = (federation / "roster.json").read_bytes(), time.monotonic()
    assert call("invite", federation / "node.yaml", "--listen", "127.0.0.1:0", "--hours", 1.5 / 3600, "--peer", 2) == 0
    out, err = capsys.readouterr()
    assert time.monotonic() - start < 10 and read_token(out.strip()).peer == 2
    assert err.endswith("1 of 1 invitations expired unused.\n") and (federation / "roster.json").read_bytes() == before


@pytest.mark.parametrize(("words", "said"), [
    (("--count", 3), "3 free peers are asked for, and 2 of 3 have no host yet"),
    (("--peer", 0), "Peer 0 is hosted by member "),
    (("--peer", 3), "give peers from 0 to 2, each once"),
    (("--peer", 1, "--peer", 1), "give peers from 0 to 2, each once"),
    (("--peer", 1, "--count", 1), "give one of them"),
    (("--peer", 1, "--replace"), "--replace has no effect on peer 1"),
    (("--replace",), "name them with --peer"),
    (("--listen", "nowhere"), "--listen: 'nowhere' is no address"),
    (("--address", "127.0.0.1:0"), "has port 0"),
    (("--organiser", "nowhere"), "There is no organiser's key at nowhere"),
    (("--hours", 0), "--hours is 0; give more than 0 and at most 8760"),
    (("--hours", "nan"), "--hours is nan; give more than 0 and at most 8760"),
])  # fmt: skip
def test_a_mistake_of_invite_is_told_in_a_sentence(
    words: tuple[object, ...], said: str, federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("invite", federation / "node.yaml", *words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""


def test_another_organisers_key_invites_nobody(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_key(tmp_path / "organiser.key", ORGANISER)
    assert call("invite", federation / "node.yaml", "--organiser", tmp_path / "organiser.key") == 2
    assert "is not the key of the organiser of federation" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "words", "said"), [
    (toy(peers={"topology": "rong"}), HERE, "Did you mean 'ring'?"),
    (toy(peers={"topology": {"kind": "edges", "edges": [[0, 1]]}}), HERE, "The graph is disconnected"),
    (toy(lora={"target_modules": ["query"]}), HERE, "query"),
    (toy(digest="0" * 64), HERE, "The recipe says digest 000"),
    (toy(), (*HERE, "--peer", 3), "give peers from 0 to 2, each once"),
    (toy(), ("--address", "127.0.0.1"), "--address: '127.0.0.1' is no address"),
    (toy(), ("--address", "127.0.0.1:0"), "has port 0"),
    (toy(), (*HERE, *HERE), "give each once"),
    (toy(), (*HERE, "--listen", "x"), "--listen: 'x' is no address"),
])  # fmt: skip
def test_a_mistake_of_found_is_told_in_a_sentence_and_leaves_nothing(
    content: Content, words: tuple[object, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("found", written(tmp_path / "toy.yaml", content), "--to", tmp_path / "founder", *words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and [*files_of(tmp_path)] == ["toy.yaml"]


def test_nothing_is_written_over_a_folder_with_something_in_it(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    before = files_of(tmp_path)
    recipe = federation.parent / "toy.yaml"
    token = "dfl1:eyJhZGRyZXNzIjoiMTI3LjAuMC4xOjEiLCJleHBpcmVzIjowLCJmZWRlcmF0aW9uIjoi"
    assert call("found", recipe, "--to", tmp_path, *HERE) == 2
    assert "give a new or an empty folder" in capsys.readouterr().err
    assert call("join", token, "--to", tmp_path) == 2
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(("words", "said"), [
    (("dfl1:nonsense",), "This is no invitation"),
    ((None, "--listen", "127.0.0.1:7001"), "without --address has no effect"),
    ((None, "--address", "nowhere"), "--address: 'nowhere' is no address"),
    ((None,), "nobody listens there"),
])  # fmt: skip
def test_a_mistake_of_join_is_told_in_a_sentence_and_leaves_nothing(
    words: tuple[object, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = Invitation("127.0.0.1:1", 2_000_000_000, "a" * 52, "0" * 64, 1, "", bytes(16)).token
    assert call("join", *(token if word is None else word for word in words), "--to", tmp_path / "own") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and token not in err and not files_of(tmp_path)


def test_the_node_file_says_what_its_keys_mean(federation: Path) -> None:
    lines = (federation / "node.yaml").read_text().splitlines()
    keys = yaml.safe_load("\n".join(lines))
    explained = [line.partition(":")[0] for before, line in pairwise(lines) if before[:2] == "# "]
    assert [key for key in explained if key] == list(keys)


@pytest.mark.parametrize("verb", ["found", "invite", "join"])
def test_help_loads_no_torch_no_grpc_and_no_cryptography(verb: str) -> None:
    code = (
        f"import sys; from dfl_lora.cli import main; assert main(['{verb}', '--help']) == 0; "
        "heavy = {'torch', 'grpc', 'cryptography'} & sys.modules.keys(); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("words", [("invite",), ("join", "dfl1:nonsense", "--to", "nowhere")])
def test_inviting_and_joining_load_no_torch(words: tuple[str, ...], federation: Path) -> None:
    given = [*words, str(federation / "node.yaml"), "--count", "9"] if words == ("invite",) else list(words)
    code = f"import sys; from dfl_lora.cli import main; assert main({given}) == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
