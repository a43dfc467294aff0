"""What members of a federation must agree on before they talk, and what each sets for itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contract:
    """What all members agreed to, as digests."""

    recipe: str
    base: str
    frozen: str
    start: str


@dataclass(frozen=True)
class Limits:
    """How long a member waits, in seconds, and how long a message may be against the own one."""

    deadline_s: float = 600.0
    grace_s: float = 3.0
    assemble_s: float = 600.0
    norm_bound: float = 1000.0
