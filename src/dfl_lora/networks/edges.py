"""What the two ends of an edge agree on, as far as two ends can.

In an exchange each end of an edge (i, j) sends its frame and says `have` when the other's has come. An edge is
complete for i when j's frame and j's `have` are there: then j has i's frame, and i takes the flow w_ij (q_j - q_i) in.
An edge that does not get so far is out for the rest of the round, and the other end is told.

Where the last `have` is lost, one end is complete and the other is not, and no protocol can do away with that. So each
end keeps both frames of the last exchange that it took in (`Ledger`) until the other end has told, in `settle`, what it
took in last: the same, and the frames are forgotten; an earlier one, and the flow is taken back. As every announcement
is preceded by a `settle`, one exchange at most is open on an edge.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dfl_lora.codecs.frames import Frame
from dfl_lora.networks import Undone
from dfl_lora.networks.messages import BEFORE

Edge = tuple[int, int]
"""(hosted peer, peer of another member)."""
Moment = tuple[int, int]
Verdict = Literal["open", "agreed", "undone", "lost"]
Applied = Sequence[tuple[int, int, int, int]]
"""(hosted peer, neighbour, round, exchange) for each edge: what the hosted peers took in last."""


@dataclass
class Open:
    """An exchange in progress."""

    moment: Moment
    frames: Mapping[int, Frame]
    """Of the hosted peers, as sent."""
    sequences: Mapping[int, int]
    edges: frozenset[Edge]
    out: set[Edge] = field(default_factory=set)
    """Edges that are given up, at one end or at the other."""
    got: dict[int, Frame] = field(default_factory=dict)
    """By sender."""
    acknowledged: set[Edge] = field(default_factory=set)

    def complete(self, edge: Edge) -> bool:
        return edge not in self.out and edge[1] in self.got and edge in self.acknowledged

    def pending(self) -> list[Edge]:
        """Returns the edges of which nothing is known yet."""
        return [edge for edge in self.edges - self.out if not self.complete(edge)]

    def give_up(self, senders: Iterable[int]) -> None:
        """Leaves out the edges to peers of which nothing good has come."""
        self.out |= {edge for edge in self.edges if edge[1] in set(senders) - self.got.keys()}

    def acknowledge(self, sender: int, sequence: int, receivers: Iterable[int]) -> None:
        """Notes that another member, which hosts `receivers`, has the frame of a hosted peer."""
        if self.sequences.get(sender) == sequence:
            self.acknowledged |= {(sender, j) for j in receivers} & self.edges

    def arrived(self) -> dict[int, dict[int, Frame]]:
        """Returns receiver -> sender -> frame of the complete edges."""
        boxes: dict[int, dict[int, Frame]] = {i: {} for i in self.frames}
        for i, j in sorted(self.edges):
            if self.complete((i, j)):
                boxes[i][j] = self.got[j]
        return boxes


@dataclass
class Ledger:
    """What each edge took in last, and both frames of it until the other end has told the same."""

    taken: dict[Edge, Moment] = field(default_factory=dict)
    frames: dict[Edge, tuple[Frame, Frame]] = field(default_factory=dict)
    told: dict[Edge, Moment] = field(default_factory=dict)
    """What the other end said last that it took in."""
    undone: list[Undone] = field(default_factory=list)
    """What is to be taken back, until the loop asks for it."""

    @staticmethod
    def of(applied: Applied) -> "Ledger":
        return Ledger({(i, j): (t, k) for i, j, t, k in applied})

    def applied(self) -> list[tuple[int, int, int, int]]:
        return [(*edge, *moment) for edge, moment in sorted(self.taken.items())]

    def taken_from(self, sender: int) -> set[Moment]:
        """Returns the last exchanges in which hosted peers took something in from a neighbour."""
        return {moment for (_, j), moment in self.taken.items() if j == sender}

    def take_in(self, exchange: Open) -> None:
        """Writes down the complete edges of an exchange that is over."""
        for edge in exchange.edges:
            if exchange.complete(edge):
                self.taken[edge] = exchange.moment
                if self.told.get(edge) == exchange.moment:
                    continue  # the other end was quicker, and has told already
                self.frames[edge] = exchange.frames[edge[0]], exchange.got[edge[1]]

    def settle(self, edge: Edge, theirs: Moment, now: Moment) -> Verdict:
        """Compares with what the other end took in last; what lies before `now` is final.

        `open`: it may yet take it in. `agreed`: both took in the same, or the other end has something to take back.
        `undone`: the flow of the own last exchange is to be taken back. `lost`: it should be, but its frames went with
        a process that ended.
        """
        own = self.taken.get(edge, BEFORE)
        self.told[edge] = theirs
        if own >= now and own != theirs:
            return "open"
        kept = self.frames.pop(edge, None)
        if own <= theirs:
            return "agreed"
        self.taken[edge] = theirs
        if kept is None:
            return "lost"
        self.undone.append(Undone(*edge, *own, *kept))
        return "undone"

    def collect(self) -> list[Undone]:
        """Returns what is to be taken back, once."""
        undone, self.undone = self.undone, []
        return undone
