"""A federation of three processes and many more members that attack one of them from here."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dfl_lora.graphs import Graph
from dfl_lora.membership.identity import Identity, new_identity, public_of
from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks.messages import Announce, Settle
from dfl_lora.networks.sealed import Opened, open_sealed, seal
from network.attackers import Listener, Recorder, Rogue
from network.processes import Line, Process, free_port, until
from network.worker import CONTRACT, Present, Toy

T = TypeVar("T")
NUM_PEERS = 16
VICTIM, HONEST, WEAK, ELSEWHERE, NEAR, *_, APART = range(NUM_PEERS)
"""Peers, each of a member of its own. From the fourth on all attack: in the place of one others listen, and the last is
the only one that is no neighbour of the victim."""
EDGES = [(VICTIM, i) for i in range(1, APART)]
FAR = 2**53
"""A round: a neighbour that says it is there is not waited for."""
SIZE = 50_000
"""A body has 800 kB."""
LIMITS = {"deadline_s": 30.0, "grace_s": 0.2, "assemble_s": 20.0}


class Attacked:
    """The processes, the roster, the attackers' event loop, and what the peers should have come to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, port_elsewhere = folder, free_port(), free_port()
        self.recorder = Recorder(self.port)
        self.elsewhere = Listener(port_elsewhere)
        self.identities = sorted((new_identity() for _ in range(NUM_PEERS)), key=lambda identity: identity.id)
        addresses = {VICTIM: (f"127.0.0.1:{self.recorder.port}",), ELSEWHERE: (f"127.0.0.1:{port_elsewhere}",)}
        members = tuple(Member.of(own, [i], addresses.get(i, ())) for i, own in enumerate(self.identities))
        self.organiser = Ed25519PrivateKey.generate()
        unsigned = Roster(public_of(self.organiser), 3, "0" * 32, CONTRACT.recipe, NUM_PEERS, members)
        self.roster = unsigned.sealed_by(self.organiser)
        self.unused = iter(self.identities[NEAR + 1 : APART])
        listen = [f"127.0.0.1:{self.port}", None, None]
        self.processes = [
            Process(folder / str(i), self.identities[i], self.roster, EDGES, listen[i], LIMITS, SIZE) for i in range(3)
        ]
        self.victim = self.processes[VICTIM]
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.right = Toy(Graph(NUM_PEERS, frozenset(EDGES)), [VICTIM, HONEST, WEAK], SIZE)

    def begin(self) -> None:
        for process in self.processes:
            process.answer("ready")
        linked = {self.identities[HONEST].id, self.identities[WEAK].id}
        until(lambda: linked <= {e["member"] for e in self.victim.events("linked")}, 20)
        self.go(5)
        self.at_first = self.victim.look()

    def go(self, count: int, **limits: float) -> None:
        """Does some rounds, the victim with these limits; fails where they come to what they would not on their own."""
        after = [len(p.lines) for p in self.processes]
        for p in self.processes:
            p.tell(do="rounds", count=count, limits=limits if p is self.victim else {})
        answers = [p.answer("rounds", n) for p, n in zip(self.processes, after, strict=True)]
        for _ in range(count):
            self.right.round(Present())
        right = self.right.digests()
        for answer in answers:
            for i, digest in answer["digests"].items():
                assert digest == right[i], f"peer {i} is not what it should be"

    def run(self, attack: Coroutine[Any, Any, T], count: int = 0, *, settle: bool = True) -> T:
        """Runs an attack to its end; some rounds are done meanwhile, and one afterwards."""
        attacking = asyncio.run_coroutine_threadsafe(attack, self.loop)
        if count:
            self.go(count)
        result = attacking.result(60)
        if settle:
            self.go(1)
        return result

    async def rogue(self, identity: Identity, port: int = 0) -> Rogue:
        """Returns a member that has dialled the victim and said nothing yet."""
        return await Rogue.dial(identity, self.roster, CONTRACT, self.roster.members[VICTIM], port or self.port)

    async def linked(self, identity: Identity | None = None, port: int = 0, *, far: bool = True) -> Rogue:
        """Returns a member that has said the right hello, and is waited for where it is not far ahead."""
        rogue = await self.rogue(identity or next(self.unused), port)
        await rogue.say(rogue.hello())
        here = (await rogue.hears(Settle)).now
        await rogue.say(Settle(now=(FAR, 0) if far else here, ready=True, taken=[]))
        return rogue

    def seen(self, identity: Identity) -> Line:
        """Returns how things are with a member in the victim's eyes."""
        members = self.victim.look()["network"]["members"]
        found: Line = next(m for m in members if m["id"] == identity.id)
        return found

    def refused(self, identity: Identity | None) -> list[str]:
        """Returns why the victim refused a member, or strangers."""
        return [e["why"] for e in self.victim.events("refused") if e["member"] == (identity and identity.id)]

    def sealed(self, rogue: Rogue, heard: Announce, **changes: Any) -> bytes:
        """Returns an announcement of a member that is right where this one was heard, but for some changes."""
        opened = open_sealed(heard.sealed)
        assert isinstance(opened, Opened)
        right = replace(opened.header, sender=self.identities.index(rogue.identity))
        return seal(replace(right, **changes), rogue.identity.sign)

    def close(self) -> None:
        for process in self.processes:
            process.close()
        self.elsewhere.close()
        self.recorder.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
