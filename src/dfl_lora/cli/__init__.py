"""The command line: `dfl-lora VERB`. Exit code 0 ok, 2 the user's mistake, 3 a failed run, 130 interrupted.

Verbs import what they need when they run, so that --help loads no torch.
"""

import errno
import sys
import traceback
from collections.abc import Sequence

import typer

from dfl_lora.__main__ import INTERRUPTED
from dfl_lora.cli import (
    bench,
    chat,
    check,
    cite,
    data,
    doctor,
    evaluate,
    export,
    membership,
    peer,
    run,
    topology,
    train,
)
from dfl_lora.cli.interruption import Interrupted
from dfl_lora.errors import UserError

app = typer.Typer(
    name="dfl-lora",
    help="Fine-tune one large model together, without pooling data and without a server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Add --debug to any command for the traceback of an error.",
)
NO_ROOM = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file grew over the limit of its size",
}
NO_FILES = {
    errno.EMFILE: "This process has too many files open",
    errno.ENFILE: "This machine has too many files open",
}
UsageError = typer.BadParameter.__base__ or typer.BadParameter
app.command("run")(run.run)
app.command("train")(train.train)
app.command("split")(data.split)
app.command("view-split")(data.view_split)
app.command("check")(check.check)
app.command("cite")(cite.cite)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.command("topology")(topology.topology)
app.command("peer")(peer.peer)
app.command("up")(peer.up)
app.command("status")(peer.status)
app.command("found")(membership.found)
app.command("invite")(membership.invite)
app.command("join")(membership.join)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"] or ["--help"]
    try:
        code = app(words, prog_name="dfl-lora", standalone_mode=False) or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:  # the border of the program
        if debug:
            traceback.print_exc()
        return complain(*sentence(error))
    if code == INTERRUPTED:
        return complain("Interrupted; nothing was left half-written.", code)
    return int(code)


def sentence(error: Exception) -> tuple[str, int]:
    """Returns what to say of an error, and the exit code: 2 where the user can help it, else 3."""
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, UsageError):
        command = getattr(getattr(error, "ctx", None), "command_path", "dfl-lora")
        said = error.format_message().replace("Value error, ", "")  # type: ignore[attr-defined]
        return f"{said.rstrip('.')}. See {command} --help.", 2
    for number, said in NO_ROOM.items():
        if getattr(error, "errno", None) == number or f"os error {number})" in str(error):
            place = getattr(error, "filename", None) or "a file could not be written"
            return f"{said}: {place}; free some space or write to another place.", 2
    if isinstance(error, OSError) and error.errno in NO_FILES:
        place = error.filename or "a file or a connection could not be opened"
        return f"{NO_FILES[error.errno]}: {place}; raise the limit with ulimit -n 65536 and start again.", 3
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'a file'}; give another place.", 2
    return f"The run failed with {type(error).__name__}: {error} Add --debug for the traceback.", 3


def complain(message: str, code: int) -> int:
    print(f"dfl-lora: {' '.join(message.split())}", file=sys.stderr)
    return code
