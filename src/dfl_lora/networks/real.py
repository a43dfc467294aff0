"""The network of a real peer: the conversation in a thread of its own, behind the one method that the loop calls."""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from threading import Thread
from types import TracebackType
from typing import Any, Literal, TypeVar

from dfl_lora.codecs.frames import Frame
from dfl_lora.graphs import Graph
from dfl_lora.membership.identity import Identity
from dfl_lora.membership.roster import Roster
from dfl_lora.networks import Arrived, Undone
from dfl_lora.networks.body import Expectation, body_of, frame_from
from dfl_lora.networks.contract import Contract, Limits
from dfl_lora.networks.conversation import Conversation
from dfl_lora.networks.edges import Applied
from dfl_lora.networks.links import Observe
from dfl_lora.networks.pulls import Outgoing
from dfl_lora.networks.snapshot import snapshot

T = TypeVar("T")


class PeerNetwork(AbstractContextManager["PeerNetwork"]):
    """Hosts some peers among others' on a network; while it is entered, it listens, dials and talks."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        hosted: Sequence[int],
        neighbours: Graph,
        contract: Contract,
        limits: Limits,
        *,
        listen: str | None,
        insecure: bool,
        observe: Observe,
        keep: Callable[[Roster], None] = lambda roster: None,
        applied: Applied = (),
        first: int = 1,
    ) -> None:
        """`first` is the next round; `observe` and `keep` (of a newer roster) are called in the network's thread."""
        self.listen = listen
        self.port: int | None = None
        self.why: Literal["finished", "stopped"] = "stopped"

        async def begin() -> Conversation:
            from dfl_lora.networks.grpc_transport import GrpcTransport  # gRPC reads its environment when it is loaded

            transport = GrpcTransport(identity, insecure=insecure)
            given = (identity, roster, hosted, neighbours, contract, limits, transport, observe, keep, applied, first)
            conversation = Conversation(*given)
            self.port = await conversation.open(listen)
            return conversation

        self.begin = begin

    def __enter__(self) -> "PeerNetwork":
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="network", daemon=True)
        self.thread.start()
        try:
            self.conversation = self.call(self.begin())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call(self.conversation.close(self.why))
        self.stop()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the network's thread and returns its result; an interruption here ends it there."""
        running = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise

    def assemble(self) -> None:
        """Waits until every neighbour is linked, at most `assemble_s`."""
        self.call(self.conversation.assemble())

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        """Delivers between hosted peers directly, to others and from others over the links."""
        ready = {i: ready_to_go(frame) for i, frame in outgoing.items()}
        arrived = self.call(self.conversation.exchange((round, k), graph, ready))
        frames = dict[int, dict[int, Frame | None]]()
        for i in outgoing:
            frames[i] = {j: outgoing[j] for j in graph.neighbours(i) if j in outgoing}
            frames[i].update(arrived.frames[i])
        return Arrived(frames, arrived.undone, arrived.waited_s)

    def finish(self) -> Sequence[Undone]:
        """After the last round: returns what the other ends did not take in."""
        self.why = "finished"
        return self.call(self.conversation.finish())

    def applied(self) -> Applied:
        """Returns what every edge took in last, to be kept with a checkpoint."""
        return self.conversation.ledger.applied()

    def adopt(self, roster: Roster) -> None:
        """Takes a roster of a higher epoch."""
        self.loop.call_soon_threadsafe(self.conversation.adopt, roster)

    def snapshot(self) -> dict[str, Any]:
        """Returns how things are with each neighbour, as JSON."""

        async def look() -> dict[str, Any]:
            return snapshot(self.conversation)

        return self.call(look())


def ready_to_go(frame: Frame) -> Outgoing:
    """Returns a copy of a frame that stays as it is while its peer goes on, with its body and digest."""
    body, expected = body_of(frame), Expectation.of(frame)
    copied = frame_from(body, expected)
    assert copied is not None, "a body that was just made"
    return Outgoing(copied, body, hashlib.sha256(body).hexdigest())
