"""The Base-(k+1) graph: at most k partners in a round, and the exact mean of any number of peers after a few rounds.

Three constructions, each a list of rounds and each round a list of weighted edges. Peers on no edge keep their value.

    hyper-hypercube H(V)    |V| = f_1 ... f_m, every factor at most k+1 and as few of them as can be. Peers are numbers
                            whose digits have these bases; in round l those meet, and take their mean, who differ in
                            digit l alone.                                                                   m rounds
    simple                  H(V) where it exists. Else the digits of n in base k+1 share V out into parts V_l of a_l
                            blocks of (k+1)^p_l peers, p_1 > p_2 > ...:
                              1. H(V_l) of every part: its peers stand at its mean
                              2. in turn for l = 1, 2, ...: each of the R peers behind V_l meets one peer of every block
                                 of V_l, with weight B / (|V_l| + R), B the size of a block; they end at the mean of all
                                 that V_l and they hold, and so does each block as a whole
                              3. H of every block of V_l, while the parts behind it go on with 2
                            |H(V_1)| + 1 + p_1 rounds
    base                    n = p q, q the part whose prime factors are at most k+1: H of every q peers that follow each
                            other, then simple of those at the same place in each; simple of all where that is shorter

Source: Takezawa, Sato, Bao, Niwa, Yamada, "Beyond Exponential Graph: Communication-Efficient Topologies for
Decentralized Learning via Finite-time Convergence", NeurIPS 2023, arXiv 2305.11420 (algorithms 1 to 3, written from
their description). Checked are the numbers of rounds, at most 2 log_(k+1) n + 2, and that the mean is exact to 1e-12.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, combinations

Weighted = tuple[int, int, float]
"""(i, j, w_ij)."""
Round = list[Weighted]


@cache
def fewest(number: int, most: int) -> tuple[int, ...] | None:
    """Returns as few factors of at most `most` as have this product; None where a prime factor is larger."""
    if number <= most:
        return (number,) if number > 1 else ()
    found = [(d, *rest) for d in range(most, 1, -1) if number % d == 0 and (rest := fewest(number // d, most))]
    return min(found, key=len, default=None)


def hyper_hypercube(peers: Sequence[int], k: int) -> list[Round]:
    """Returns the rounds in which peers that differ in one digit take their mean; their number has no large factor."""
    rounds, step = list[Round](), 1
    for size in fewest(len(peers), k + 1) or ():
        wide = step * size
        groups = [peers[a + b : a + wide : step] for a in range(0, len(peers), wide) for b in range(step)]
        rounds.append([(i, j, 1.0 / size) for group in groups for i, j in combinations(group, 2)])
        step = wide
    return rounds


def simple(peers: Sequence[int], k: int) -> list[Round]:
    """Returns the rounds of the simple Base-(k+1) graph."""
    if fewest(len(peers), k + 1) is not None:
        return hyper_hypercube(peers, k)
    parts = in_blocks(peers, k + 1)
    wholes = [list(chain(*blocks)) for blocks in parts]
    met = len(hyper_hypercube(wholes[0], k))
    rounds = [Round() for _ in range(met + 1 + len(hyper_hypercube(parts[0][0], k)))]
    for turn, (blocks, whole) in enumerate(zip(parts, wholes, strict=True)):
        add(rounds, 0, hyper_hypercube(whole, k))
        if behind := list(chain(*wholes[turn + 1 :])):
            weight = len(blocks[0]) / (len(whole) + len(behind))
            across = [(block[r], peer, weight) for block in blocks for r, peer in enumerate(behind)]
            add(rounds, met + turn, [across, *alongside(hyper_hypercube(block, k) for block in blocks)])
    return rounds


def in_blocks(peers: Sequence[int], base: int) -> list[list[Sequence[int]]]:
    """Returns, for each digit of the number of peers that is not zero, as many blocks of the power it stands for."""
    parts, start, size = list[list[Sequence[int]]](), 0, 1
    while size * base <= len(peers):
        size *= base
    while start < len(peers):
        if digit := (len(peers) - start) // size:
            parts.append([peers[start + a * size : start + (a + 1) * size] for a in range(digit)])
            start += digit * size
        size //= base
    return parts


def add(rounds: list[Round], start: int, more: Iterable[Round]) -> None:
    """Adds edges to the rounds from number `start` on, in place."""
    for m, edges in enumerate(more, start):
        rounds[m] += edges


def alongside(several: Iterable[list[Round]]) -> list[Round]:
    """Returns the rounds in which equally many of each go on at the same time."""
    return [list(chain(*together)) for together in zip(*several, strict=True)]


def base(num_peers: int, k: int) -> list[Round]:
    """Returns the cycle of rounds of the Base-(k+1) graph; none for one peer."""
    peers, large = range(num_peers), num_peers
    for factor in range(2, k + 2):
        while large % factor == 0:
            large //= factor
    small = num_peers // large
    inside = alongside(hyper_hypercube(peers[i : i + small], k) for i in range(0, num_peers, small))
    across = alongside(simple(peers[i::small], k) for i in range(small))
    return min(simple(peers, k), inside + across, key=len)
