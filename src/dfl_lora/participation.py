"""Participation: who takes part in a round.

With a share below 1, every round draws its peers by name from the run seed, so that each peer knows who is
absent without asking. An absent peer neither steps nor exchanges: its row of W is the identity, its weight in a
neighbour's row goes back to that neighbour (W stays symmetric, so the mean stays), and its adapter, optimiser
state, memory and place in its own rows are untouched.
"""

from collections.abc import Callable

from dfl_lora.streams import numpy_stream

Absence = Callable[[int], frozenset[int]]
"""A round gives the peers that are absent from it."""


def nobody(t: int) -> frozenset[int]:
    """Returns the empty set: all take part."""
    return frozenset()


def num_present(num_peers: int, share: float) -> int:
    """Returns how many take part in a round: round(share * num_peers), at least one."""
    return max(1, round(share * num_peers))


def absence(num_peers: int, share: float, seed: int) -> Absence:
    """Returns who is absent: all but `num_present`, drawn anew in each round."""
    present = num_present(num_peers, share)
    if present == num_peers:
        return nobody

    def absent(t: int) -> frozenset[int]:
        order = numpy_stream(seed, "participation", t).permutation(num_peers)
        return frozenset(int(i) for i in order[present:])

    return absent
