"""Streams over gRPC: what is said arrives, who says it is known, and nobody else gets in."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dfl_lora.errors import UserError
from dfl_lora.membership.identity import Identity, new_identity
from dfl_lora.membership.roster import Member, Roster, first_roster
from dfl_lora.networks.grpc_transport import GrpcTransport
from dfl_lora.networks.messages import MOST_BYTES
from dfl_lora.networks.transport import Stream, Unreachable
from forging import ORGANISER, RECIPE
from network.attackers import admitted, context_of
from network.processes import free_port


class Three:
    """Three identities; a roster of the first two. The first listens, and says again whatever it hears."""

    def __init__(self) -> None:
        self.identities = [new_identity() for _ in range(3)]
        members = [Member.of(identity, [i], ["127.0.0.1:7000"]) for i, identity in enumerate(self.identities)]
        self.all = first_roster(ORGANISER, RECIPE, 3, members)
        self.two = replace(self.all, members=self.all.members[:2]).sealed_by(ORGANISER)
        self.callers: list[bytes | None] = []
        self.ended: list[bool] = []

    async def echo(self, stream: Stream) -> None:
        self.callers.append(stream.certificate)
        while (content := await stream.read()) is not None and content != b"end":
            await stream.write(content)
        self.ended.append(content is None)
        await stream.close()

    def transport(self, number: int, roster: Roster, *, insecure: bool = False) -> GrpcTransport:
        transport = GrpcTransport(self.identities[number], insecure=insecure)
        transport.trust(roster)
        return transport


async def heard(stream: Stream, *messages: bytes) -> list[bytes | None]:
    """Says each and returns what comes back."""
    answers = []
    for message in messages:
        await stream.write(message)
        answers.append(await asyncio.wait_for(stream.read(), 10))
    return answers


async def messages_come_back_as_they_were_and_the_caller_is_known(
    three: Three, listens: GrpcTransport, at: str
) -> None:
    for insecure in (False, True):
        server = three.transport(0, three.two, insecure=insecure) if insecure else listens
        place = f"127.0.0.1:{await server.listen('127.0.0.1:0', three.echo)}" if insecure else at
        stream = await three.transport(1, three.two, insecure=insecure).dial(three.two.members[0], place)
        sent = [b"", b"x", bytes(range(256)) * 100, bytes(MOST_BYTES)]
        assert await heard(stream, *sent) == sent
        assert three.callers[-1] == (None if insecure else three.two.members[1].certificate)
        assert stream.certificate == (None if insecure else three.two.members[0].certificate)
        await stream.close()
        await stream.close()
        assert await stream.read() is None
        await stream.write(b"to nobody")
        while len(three.ended) < len(three.callers):
            await asyncio.sleep(0.01)
        assert three.ended[-1]
        if insecure:
            await server.close()


async def a_stream_that_the_listener_closes_ends_for_the_dialler(three: Three, listens: GrpcTransport, at: str) -> None:
    stream = await three.transport(1, three.two).dial(three.two.members[0], at)
    assert await heard(stream, b"end") == [None]
    await stream.close()


async def a_message_that_is_too_large_ends_the_stream(three: Three, listens: GrpcTransport, at: str) -> None:
    stream = await three.transport(1, three.two).dial(three.two.members[0], at)
    assert await heard(stream, bytes(MOST_BYTES + 2000)) == [None]
    await stream.close()


async def a_new_roster_counts_at_once(three: Three, listens: GrpcTransport, at: str) -> None:
    """Other handshakes go on meanwhile, and no link ends."""
    third, before = three.transport(2, three.all), await three.transport(1, three.two).dial(three.two.members[0], at)
    with pytest.raises(Unreachable):
        await third.dial(three.all.members[0], at)
    listens.trust(three.all)
    stream = await third.dial(three.all.members[0], at)
    assert await heard(stream, b"hello") == [b"hello"] == await heard(before, b"hello")
    assert three.callers[-1] == three.all.members[2].certificate
    listens.trust(three.two)
    with pytest.raises(Unreachable):
        await third.dial(three.all.members[0], at)
    await stream.close()
    await before.close()


async def who_is_dialled_must_have_the_certificate_of_the_member(three: Three, listens: GrpcTransport, at: str) -> None:
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED") as wrong:
        await three.transport(2, three.all).dial(three.all.members[1], at)
    assert not wrong.value.absent


async def where_nobody_listens_nobody_is(three: Three, listens: GrpcTransport, at: str) -> None:
    with pytest.raises(Unreachable, match="refused") as nobody:
        await three.transport(1, three.two).dial(three.two.members[0], f"127.0.0.1:{free_port()}")
    assert nobody.value.absent
    with pytest.raises(UserError, match="port is taken"):
        await three.transport(1, three.two).listen(at, three.echo)


Law = Callable[[Three, GrpcTransport, str], Awaitable[None]]
LAWS: list[Law] = [
    messages_come_back_as_they_were_and_the_caller_is_known, a_stream_that_the_listener_closes_ends_for_the_dialler,
    a_message_that_is_too_large_ends_the_stream, a_new_roster_counts_at_once,
    who_is_dialled_must_have_the_certificate_of_the_member, where_nobody_listens_nobody_is,
]  # fmt: skip


@pytest.mark.parametrize("law", LAWS, ids=[law.__name__ for law in LAWS])
def test_of_a_stream(law: Law) -> None:
    async def work() -> None:
        three = Three()
        listens = three.transport(0, three.two)
        port = await listens.listen("127.0.0.1:0", three.echo)
        await law(three, listens, f"127.0.0.1:{port}")
        await listens.close()
        await asyncio.sleep(0.05)

    asyncio.run(work())


def test_a_new_roster_admits_over_tls_whom_it_names(tmp_path: Path) -> None:
    """By the raw socket of the tests of attacks: what they rest on."""
    three = Three()

    async def work() -> list[bool]:
        listens, loop = three.transport(0, three.two), asyncio.get_running_loop()
        port = await listens.listen("127.0.0.1:0", three.echo)

        def tried(identity: Identity) -> bool:
            return admitted(port, context_of(identity, tmp_path))

        results = [await loop.run_in_executor(None, tried, identity) for identity in three.identities]
        listens.trust(three.all)
        results.append(await loop.run_in_executor(None, tried, three.identities[2]))
        await listens.close()
        return results

    assert asyncio.run(work()) == [True, True, False, True]


def test_mutants_over_tls_are_refused_like_in_memory_and_frames_in_between_arrive() -> None:
    command = [sys.executable, "-m", "network.siege_over_tls", "500"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    siege = json.loads(done.stdout)
    assert siege["sent"] >= 500 <= 2 * siege["resigned"]
    assert siege["taken_in"] > 20 and len(siege["refused"]) > 15
