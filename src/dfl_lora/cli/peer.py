"""`dfl-lora peer`, `up` and `status`: real peers."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfl_lora.cli.interruption import resumable
from dfl_lora.cli.options import Json, Overwrite, Resume, Settings

if TYPE_CHECKING:
    from rich.table import Table


def peer(
    recipe: Annotated[Path, typer.Argument(help="The recipe of the federation.")],
    node: Annotated[Path, typer.Option("--node", help="This machine's node file, as found and join write it.")],
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The run directory; default: what the node file says.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Be one real peer (or a few) of a recipe: train here, and gossip with the neighbours over mutual TLS."""
    from dfl_lora.node import load_node, membership
    from dfl_lora.preflight import check_resume, preflight
    from dfl_lora.reading import load_recipe
    from dfl_lora.run_directory import prepare

    own, shared = load_node(node), load_recipe(recipe, settings or ())
    identity, roster = membership(own, shared.peers.num_peers)
    directory = own.run if out is None else out
    prepare(directory, resume, overwrite)
    here = own.over(shared)
    # a folder in the place of a name of the hub has no revision, but the recipe's is still a part of its digest
    unversioned = here.model.model_copy(update={"revision": None})
    preflight(here if own.model is None else here.model_copy(update={"model": unversioned}), own.peers, real=True)
    if resume:
        check_resume(directory)
    if own.insecure:
        print("dfl-lora: warning: insecure is set, so that nothing is encrypted or authenticated.", file=sys.stderr)
    with resumable(directory, resume):
        from dfl_lora.cli.screen import Screen
        from dfl_lora.hosting import host

        with Screen(directory, quiet=as_json) as screen:
            summary = host(
                shared, own, identity, roster, directory, [screen], screen.happened, resume=resume, overwrite=overwrite
            )
    if as_json:
        print(json.dumps(summary))


def up(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/demo.yaml.")],
    out: Annotated[Path, typer.Option("--out", help="The run directory of the federation.")],
    peers: Annotated[int | None, typer.Option("--peers", min=1, help="How many peers; default: the recipe's.")] = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run each peer of a recipe in a process of its own on this machine, over loopback with mutual TLS."""
    from dfl_lora.preflight import check_resume, preflight
    from dfl_lora.reading import load_recipe
    from dfl_lora.run_directory import prepare

    resolved = load_recipe(recipe, [*(settings or ()), *([] if peers is None else [f"peers.num_peers={peers}"])])
    prepare(out, resume, overwrite)
    preflight(resolved, real=True)
    if resume:
        check_resume(out)
    with resumable(out / "peer-000", resume):  # the checkpoints are the peers'
        from dfl_lora import up as federation
        from dfl_lora.cli.screen import Screen

        with Screen(out, quiet=as_json) as screen:
            summary = federation.up(resolved, out, screen, resume=resume, overwrite=overwrite)
    if as_json:
        print(json.dumps(summary))


def status(
    node: Annotated[Path, typer.Argument(metavar="NODE", help="A node file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The run directory; default: what the node file says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how a real peer is doing: whether it runs, its round, and each neighbour with lag, bytes and refusals."""
    from rich.console import Console

    from dfl_lora.cli.screen import WIDTH
    from dfl_lora.node import load_node
    from dfl_lora.watching import read_status

    found = read_status(load_node(node).run if out is None else out)
    if as_json:
        print(json.dumps(found))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(heading(found), markup=False)
    console.print(members(found))


def heading(status: Mapping[str, Any]) -> str:
    """Returns a line on the peer itself."""
    from dfl_lora.watching import whose

    doing = status["state"] if status["alive"] or status["state"] in ("finished", "stopped", "failed") else "killed"
    listening = f"listens at {status['listen']}" if status["listen"] else "dials only"
    return (
        f"{status['name']}: {whose(status['peers'])} ({status['member'][:8]}), {doing}, "
        f"process {status['pid']} {'is alive' if status['alive'] else 'has ended'}, "
        f"{status['rounds_done']} of {status['rounds']} rounds, {listening}, "
        f"epoch {status['network'].get('epoch', '–')}, written {status['time']}"
        f"{', INSECURE' if status['insecure'] else ''}"
    )


def members(status: Mapping[str, Any]) -> "Table":
    """Returns a row for each neighbour."""
    from rich.markup import escape
    from rich.table import Table

    from dfl_lora.report.page import size

    table = Table("member", "peers", "state", "since", "round", "lag", "sent", "received", "links", "refused")
    for member in status["network"].get("members", ()):
        refused = ", ".join(f"{count} {kind}" for kind, count in member["refused"].items())
        table.add_row(
            member["id"][:8],
            ", ".join(map(str, member["peers"])),
            member["state"],
            member["since"],
            *("–" if member[key] is None else str(member[key]) for key in ("round", "lag")),
            size(member["bytes_sent"]),
            size(member["bytes_received"]),
            str(member["links"]),
            escape(refused or "–"),
        )
    return table
