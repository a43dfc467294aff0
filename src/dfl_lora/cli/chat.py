"""`dfl-lora chat`: talk with what was trained."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from dfl_lora.cli.evaluate import Consensus, MaxNewTokens, Place, Sample, check_places
from dfl_lora.cli.options import Base
from dfl_lora.errors import UserError

if TYPE_CHECKING:
    from dfl_lora.chatting import Speaker
    from dfl_lora.data.formats import Turn


def chat(
    trained: Place,
    peer: Annotated[int | None, typer.Option("--peer", min=0, help="A peer's adapter, counted from 0.")] = None,
    consensus: Consensus = False,
    base: Base = None,
    sample: Sample = False,
    max_new_tokens: MaxNewTokens = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this text alone, and end.")] = None,
) -> None:
    """Talk with a model: a line in, an answer out, until an empty line or the end of the input."""
    if peer is not None and consensus:
        raise UserError("Say which adapter: give one of --peer K and --consensus.")
    check_places(trained, None)
    from dfl_lora.chatting import speaker
    from dfl_lora.models.generation import sampling_of
    from dfl_lora.trained import names_of, open_trained

    opened = open_trained(trained, base, names_of(() if peer is None else (peer,), consensus))
    talking = speaker(opened, sampling_of(sample, max_new_tokens))
    if prompt is not None:
        print(answer(talking, [{"role": "user", "content": prompt}]))
        return
    turns: list[Turn] = []
    for line in lines():
        turns = [*(turns if talking.remembers else []), {"role": "user", "content": line}]
        text = answer(talking, turns)
        print(text, flush=True)
        turns.append({"role": "assistant", "content": text})


def is_text(typed: str) -> bool:
    """Tells whether all that was typed could be read: what could not stands for itself, in letters that are none."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines() -> Iterator[str]:
    """Yields lines of the standard input up to an empty one, with a mark before each where a person types."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def answer(talking: "Speaker", turns: "list[Turn]") -> str:
    """Returns the answer to the last turn; says so where the first ones were too much to read."""
    if not is_text(turns[-1]["content"]):
        raise UserError("What was typed is not in UTF-8; type it in UTF-8.")
    said = talking.reply(turns)
    if said.cut:
        print("The beginning was too long for the model and was left out.", file=sys.stderr)
    return said.text
