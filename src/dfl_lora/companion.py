"""A command that does not outlive the process that started it: `python -m dfl_lora.companion VERB ...`.

Its standard input is a pipe of which that process alone holds the other end. When the pipe ends, however the process
ended, the command is asked to end as by SIGTERM, and made to where it does not.
"""

import os
import signal
from threading import Thread
from time import sleep
from typing import NoReturn

from dfl_lora.__main__ import INTERRUPTED, console_entry

PATIENCE_S = 10.0


def main() -> NoReturn:
    """Runs the command of sys.argv for as long as standard input lasts."""
    Thread(target=end_with_input, name="companion", daemon=True).start()
    console_entry()


def end_with_input() -> NoReturn:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    sleep(PATIENCE_S)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
