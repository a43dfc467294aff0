"""Members of a federation in one process: keys, a roster, and conversations over pipes in one event loop."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dfl_lora.codecs.frames import Frame
from dfl_lora.graphs import Graph
from dfl_lora.membership.identity import Identity, new_identity, public_of
from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks import Arrived
from dfl_lora.networks.contract import Contract, Limits
from dfl_lora.networks.conversation import Conversation
from dfl_lora.networks.edges import Applied
from dfl_lora.networks.links import Event
from dfl_lora.networks.real import ready_to_go
from dfl_lora.topologies import TOPOLOGIES, topology_of
from network.pipes import PipeTransport, Wires

T = TypeVar("T")
RECIPE = "a" * 64
CONTRACT = Contract(RECIPE, "b" * 64, "c" * 64, "d" * 64)
QUICK = Limits(deadline_s=5, grace_s=0.3, assemble_s=10)


@dataclass
class Federation:
    """Identities of members, the organiser's key, and the roster that it signed."""

    identities: list[Identity]
    organiser: Ed25519PrivateKey
    roster: Roster

    @staticmethod
    def of(hosts: Sequence[Sequence[int]], epoch: int = 1, addresses: bool = True) -> "Federation":
        """Makes a member for each list of peers; the one who hosts less dials, as ids go."""
        identities = sorted((new_identity() for _ in hosts), key=lambda identity: identity.id)
        organiser = Ed25519PrivateKey.generate()
        members = tuple(
            Member(
                i.id,
                i.public,
                i.certificate_der,
                i.vouch,
                tuple(peers),
                (f"127.0.0.1:{7000 + k}",) if addresses else (),
            )
            for k, (i, peers) in enumerate(zip(identities, hosts, strict=True))
        )
        num_peers = sum(map(len, hosts))
        roster = Roster(public_of(organiser), epoch, "0" * 32, RECIPE, num_peers, members)
        return Federation(identities, organiser, roster.sealed_by(organiser))


@dataclass
class Party:
    """One member that runs: its conversation, what it told, and a network for the loop (in another thread)."""

    conversation: Conversation
    loop: asyncio.AbstractEventLoop
    told: list[Event] = field(default_factory=list)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        ready = {i: ready_to_go(frame) for i, frame in outgoing.items()}
        return self.call(self.conversation.exchange((round, k), graph, ready))

    def events(self, name: str) -> list[Event]:
        return [event for event in self.told if event["event"] == name]


class Meeting:
    """Parties over one set of wires, with their event loop in a thread."""

    def __init__(
        self,
        hosts: Sequence[Sequence[int]],
        topology: str = "ring",
        limits: Limits = QUICK,
        *,
        addresses: bool = True,
    ) -> None:
        self.federation = Federation.of(hosts, addresses=addresses)
        self.topology = topology_of(TOPOLOGIES[topology](self.federation.roster.num_peers))
        self.graph = self.topology.union
        self.limits, self.wires = limits, Wires()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.parties: list[Party] = []

    def __enter__(self) -> "Meeting":
        self.thread.start()
        for k in range(len(self.federation.identities)):
            self.parties.append(self.join(k))
        return self

    def __exit__(self, *_: object) -> None:
        for party in self.parties:
            party.call(party.conversation.close("stopped"))

        async def rest() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(rest(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def join(
        self, k: int, contract: Contract = CONTRACT, roster: Roster | None = None, applied: Applied = (), first: int = 1
    ) -> Party:
        """Starts member number k, again or with another contract."""
        roster, told = roster or self.federation.roster, list[Event]()
        member = roster.members[k]

        async def make() -> Conversation:
            transport = PipeTransport(self.wires, member)
            conversation = Conversation(
                self.federation.identities[k], roster, member.peers, self.graph, contract, self.limits, transport,
                told.append, lambda roster: None, applied, first,
            )  # fmt: skip
            await conversation.open("a pipe" if member.addresses else None)
            return conversation

        conversation = asyncio.run_coroutine_threadsafe(make(), self.loop).result(10)
        return Party(conversation, self.loop, told)

    def assemble(self) -> None:
        self.at_once(lambda party: party.call(party.conversation.assemble()))

    def at_once(self, do: Callable[[Party], T], parties: Sequence[Party] | None = None) -> list[T]:
        """Does the same at every party, each in a thread of its own."""
        with ThreadPoolExecutor(max(1, len(self.parties))) as pool:
            return list(pool.map(do, self.parties if parties is None else parties))


def frames_of(party: Party, t: int, size: int = 100) -> dict[int, Frame]:
    """Returns frames whose numbers tell the peer and the round."""
    return {i: Frame("fp32", "e" * 64, {"x": torch.full((size,), 1 + i + t / 1000)}) for i in party.conversation.hosted}
