"""The command line: `dfl-lora VERB`. Exit code 0 ok, 2 the user's mistake, 3 a failed run.

Verbs import what they need when they run, so that --help loads no torch.
"""

import errno
import sys
from collections.abc import Sequence

import typer

from dfl_lora.cli import data, export, run, train
from dfl_lora.errors import UserError

app = typer.Typer(
    name="dfl-lora",
    help="Fine-tune one large model together, without pooling data and without a server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Add --debug to any command for the traceback of an error.",
)
app.command("run")(run.run)
app.command("train")(train.train)
app.command("split")(data.split)
app.command("view-split")(data.view_split)
app.command("export")(export.export)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        app(words, prog_name="dfl-lora")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return complain("Interrupted; go on with --resume.", 130)
    except UserError as error:
        if debug:
            raise
        return complain(str(error), 2)
    except OSError as error:
        if debug:
            raise
        full = error.errno == errno.ENOSPC
        what = "The disk is full" if full else f"{error.strerror or error}"
        return complain(f"{what}: {error.filename or 'a file of this run'}; free or name another place with --out.", 2)
    except Exception as error:  # the border of the program: what is left is a failed run
        if debug:
            raise
        return complain(f"The run failed with {type(error).__name__}: {error} Add --debug for the traceback.", 3)
    return 0


def complain(message: str, code: int) -> int:
    print(f"dfl-lora: {message}", file=sys.stderr)
    return code


def console_entry() -> None:
    """The entry point of the installed command."""
    raise SystemExit(main())
