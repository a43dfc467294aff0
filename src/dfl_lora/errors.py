"""What a user can act on: one sentence that says what was given, what is allowed, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in a recipe, a file or a flag; the command line prints it and ends with exit code 2."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Returns " did you mean 'x'?" for the nearest allowed word, or an empty string."""
    match = get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
