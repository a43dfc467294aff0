"""The final number of an answer to GSM8K (arXiv 2110.14168), and when two of them are the same number.

A gold answer ends with `#### 18`, which the model is trained to say as `The final answer is: 18`. Of what it
generates counts the first number after that phrase, and where it did not say so the last number of the text.
"""

import re
from decimal import Decimal

from dfl_lora.data.formats import FINAL_ANSWER, GOLD

FINAL = FINAL_ANSWER.strip()
NUMBER = re.compile(
    r"(?:(?<![\w%)\]])[-−])?(?:\$[-−]?)?"  # a hyphen after a word, a digit or a bracket is no sign: 10-5, 10-12
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?"  # a full stop without digits after it ends a sentence
)


def final_number(text: str) -> str | None:
    """Returns the number that an answer comes to, None where it has none; equal numbers are equal texts."""
    _, phrase, after = text.partition(FINAL)
    said = NUMBER.search(after) if phrase else None
    if said is not None:
        return canonical(said.group())
    numbers = NUMBER.findall(text)
    return canonical(numbers[-1]) if numbers else None


def gold_number(answer: str) -> str | None:
    """Returns the number after #### in a gold answer; None where there is none."""
    _, mark, after = answer.rpartition(GOLD)
    found = NUMBER.search(after) if mark else None
    return canonical(found.group()) if found else None


def canonical(number: str) -> str:
    """Returns a number without dollar, commas, leading and trailing zeros, and never with an exponent."""
    value = format(Decimal(number.replace("−", "-").replace("$", "").replace(",", "")), "f")
    value = value.rstrip("0").rstrip(".") if "." in value else value
    return "0" if value == "-0" else value
