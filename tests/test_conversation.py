"""What members say to each other, and what two ends of an edge agree on when links and messages are lost."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from dfl_lora.membership.roster import Roster
from dfl_lora.mixing import metropolis, own
from dfl_lora.networks import Arrived
from dfl_lora.networks.contract import Limits
from dfl_lora.networks.links import Link
from dfl_lora.networks.messages import CHUNK_BYTES, Chunk, Close, Have, Message, decoded
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix, take_back
from dfl_lora.schedules import SCHEDULES
from dfl_lora.tensors import Layout, Tensors
from network.members import CONTRACT, Meeting, Party, frames_of
from network.pipes import ROOM

ONE_EACH = [[0], [1], [2], [3]]
PATIENT = Limits(deadline_s=20, grace_s=3, assemble_s=10)


def exchange(
    meeting: Meeting, t: int, k: int = 0, parties: Sequence[Party] | None = None, size: int = 100
) -> list[Arrived]:
    return meeting.at_once(lambda p: p.exchange(t, k, meeting.graph, frames_of(p, t, size)), parties)


def until(true: Callable[[], bool]) -> None:
    """Waits until something is so, for 10 s at the most."""
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()


def senders(arrived: Arrived, i: int) -> list[int]:
    return sorted(arrived.frames[i])


@pytest.mark.parametrize("hosts", [[[0], [1], [2], [3]], [[0, 2], [1, 3]], [[3, 1, 0], [2]], [[0, 1, 2, 3]]])
@pytest.mark.parametrize("topology", ["ring", "complete", "line"])
def test_every_neighbour_s_frame_arrives_to_the_bit(hosts: list[list[int]], topology: str) -> None:
    with Meeting([sorted(h) for h in hosts], topology) as meeting:
        meeting.assemble()
        for t in range(1, 4):
            for party, arrived in zip(meeting.parties, exchange(meeting, t), strict=True):
                hosted = party.conversation.hosted
                for i in hosted:
                    away = sorted(set(meeting.graph.neighbours(i)) - hosted)
                    assert senders(arrived, i) == away
                    for j in away:
                        frame = arrived.frames[i][j]
                        assert frame is not None and torch.equal(frame.body["x"], torch.full((100,), 1 + j + t / 1000))
        undone = meeting.at_once(lambda p: p.call(p.conversation.finish()))
        assert undone == [[]] * len(hosts)
        assert not any(p.conversation.ledger.frames for p in meeting.parties)
        assert not any(p.conversation.border.refused for p in meeting.parties)


def small_peers(ids: Sequence[int], seed: int) -> Peers:
    layout = Layout.of({"m.A": ("A", (2, 3)), "m.B": ("B", (3, 2))})
    start = Tensors(torch.zeros(layout.size, dtype=torch.float64), layout)
    peers = Peers(ids, start, Tensors(torch.zeros(0), Layout.of({})))
    everyone = torch.randn(8, layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    peers.x.copy_(everyone[list(ids)])
    return peers


def mixing(
    meeting: Meeting, rounds: int, before: Callable[[Party, int], None] = lambda party, t: None
) -> tuple[list[Peers], torch.Tensor]:
    """Mixes for some rounds at all parties, after `before`; returns the peers and the mean at the start."""
    weights = own if meeting.topology(1).weights else metropolis
    method = Method(SCHEDULES["lora"]("shared"), meeting.topology, mixing=weights)
    peers = [small_peers(sorted(p.conversation.hosted), 5) for p in meeting.parties]
    mean = torch.cat([p.x for p in peers]).mean(0)

    def run(party: Party) -> None:
        mine = peers[meeting.parties.index(party)]
        for t in range(1, rounds + 1):
            before(party, t)
            mix(mine, method.schedule(t), method.topology(t), t, method, party)
        before(party, rounds + 1)
        take_back(mine, party.call(party.conversation.finish()), method)

    meeting.at_once(run)
    return peers, mean


def impatient_once(meeting: Meeting, k: int, t: int) -> Callable[[Party, int], None]:
    """Party k gives up soon in round t; in the next one all but k come late, so that it has given up by then."""

    def before(party: Party, now: int) -> None:
        if party is meeting.parties[k]:
            party.conversation.limits = Limits(deadline_s=0.3 if now == t else 20)
        elif now == t + 1:
            time.sleep(0.8)

    return before


def losing(meeting: Meeting, lost: Callable[[str, str, bytes], bool], most: int = 1) -> list[bytes]:
    """Loses the first messages that `lost` chooses, `most` at the most; returns them as they are lost."""
    gone = list[bytes]()

    async def judge(speaker: str, listener: str, message: bytes) -> bool:
        if len(gone) < most and lost(speaker, listener, message):
            gone.append(message)
            return False
        return True

    meeting.wires.judge = judge
    return gone


def losing_have(meeting: Meeting, speaker: int, listener: int, sequence: int) -> list[bytes]:
    """Loses what one member says to another of one frame: that it has it."""
    ids = [member.id for member in meeting.federation.roster.members]

    def it(source: str, target: str, message: bytes) -> bool:
        said = decoded(message)
        return (
            (source, target) == (ids[speaker], ids[listener]) and isinstance(said, Have) and said.sequence == sequence
        )

    return losing(meeting, it)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_the_last_acknowledgement_alone_is_lost_and_the_mean_holds_from_the_next_contact(at_the_end: bool) -> None:
    """One end took the exchange in and the other gave up; it is told with the next frame, or at the end."""
    with Meeting(ONE_EACH, "ring", PATIENT) as meeting:
        meeting.assemble()
        t = 2 if at_the_end else 1
        gone = losing_have(meeting, 1, 2, t)
        peers, mean = mixing(meeting, 2, impatient_once(meeting, 2, t))
        assert len(gone) == 1
        assert [len(p.events("taken-back")) for p in meeting.parties] == [0, 1, 0, 0]
        assert [[e["peers"] for e in p.events("failed-edge")] for p in meeting.parties] == [[], [], [[2, 1]], []]
        assert (torch.cat([p.x for p in peers]).mean(0) - mean).abs().max() < 1e-14
        assert not any(p.conversation.ledger.frames for p in meeting.parties)


def test_a_lost_acknowledgement_without_taking_back_would_move_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above rests on."""
    with Meeting(ONE_EACH, "ring", PATIENT) as meeting:
        meeting.assemble()
        losing_have(meeting, 1, 2, 1)
        for party in meeting.parties:
            monkeypatch.setattr(party.conversation.ledger, "collect", list)
        peers, mean = mixing(meeting, 2, impatient_once(meeting, 2, 1))
        assert (torch.cat([p.x for p in peers]).mean(0) - mean).abs().max() > 1e-3


def test_a_lost_acknowledgement_is_made_good_by_the_next_frame_where_that_comes_in_time() -> None:
    """It is told before the next announcement what the other end took in."""
    with Meeting(ONE_EACH, "ring", PATIENT) as meeting:
        meeting.assemble()
        gone = losing_have(meeting, 1, 2, 1)
        peers, mean = mixing(meeting, 2)
        assert gone and not any(p.events("failed-edge") + p.events("taken-back") for p in meeting.parties)
        assert (torch.cat([p.x for p in peers]).mean(0) - mean).abs().max() < 1e-14


def test_a_link_that_ends_in_the_middle_of_a_body_goes_on_from_there() -> None:
    with Meeting([[0], [1]], "line", PATIENT) as meeting:
        meeting.assemble()
        size, chunks, cut = 3_000_000, list[int](), list[int]()
        ids = [member.id for member in meeting.federation.roster.members]

        async def judge(speaker: str, listener: str, message: bytes) -> bool:
            said = decoded(message)
            if speaker == ids[0] and isinstance(said, Chunk):
                chunks.append(said.offset)
                filled = meeting.parties[1].conversation.pulls.heard_of[0].filled
                if filled >= 3 * CHUNK_BYTES and not cut:
                    cut.append(filled)
                    meeting.wires.cut(*ids)
            return True

        meeting.wires.judge = judge
        for i, arrived in enumerate(exchange(meeting, 1, size=size)):
            assert senders(arrived, i) == [1 - i]
        again = next(k for k in range(1, len(chunks)) if chunks[k] <= chunks[k - 1])
        assert cut[0] <= chunks[again] <= cut[0] + ROOM * CHUNK_BYTES
        assert chunks[again:] == list(range(chunks[again], 4 * size, CHUNK_BYTES))
        assert meeting.parties[0].conversation.links.standing[ids[1]].links == 2


def test_a_have_that_is_lost_with_its_link_is_said_again_on_the_next() -> None:
    """Both ends take the exchange in, though one of them was done when the link ended."""
    with Meeting(ONE_EACH, "ring", PATIENT) as meeting:
        meeting.assemble()
        ids = [member.id for member in meeting.federation.roster.members]

        async def judge(speaker: str, listener: str, message: bytes) -> bool:
            if (speaker, listener) == (ids[1], ids[2]) and isinstance(decoded(message), Have) and not lost:
                lost.append(1)
                await asyncio.sleep(0.1)
                meeting.wires.cut(ids[1], ids[2])
                return False
            return True

        lost: list[int] = []
        meeting.wires.judge = judge
        peers, mean = mixing(meeting, 2)
        assert lost
        assert not any(p.events("failed-edge") + p.events("taken-back") for p in meeting.parties)
        assert (torch.cat([p.x for p in peers]).mean(0) - mean).abs().max() < 1e-14


def test_a_neighbour_that_is_gone_is_not_waited_for() -> None:
    with Meeting(ONE_EACH, "ring", Limits(deadline_s=60, grace_s=0.2, assemble_s=10)) as meeting:
        meeting.assemble()
        exchange(meeting, 1)
        gone = meeting.parties.pop()
        gone.call(gone.conversation.close("stopped"))
        start = time.perf_counter()
        arrived = exchange(meeting, 2)
        assert time.perf_counter() - start < 5
        assert [senders(a, i) for i, a in enumerate(arrived)] == [[1], [0, 2], [1]]
        exchange(meeting, 3)
        assert [len(p.events("failed-edge")) for p in meeting.parties] == [1, 0, 1]  # told once, not in each round
        assert meeting.parties[0].events("gone")


def test_a_neighbour_that_is_cut_off_is_waited_for_only_as_long_as_the_grace() -> None:
    with Meeting([[0], [1]], "line", Limits(deadline_s=60, grace_s=0.5, assemble_s=10)) as meeting:
        meeting.assemble()
        ids = [member.id for member in meeting.federation.roster.members]
        meeting.wires.down |= set(ids)
        meeting.wires.cut(*ids)
        start = time.perf_counter()
        assert [a.frames for a in exchange(meeting, 1)] == [{0: {}}, {1: {}}]
        assert 0.3 < time.perf_counter() - start < 5
        meeting.wires.down.clear()
        meeting.assemble()
        assert [senders(a, i) for i, a in enumerate(exchange(meeting, 2))] == [[1], [0]]


def test_a_slow_neighbour_is_waited_for_until_the_deadline_and_does_not_wait_in_turn() -> None:
    with Meeting(ONE_EACH, "ring", Limits(deadline_s=0.5, grace_s=0.2, assemble_s=10)) as meeting:
        meeting.assemble()
        slow = meeting.parties[3]
        quick = exchange(meeting, 1, parties=meeting.parties[:3])
        assert [senders(a, i) for i, a in enumerate(quick)] == [[1], [0, 2], [1]]
        start = time.perf_counter()
        assert senders(slow.exchange(1, 0, meeting.graph, frames_of(slow, 1)), 3) == []
        assert time.perf_counter() - start < 0.4
        assert [senders(a, i) for i, a in enumerate(exchange(meeting, 2))] == [[1, 3], [0, 2], [1, 3], [0, 2]]


def test_one_that_comes_late_catches_up_and_is_taken_in() -> None:
    """It goes through the rounds that the others did without it, and finds their announcement when it is there."""
    with Meeting([[0], [1]], "line", Limits(deadline_s=0.3, grace_s=0.2, assemble_s=10)) as meeting:
        meeting.assemble()
        first = meeting.parties[0]
        for t in range(1, 5):
            first.exchange(t, 0, meeting.graph, frames_of(first, t))
        first.conversation.limits = Limits(deadline_s=20)

        def rest(party: Party) -> list[list[int]]:
            i = min(party.conversation.hosted)
            rounds = range(5, 7) if party is first else range(1, 7)
            return [senders(party.exchange(t, 0, meeting.graph, frames_of(party, t)), i) for t in rounds]

        assert meeting.at_once(rest) == [[[1], [1]], [[], [], [], [], [0], [0]]]


def test_an_edge_that_fails_is_out_for_the_rest_of_the_round() -> None:
    with Meeting(ONE_EACH, "ring", Limits(deadline_s=0.6, grace_s=0.2, assemble_s=10)) as meeting:
        meeting.assemble()
        losing_have(meeting, 1, 2, 1)
        first, second, third = (exchange(meeting, t, k) for t, k in ((1, 0), (1, 1), (2, 0)))
        assert senders(first[2], 2) == [3]
        assert [senders(second[1], 1), senders(second[2], 2)] == [[0], [3]]
        assert [senders(third[1], 1), senders(third[2], 2)] == [[0, 2], [1, 3]]
        assert [(u.peer, u.neighbour, u.round, u.exchange) for a in second + third for u in a.undone] == [(1, 2, 1, 0)]


def test_one_that_begins_again_from_its_checkpoint_is_told_apart_and_its_flows_are_taken_back() -> None:
    with Meeting([[0], [1]], "line", Limits(deadline_s=1, grace_s=0.3, assemble_s=10)) as meeting:
        meeting.assemble()
        exchange(meeting, 1)
        kept = meeting.parties[1].conversation.ledger.applied()
        exchange(meeting, 2)
        meeting.wires.cut(*(member.id for member in meeting.federation.roster.members))
        old = meeting.parties.pop()
        old.call(old.conversation.close("stopped"))
        meeting.parties.append(meeting.join(1, applied=kept, first=2))
        meeting.assemble()
        first = meeting.parties[0]
        again = meeting.parties[1].exchange(2, 0, meeting.graph, frames_of(meeting.parties[1], 2))
        assert senders(again, 1) == []
        arrived = exchange(meeting, 3)
        assert [(u.peer, u.neighbour, u.round) for u in arrived[0].undone] == [(0, 1, 2)]
        assert [senders(a, i) for i, a in enumerate(arrived)] == [[1], [0]]
        assert not any(first.conversation.border.strikes(id) for id in first.conversation.border.refused)


def test_of_two_processes_with_one_identity_the_later_one_is_linked_and_both_are_told() -> None:
    """They do not take the link from each other, and nobody is banned for it."""
    with Meeting([[0], [1]], "line") as meeting:
        meeting.assemble()
        first = meeting.parties[0]  # the smaller id dials
        twin = meeting.join(0)
        meeting.parties.append(twin)
        until(lambda: bool(first.events("refused")))
        assert "two processes have this identity" in first.events("refused")[0]["why"]
        other = meeting.parties[1].conversation
        assert "two processes have this identity" in meeting.parties[1].events("refused")[0]["why"]
        assert other.links.open[first.conversation.identity.id].hello.session == twin.conversation.session
        assert not other.border.refused
        assert other.links.standing[first.conversation.identity.id].links == 2


def test_one_that_is_rounds_behind_is_waited_for_no_longer_than_the_grace() -> None:
    with Meeting([[0], [1]], "line", Limits(deadline_s=60, grace_s=0.3, assemble_s=10)) as meeting:
        meeting.assemble()
        quick, slow = meeting.parties
        quick.conversation.limits = Limits(deadline_s=0.3, grace_s=0.3)
        for t in range(1, 4):
            quick.exchange(t, 0, meeting.graph, frames_of(quick, t))
        quick.conversation.limits = Limits(deadline_s=60, grace_s=0.3)
        slow.exchange(1, 0, meeting.graph, frames_of(slow, 1))
        start = time.perf_counter()
        quick.exchange(4, 0, meeting.graph, frames_of(quick, 4))
        assert 0.2 < time.perf_counter() - start < 5
        assert quick.events("failed-edge")[-1]["why"].endswith("rounds behind")


@pytest.mark.parametrize("topology", ["base", "random_matching"])
def test_not_every_edge_is_in_every_round_and_the_mean_stays(topology: str) -> None:
    with Meeting([[0], [1, 4], [2], [3]], topology) as meeting:
        meeting.assemble()
        peers, mean = mixing(meeting, 10)
        assert torch.allclose(torch.cat([p.x for p in peers]).mean(0), mean, rtol=0, atol=1e-14)
        assert not any(p.events("failed-edge") for p in meeting.parties)
        if topology == "base":
            assert all(torch.allclose(x, mean, rtol=0, atol=1e-14) for p in peers for x in p.x)


def test_one_that_waits_for_another_where_the_graph_changes_is_not_behind() -> None:
    """Of three peers 2 meets 0 in rounds 2 and 5 alone; 1 is late in round 3, and 2 waits for longer than its grace."""
    with Meeting([[0], [1], [2]], "base", Limits(deadline_s=20, grace_s=0.3, assemble_s=10)) as meeting:
        meeting.assemble()
        peers, mean = mixing(meeting, 6, lambda party, t: time.sleep(1.5 * (t == 3 and party is meeting.parties[1])))
        assert not any(p.events("failed-edge") for p in meeting.parties)
        assert all(torch.allclose(p.x[0], mean, rtol=0, atol=1e-14) for p in peers)


def test_one_that_begins_again_does_not_wait_for_the_lost_where_others_have_gone_on() -> None:
    with Meeting(ONE_EACH, "ring", Limits(deadline_s=60, grace_s=0.3, assemble_s=60)) as meeting:
        meeting.assemble()
        exchange(meeting, 1)
        for gone in (meeting.parties.pop(3), meeting.parties.pop(2)):
            gone.call(gone.conversation.close("stopped"))
        exchange(meeting, 2)
        exchange(meeting, 3)
        again = meeting.join(2, first=2)
        meeting.parties.append(again)
        start = time.perf_counter()
        again.call(again.conversation.assemble())  # peer 3 does not come back
        assert time.perf_counter() - start < 10
        assert again.events("absent")[0]["peers"] == [3]


def test_a_close_of_an_earlier_round_opens_no_edge_again() -> None:
    with Meeting([[0], [1]], "line") as meeting:
        meeting.assemble()
        conversation = meeting.parties[0].conversation
        conversation.next = (5, 0)
        link = next(iter(conversation.links.open.values()))
        for round in (5, 4, 99):
            conversation.take_close(link, Close(round=round, edges=[(1, 0)]))
        assert conversation.closed == {(0, 1): 5}


def test_a_roster_that_cannot_be_written_down_counts_all_the_same() -> None:
    with Meeting(ONE_EACH, "ring") as meeting:
        meeting.assemble()
        older, first = meeting.federation.roster, meeting.parties[0]

        def keep(roster: Roster) -> None:
            raise OSError(28, "No space left on device")

        first.conversation.keep = keep
        newer = replace(older, epoch=2).sealed_by(meeting.federation.organiser)
        meeting.loop.call_soon_threadsafe(meeting.parties[2].conversation.adopt, newer)
        until(lambda: all(p.conversation.roster.epoch == 2 for p in meeting.parties))
        assert "No space left" in first.events("error")[0]["why"]
        assert [len(a.frames[i]) for i, a in enumerate(exchange(meeting, 1))] == [2] * 4


def test_whatever_goes_wrong_on_a_link_it_is_dialled_again() -> None:
    with Meeting([[0], [1]], "line", PATIENT) as meeting:
        meeting.assemble()
        dialler, heard = meeting.parties[0].conversation, list[Message]()

        def breaks(link: Link, message: Message) -> None:
            heard.append(message)
            dialler.heard = whole  # type: ignore[method-assign]
            raise RuntimeError("something nobody thought of")

        whole = dialler.heard
        dialler.heard = breaks  # type: ignore[method-assign]
        exchange(meeting, 1)
        assert heard and "nobody thought of" in meeting.parties[0].events("error")[0]["why"]
        assert dialler.links.standing[meeting.parties[1].conversation.identity.id].links == 2


@pytest.mark.parametrize("key", ["recipe", "base", "frozen", "start"])
def test_the_first_difference_is_named_on_both_sides(key: str) -> None:
    with Meeting([[0], [1]], "line") as meeting:
        meeting.assemble()
        old = meeting.parties.pop()
        old.call(old.conversation.close("stopped"))
        other = {**vars(CONTRACT), key: "9" * 64, "start": "8" * 64 if key != "start" else "9" * 64}
        stranger = meeting.join(1, contract=type(CONTRACT)(**other))
        meeting.parties.append(stranger)
        deadline = time.monotonic() + 10
        while not all(p.events("refused") for p in meeting.parties) and time.monotonic() < deadline:
            time.sleep(0.02)
        name = {"recipe": "recipe digest", "base": "frozen base", "frozen": "frozen factors", "start": "start"}[key]
        for party in meeting.parties:
            assert name in party.events("refused")[0]["why"]
            assert "99999999" in party.events("refused")[0]["why"]
        assert not meeting.parties[0].conversation.links.open


def test_a_member_that_hosts_no_neighbour_is_refused() -> None:
    with Meeting([[0], [1], [2]], "line") as meeting:
        meeting.assemble()
        ends = [meeting.parties[0], meeting.parties[2]]
        for own, other in (ends, ends[::-1]):
            meeting.loop.call_soon_threadsafe(own.conversation.links.want, [other.conversation.identity.id])
        deadline = time.monotonic() + 10
        while not all(p.events("refused") for p in ends) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert all("hosts no neighbour" in p.events("refused")[0]["why"] for p in ends)
        assert [len(p.conversation.links.open) for p in meeting.parties] == [1, 2, 1]


def test_two_that_nobody_can_dial_are_told_so_and_do_not_wait_for_each_other() -> None:
    with Meeting([[0], [1]], "line", addresses=False) as meeting:
        meeting.assemble()
        assert all("nobody can dial" in p.events("refused")[0]["why"] for p in meeting.parties)
        assert [a.frames for a in exchange(meeting, 1)] == [{0: {}}, {1: {}}]


def test_a_roster_of_a_higher_epoch_travels_and_a_lower_one_does_not() -> None:
    with Meeting(ONE_EACH, "ring") as meeting:
        meeting.assemble()
        older = meeting.federation.roster
        newer = type(older)(**{**vars_of(older), "epoch": 2}).sealed_by(meeting.federation.organiser)
        first = meeting.parties[0]
        meeting.loop.call_soon_threadsafe(first.conversation.adopt, newer)
        deadline = time.monotonic() + 10
        while any(p.conversation.roster.epoch < 2 for p in meeting.parties) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [p.conversation.roster.epoch for p in meeting.parties] == [2] * 4
        meeting.loop.call_soon_threadsafe(first.conversation.adopt, older)
        arrived = exchange(meeting, 1)
        assert [p.conversation.roster.epoch for p in meeting.parties] == [2] * 4
        assert [len(a.frames[i]) for i, a in enumerate(arrived)] == [2] * 4


def vars_of(roster: object) -> dict[str, object]:
    names = ("organiser", "epoch", "run", "recipe", "num_peers", "members", "signature")
    return {name: getattr(roster, name) for name in names}
