"""A border under siege: many mutants, and now and then a frame as it should be."""

import hashlib
import resource
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import get_args

from dfl_lora.codecs.frames import Frame
from dfl_lora.networks.body import body_of
from dfl_lora.networks.border import Border
from dfl_lora.networks.sealed import Header, Kind, Refusal
from network.mutator import HOSTS, Mutant, Source, Valid, as_sent, federation, mutants

FRAME_KINDS = tuple(kind for kind in get_args(Kind) if kind != "message")


def brought(border: Border, sent: Mutant, now: tuple[int, int]) -> tuple[Header | None, Frame | Refusal]:
    """Returns what a border makes of what a member sends: an announcement, then the body."""
    header = border.announced(sent.sealed, sent.member, now)
    if isinstance(header, Refusal):
        return None, header
    return header, border.received(header, bytearray(sent.body), hashlib.sha256(sent.body).hexdigest())


@dataclass
class Siege:
    """What a border did with many mutants."""

    refused: Counter[Kind] = field(default_factory=Counter)
    resigned: int = 0
    grown_bytes: int = 0
    """Of the process's largest resident memory, after the first twentieth of the mutants."""

    def table(self) -> str:
        return "\n".join(f"{kind:>12} {self.refused[kind]:>9,}" for kind in FRAME_KINDS)


def besieged(seed: int, count: int) -> Siege:
    """Brings mutants to a border, and a valid frame after every eighth; fails where one was not judged as it should."""
    here, siege = federation(seed), Siege()
    source, border, start = Source(here, Random(f"mutants {seed}")), here.border(), 0
    while not all(len(source.passed.get(peer, ())) > 1 for peers in HOSTS for peer in peers):
        expect_taken_in(source, border, source.valid())
    for number, (how, sent) in enumerate(mutants(source, count)):
        header, verdict = brought(border, sent, here.moment)
        if header is not None:
            source.note(header.sender, sent.sealed)
        assert isinstance(verdict, Refusal), f"mutant {number} of seed {seed}, {how}, was taken in: {sent}"
        assert len(verdict.why) < 300 and verdict.why.isprintable() and verdict.why.isascii(), verdict
        siege.refused[verdict.kind] += 1
        siege.resigned += sent.resigned
        if number % 8 == 0:
            expect_taken_in(source, border, source.valid())
        if number == count // 20:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    siege.grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
    assert sum(sum(kinds.values()) for kinds in border.refused.values()) == count
    assert len(border.latest) == 5 and border.refused.keys() == here.identities.keys()
    return siege


def expect_taken_in(source: Source, border: Border, good: Valid) -> None:
    """Fails where a valid frame is not taken in to the bit."""
    header, verdict = brought(border, as_sent(good, good.sealed), source.federation.moment)
    assert isinstance(verdict, Frame), verdict
    assert header == good.header and body_of(verdict) == good.body
    source.note(good.header.sender, good.sealed)
