"""A peer under attack over real TLS: beside it an honest neighbour, with whom it goes on to the bit as if nothing were.

One process is attacked, two others gossip with it, and this one attacks it in every way there is. After each attack
some rounds are done and all adapters compared with what the same peers come to in one process without any network.
"""

import asyncio
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from dfl_lora.membership.identity import Identity, new_identity, public_of
from dfl_lora.networks import messages
from dfl_lora.networks.messages import Announce, Bye, Chunk, Close, Message, Pull, Refused, Settle, encoded
from dfl_lora.networks.sealed import Opened, open_sealed
from forging import ORGANISER, signed
from network.attacked import APART, ELSEWHERE, HONEST, NEAR, VICTIM, WEAK, Attacked
from network.attackers import (
    PREFACE,
    SETTINGS,
    Dripping,
    Recorder,
    Rogue,
    admitted,
    answered,
    context_of,
    dialled,
    forged,
    hang_up,
)
from network.processes import Line, until

CUT_OFF_S = 10.0
"""Within which whoever does not get to a hello is cut off."""


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    siege = Attacked(tmp_path_factory.mktemp("siege"))
    try:
        siege.begin()
        yield siege
    finally:
        siege.close()


def tls12(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.fixture(scope="module", autouse=True)
def drips(siege: Attacked) -> dict[str, Dripping]:
    """Those who drip, and those who are dialled, take their time: what became of them is asked at the end."""
    own = context_of(siege.identities[NEAR + 1], siege.folder)
    connections = dialled(siege.port), own.wrap_socket(dialled(siege.port)), own.wrap_socket(dialled(siege.port))
    connections[2].sendall(PREFACE + SETTINGS)
    there, thief = siege.identities[ELSEWHERE], siege.identities[NEAR]
    siege.elsewhere.faces = [
        context_of(thief, siege.folder, server=True),
        context_of(forged(there.id, thief), siege.folder, more=thief.certificate, server=True),
        context_of(forged(there.id, new_identity()), siege.folder, server=True),
        tls12(context_of(thief, siege.folder, server=True)),
        None,
    ]
    return {
        "in the handshake": Dripping(connections[0], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
        "in the first bytes of HTTP/2": Dripping(connections[1], PREFACE + SETTINGS),
        "after them": Dripping(connections[2], SETTINGS),
    }


# ---- outsiders


OUTSIDERS: dict[str, tuple[Callable[[Attacked], ssl.SSLContext], str]] = {
    "without a certificate": (lambda s: context_of(None, s.folder), "without a certificate"),
    "with a stranger's": (lambda s: context_of(new_identity(), s.folder), "not in the roster"),
    "with the victim's name on its own": (
        lambda s: context_of(forged(s.identities[VICTIM].id, new_identity()), s.folder), "not in the roster",
    ),
    "with a member's name, signed by another member": (
        lambda s: context_of(
            forged(s.identities[HONEST].id, s.identities[NEAR]), s.folder, more=s.identities[NEAR].certificate
        ), "not in the roster",
    ),
    "with TLS 1.2": (lambda s: tls12(context_of(s.identities[NEAR], s.folder)), "TLS 1.2"),
}  # fmt: skip


@pytest.mark.parametrize("who", OUTSIDERS)
def test_one_that_does_not_belong_gets_no_word_and_the_reason_is_told(siege: Attacked, who: str) -> None:
    make, reason = OUTSIDERS[who]

    def count() -> int:
        return sum(n for why, n in siege.victim.look()["handshakes"].items() if reason in why)

    before = count()
    assert not admitted(siege.port, make(siege))
    until(lambda: count() > before)
    assert any(reason in why for why in siege.refused(None))
    siege.go(2)


def test_a_member_is_admitted_by_the_same_means(siege: Attacked) -> None:
    """What the tests above rest on."""
    assert admitted(siege.port, context_of(siege.identities[NEAR], siege.folder))


PLAIN = {
    "HTTP/2": PREFACE + SETTINGS,
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a proxy's request": b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
    "noise": bytes(range(256)) * 40,
    "nothing": b"",
}


@pytest.mark.parametrize("what", PLAIN)
def test_one_that_speaks_without_tls_gets_no_word(siege: Attacked, what: str) -> None:
    """But for an alert, which is a TLS record of 7 bytes."""
    assert len(answered(siege.port, PLAIN[what])) <= 7
    if what == "HTTP/1.1":
        until(lambda: any("speaks without TLS" in why for why in siege.refused(None)))
    siege.go(1)


def test_a_session_that_was_recorded_is_worth_nothing_again(siege: Attacked) -> None:
    """The neighbours' links run through a recorder from the start."""
    tapes = [bytes(tape) for tape in siege.recorder.recorded if len(tape) > 10_000]
    assert len(tapes) >= 2
    links = siege.seen(siege.identities[HONEST])["links"]
    for tape in tapes:
        answered(siege.port, tape)
    siege.go(2)
    assert siege.seen(siege.identities[HONEST])["links"] == links


def test_five_hundred_connections_that_say_nothing_keep_nobody_out(siege: Attacked) -> None:
    for end in (hang_up, socket.socket.close) * 2:
        flood = [dialled(siege.port) for _ in range(500)]
        siege.go(1)
        assert admitted(siege.port, context_of(siege.identities[NEAR], siege.folder))
        for connection in flood:
            end(connection)
        siege.go(1)


# ---- members that say what is not so


FALSE = {
    "protocol": "protocol version", "federation": "federation", "run": "run", "recipe": "recipe digest",
    "base": "digest of the frozen base", "frozen": "digest of the frozen factors", "start": "digest of the start",
}  # fmt: skip


@pytest.fixture(scope="module")
def liar(siege: Attacked) -> Identity:
    return next(siege.unused)


@pytest.mark.parametrize("key", FALSE)
def test_a_member_with_another_contract_is_refused_on_both_sides_with_the_first_difference(
    siege: Attacked, liar: Identity, key: str
) -> None:
    async def attack() -> str:
        rogue = await siege.rogue(liar)
        await rogue.say(rogue.hello(**{key: 2 if key == "protocol" else "9" * 32}))
        refusal = await rogue.hears(Refused)
        await asyncio.wait_for(rogue.ended.wait(), 5)
        await rogue.close()
        return str(refusal.why)

    why = siege.run(attack())
    assert why.startswith(f"the {FALSE[key]} differs") and (key == "protocol" or "9999" in why)
    assert why in siege.refused(liar)


FIRST_WORDS: dict[str, tuple[Callable[[Rogue], Message | bytes], str]] = {
    "a hello in another's name": (lambda r: r.hello(id=r.roster.members[HONEST].id), "it says that it is"),
    "a hello in the victim's name": (lambda r: r.hello(id=r.roster.members[VICTIM].id), "it says that it is itself"),
    "an announcement": (lambda r: Announce(b"DFLL"), "its first word was announce"),
    "nothing": (lambda r: b"", "no message begins with"),
    "JSON with one key too many": (lambda r: b'B{"why":"finished","\\u001b[31m":1}', "Extra inputs"),
    "JSON without an end": (lambda r: b'H{"protocol":' + b"[" * 10_000, "hello"),
    "a name that is none": (lambda r: encoded(r.hello(session="\x1b[31m")), "session"),
    "a bye": (lambda r: Bye(why="finished"), "its first word was bye"),
}


@pytest.mark.parametrize("what", FIRST_WORDS)
def test_a_member_whose_first_word_is_no_hello_of_its_own_is_refused(
    siege: Attacked, liar: Identity, what: str
) -> None:
    make, reason = FIRST_WORDS[what]

    async def attack() -> str:
        rogue = await siege.rogue(liar)
        await rogue.say(make(rogue))
        refusal = await rogue.hears(Refused)
        await rogue.close()
        return str(refusal.why)

    why = siege.run(attack())
    assert reason in why and why.isprintable()
    until(lambda: any(reason in told for told in siege.refused(liar)))


def test_a_member_that_is_no_neighbour_is_refused(siege: Attacked) -> None:
    async def attack() -> str:
        rogue = await siege.rogue(siege.identities[APART])
        await rogue.say(rogue.hello())
        why = (await rogue.hears(Refused)).why
        await rogue.close()
        return str(why)

    assert "no neighbour" in siege.run(attack())


# ---- members that are linked


def test_frames_of_another_and_frames_again_are_refused(siege: Attacked) -> None:
    """A sequence that was used is used up, also in a frame that says less."""
    heard: list[Announce] = []

    async def listen() -> Rogue:
        near = await siege.linked(siege.identities[NEAR])

        async def judge(message: Message) -> None:
            heard.extend([message] if isinstance(message, Announce) else [])

        near.judge = judge
        return near

    async def attack() -> Rogue:
        rogue = await siege.linked()
        opened = open_sealed(heard[0].sealed)
        assert isinstance(opened, Opened)
        next = {"round": opened.header.round + 1}
        newer, older = (siege.sealed(rogue, heard[0], sequence=n, **next) for n in (9, 8))
        again = siege.sealed(rogue, heard[0], sequence=9, length=1, **next)
        for sealed in (*[heard[0].sealed] * 3, newer, newer, newer, older, again):
            await rogue.say(Announce(sealed))
        return rogue

    near = siege.run(listen(), settle=False)
    siege.go(1)
    rogue = siege.run(attack(), settle=False)
    until(lambda: siege.seen(rogue.identity)["refused"] == {"identity": 3, "duplicate": 2, "replayed": 2})
    assert siege.seen(rogue.identity)["strikes"] == 5
    siege.run(rogue.close(), settle=False)
    siege.run(near.close())


def test_a_body_of_100_gb_is_refused_before_anything_is_allocated_for_it(siege: Attacked) -> None:
    async def attack() -> Rogue:
        near = await siege.linked(siege.identities[NEAR], far=False)

        async def judge(message: Message) -> None:
            if isinstance(message, Announce):
                await near.say(Announce(siege.sealed(near, message, length=100 * 10**9)))

        near.judge = judge
        return near

    before = siege.victim.look()["rss"]
    near = siege.run(attack(), settle=False)
    siege.go(2)
    siege.run(near.close())
    seen = siege.seen(near.identity)
    assert seen["refused"]["size"] == 2
    assert any(why.startswith("size: a body of 100000000000 bytes") for why in siege.refused(near.identity))
    assert siege.victim.look()["rss"] - before < 16 * 2**20


def test_a_body_that_comes_byte_by_byte_is_waited_for_until_the_deadline(siege: Attacked) -> None:
    slow = Recorder(siege.port)

    async def attack() -> Rogue:
        near = await siege.linked(siege.identities[NEAR], slow.port, far=False)

        async def judge(message: Message) -> None:
            if isinstance(message, Announce):
                await near.say(Announce(siege.sealed(near, message)))
            elif isinstance(message, Pull):
                slow.slow.set()
                await near.say(Chunk(message.sender, message.sequence, 0, memoryview(bytes(800_000))))

        near.judge = judge
        return near

    near, events = siege.run(attack(), settle=False), len(siege.victim.events("failed-edge"))
    start = time.monotonic()
    siege.go(1, deadline_s=1.0)
    assert 1 < time.monotonic() - start < 3
    failed = [e for e in siege.victim.events("failed-edge")[events:] if NEAR in e["peers"]]
    assert failed[-1]["why"].endswith("it was not ready within 1 s")
    slow.close()
    siege.run(near.close())


def test_a_message_that_is_larger_than_any_ends_the_link_and_a_member_that_garbles_is_banned(siege: Attacked) -> None:
    """Ten strikes; then its hello is refused too, and everybody who asks is told why."""

    async def attack() -> Rogue:
        rogue = await siege.linked()
        await rogue.say(b"K" + bytes(8 * 2**20))
        await asyncio.wait_for(rogue.ended.wait(), 5)
        again = await siege.linked(rogue.identity)
        for _ in range(1000):
            await again.say(b"Z" * 100)
        await asyncio.wait_for(again.ended.wait(), 5)
        last = await siege.rogue(rogue.identity)
        await last.say(last.hello())
        assert "banned" in (await last.hears(Refused)).why
        for one in (rogue, again, last):
            await one.close()
        return rogue

    rogue = siege.run(attack(), count=5)
    assert [e["why"] for e in siege.victim.events("banned", rogue.identity.id)] != []
    seen = siege.seen(rogue.identity)
    assert seen["state"] == "banned" and 10 <= seen["strikes"] < 20


FLOODS: dict[str, Callable[[Attacked, Rogue, int], Message | bytes]] = {
    "pulls of everything": lambda s, r, n: Pull(sender=VICTIM, sequence=n // 100, offset=0),
    "pieces that nobody asked for": lambda s, r, n: Chunk(r.roster.num_peers - 1, n, 0, memoryview(bytes(2**16))),
    "settling": lambda s, r, n: Settle(now=(n, 0), ready=True, taken=[(NEAR, VICTIM, n, 0)] * 10),
    "closing": lambda s, r, n: Close(round=n, edges=[(NEAR, VICTIM), (HONEST, VICTIM), (VICTIM, HONEST)]),
    "the same roster": lambda s, r, n: messages.Roster(s.roster.to_json()),
    "hello": lambda s, r, n: r.hello(),
}
"""Nothing that would be wrong, and far too much of it."""


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_of_what_is_not_wrong_changes_nothing(siege: Attacked, what: str) -> None:
    async def attack() -> None:
        rogue = await siege.linked()
        for n in range(1000):
            await rogue.say(FLOODS[what](siege, rogue, n))
        await rogue.close()

    before = siege.victim.look()["rss"]
    siege.run(attack(), count=5)
    assert siege.victim.look()["rss"] - before < 32 * 2**20


def test_a_neighbour_that_pulls_again_and_again_gets_one_body_at_a_time(siege: Attacked) -> None:
    pieces: list[int] = []

    async def attack() -> Rogue:
        near = await siege.linked(siege.identities[NEAR], far=False)

        async def judge(message: Message) -> None:
            if isinstance(message, Chunk):
                pieces.append(len(message.data))
            elif isinstance(message, Announce):
                opened = open_sealed(message.sealed)
                assert isinstance(opened, Opened)
                for _ in range(500):
                    await near.say(Pull(sender=VICTIM, sequence=opened.header.sequence, offset=0))

        near.judge = judge
        return near

    before = siege.victim.look()["rss"]
    near = siege.run(attack(), settle=False)
    siege.go(2, deadline_s=1.0)
    assert pieces and sum(pieces) < 500 * 800_000
    assert siege.victim.look()["rss"] - before < 32 * 2**20
    siege.run(near.close())


def test_a_roster_of_another_organiser_is_a_strike_and_one_that_is_damaged_too(siege: Attacked) -> None:
    async def attack() -> Rogue:
        rogue = await siege.linked()
        theirs = signed(replace(siege.roster, organiser=public_of(ORGANISER), epoch=9))
        await rogue.say(messages.Roster(theirs), messages.Roster(siege.roster.to_json()[:-1]))
        return rogue

    rogue = siege.run(attack(), settle=False)
    until(lambda: siege.seen(rogue.identity)["strikes"] == 2)
    assert not siege.victim.events("roster")
    siege.run(rogue.close())


# ---- at the end


def test_nobody_passes_for_a_member_that_is_dialled(siege: Attacked) -> None:
    """Not with its own certificate, nor one in the member's name that another member signed, nor without TLS."""
    there = siege.identities[ELSEWHERE].id
    until(lambda: siege.elsewhere.tried >= len(siege.elsewhere.faces), 20)
    assert siege.elsewhere.fooled == 0
    assert any("CERTIFICATE_VERIFY_FAILED" in e["why"] for e in siege.victim.events("unreachable", there))
    assert not siege.victim.events("linked", there)
    siege.go(2)


def test_a_neighbour_that_is_killed_is_noticed_within_a_second_and_the_rest_goes_on(siege: Attacked) -> None:
    killed = siege.processes.pop(WEAK)
    start = time.monotonic()
    killed.send(signal.SIGKILL)
    (lost,) = until(lambda: siege.victim.events("lost", siege.identities[WEAK].id))
    assert lost["heard"] - start < 1
    killed.close()
    siege.right.leave(WEAK)
    siege.go(5)


def test_whoever_drips_before_a_hello_is_cut_off(siege: Attacked, drips: dict[str, Dripping]) -> None:
    for where, drip in drips.items():
        lasted = until(lambda drip=drip: drip.lasted, CUT_OFF_S + 5)
        assert lasted and lasted < CUT_OFF_S + 4, where
    siege.go(1)


def test_after_all_this_the_peer_is_as_large_as_before_and_ends_in_good_order(siege: Attacked) -> None:
    before = siege.at_first

    def quiet() -> Line | None:
        now = siege.victim.look()
        return now if now["fds"] <= before["fds"] else None

    after = until(quiet, 15)
    assert after is not None and after["threads"] <= before["threads"] + 2
    assert after["rss"] - before["rss"] < 64 * 2**20
    for process in siege.processes:  # each waits for the other's last word
        process.tell(do="end")
    ended = [process.end() for process in siege.processes]
    right = siege.right.digests()
    assert [e["digests"] for e in ended] == [{"0": right["0"]}, {"1": right["1"]}]
