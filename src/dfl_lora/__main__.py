"""The entry of the command line: of `dfl-lora VERB`, and of `python -m dfl_lora VERB`.

SIGINT (Ctrl-C) and SIGTERM (being asked to end) are heard before anything large is imported. Until a command begins
there is nothing to tidy, and the process ends at once; from then on they raise a KeyboardInterrupt; when the command
has ended they change nothing. Signals that the parent has silenced, as nohup does, stay silent.
"""

import os
import signal
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
SAME_S = 1.0
"""Within so many seconds a second signal is the first one: `timeout` sends it to the process and to its group."""
Handler = Callable[[int, FrameType | None], None]


class AskedToEnd(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. Where KeyboardInterrupt itself leaves an exec, as in dataclasses, Python ends by SIGINT."""


def console_entry() -> NoReturn:
    """Runs the command of sys.argv and ends the process with its exit code, 130 where it was interrupted."""
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    hear(heard, at_once)
    from dfl_lora.cli import main

    hear(heard, raising())
    try:
        code = main()
    except KeyboardInterrupt:  # once more, while the first was being told
        code = INTERRUPTED
    hear(heard, signal.SIG_IGN)
    raise SystemExit(code)


def hear(numbers: list[signal.Signals], handler: Handler | signal.Handlers) -> None:
    for number in numbers:
        signal.signal(number, handler)


def at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process without unwinding: an import that is interrupted half-way may swallow an exception."""
    os.write(2, b"dfl-lora: Interrupted before anything was done.\n")
    os._exit(INTERRUPTED)


def raising() -> Handler:
    """Returns a handler that raises AskedToEnd, once for signals that come together."""
    last = -SAME_S

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        earlier, last = last, monotonic()
        if last - earlier >= SAME_S:
            raise AskedToEnd

    return stop


if __name__ == "__main__":
    console_entry()
