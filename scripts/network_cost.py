"""Measures what real peers cost on this machine against a raw TLS socket: python scripts/network_cost.py [--json FILE].

Two processes on loopback. Raw is Python's ssl, blocking, mutual TLS 1.3, sendall and recv_into; the other side is the
network as a run uses it, with the same memory. `stream` is one body in one direction over the transport: cut, sent, put
together, and its digest taken where it arrives. `exchange` is `PeerNetwork.exchange`: each end makes a body of its
frame and a digest of it, signs, announces, pulls, checks digest and numbers, and both ends agree that they are done;
raw does it with a connection each way at once. Repetitions alternate, and medians are shown. Bytes are the payload of
TCP through a counting proxy, those of both directions halved; memory is what the largest resident size of a process
grew by, its frame apart.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import resource
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dfl_lora.graphs import GRAPHS
from dfl_lora.membership.identity import create_identity, load_identity, public_of
from dfl_lora.membership.roster import Member, Roster, read_roster, write_roster
from dfl_lora.networks.body import room

MB = 10**6
LISTENS, DIALS = 0, 1
DIGEST = "a" * 64


# ---- in each of the two processes


class Raw:
    """Two connections between the processes, one for each direction."""

    def __init__(self, index: int, folder: Path, ports: tuple[int, int]) -> None:
        own, other = folder / str(index), folder / str(1 - index)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if index == LISTENS else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(own / "certificate.pem", own / "tls.pem")
        context.load_verify_locations(other / "certificate.pem")
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        streams = []
        for port in ports:
            if index == LISTENS:
                with socket.create_server(("127.0.0.1", port)) as server:
                    raw, _ = server.accept()
            else:
                raw = patient(lambda port=port: socket.create_connection(("127.0.0.1", port)))  # type: ignore[misc]
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            streams.append(context.wrap_socket(raw, server_side=index == LISTENS))
        self.out, self.into = streams if index == LISTENS else streams[::-1]

    def send(self, size: int) -> None:
        self.out.sendall(room(size))
        assert self.out.recv(1)

    def receive(self, size: int) -> None:
        buffer, filled = memoryview(room(size)), 0
        while filled < size:
            filled += self.into.recv_into(buffer[filled:])
        self.into.sendall(b"!")

    def both(self, size: int) -> None:
        sending = threading.Thread(target=self.send, args=(size,))
        sending.start()
        self.receive(size)
        sending.join()


def patient(connect: Callable[[], socket.socket]) -> socket.socket:
    """Tries until somebody listens."""
    for _ in range(500):
        with suppress(ConnectionRefusedError):
            return connect()
        time.sleep(0.01)
    return connect()


class Streams:
    """One stream of the transport between the processes, in an event loop of its own."""

    def __init__(self, index: int, folder: Path, port: int) -> None:
        from dfl_lora.networks.grpc_transport import GrpcTransport
        from dfl_lora.networks.transport import Stream

        self.loop, roster = asyncio.new_event_loop(), read_roster(folder / "roster.json")
        self.transport, met = GrpcTransport(load_identity(folder / str(index))), asyncio.Event()
        self.transport.trust(roster)
        self.ended = asyncio.Event()

        async def answer(stream: Stream) -> None:
            self.stream = stream
            met.set()
            await self.ended.wait()

        async def meet() -> None:
            if index == LISTENS:
                await self.transport.listen(f"127.0.0.1:{port}", answer)
                await met.wait()
            else:
                from dfl_lora.networks.transport import Unreachable

                for _ in range(100):
                    with suppress(Unreachable):
                        self.stream = await self.transport.dial(roster.members[LISTENS], f"127.0.0.1:{port}")
                        return
                    await asyncio.sleep(0.05)

        self.loop.run_until_complete(meet())

    def send(self, size: int) -> None:
        from dfl_lora.networks.messages import CHUNK_BYTES, Chunk, encoded

        async def work() -> None:
            body = memoryview(room(size))
            for offset in range(0, size, CHUNK_BYTES):
                await self.stream.write(encoded(Chunk(0, 0, offset, body[offset : offset + CHUNK_BYTES])))
            assert await self.stream.read()

        self.loop.run_until_complete(work())

    def receive(self, size: int) -> None:
        from dfl_lora.networks.messages import Chunk, decoded

        async def work() -> None:
            body, filled, digest = room(size), 0, hashlib.sha256()
            while filled < size:
                content = await self.stream.read()
                assert content is not None
                chunk = decoded(content)
                assert isinstance(chunk, Chunk)
                body[filled : filled + len(chunk.data)] = chunk.data
                digest.update(chunk.data)
                filled += len(chunk.data)
            await self.stream.write(b"!")

        self.loop.run_until_complete(work())

    def close(self) -> None:
        async def end() -> None:
            self.ended.set()
            await self.stream.close()
            await self.transport.close()
            await asyncio.sleep(0.1)

        self.loop.run_until_complete(end())
        self.loop.close()


class Exchanges:
    """The network of a real peer."""

    def __init__(self, index: int, folder: Path, port: int) -> None:
        from dfl_lora.networks.contract import Contract, Limits
        from dfl_lora.networks.real import PeerNetwork

        self.index, self.graph, self.t = index, GRAPHS["line"](2), 0
        contract, listen = Contract(DIGEST, DIGEST, DIGEST, DIGEST), f"127.0.0.1:{port}" if index == LISTENS else None
        self.network = PeerNetwork(
            load_identity(folder / str(index)), read_roster(folder / "roster.json"), [index], self.graph, contract,
            Limits(), listen=listen, insecure=False, observe=lambda event: None,
        )  # fmt: skip
        self.network.__enter__()
        self.network.assemble()

    def frame(self, size: int) -> Any:
        import torch

        from dfl_lora.codecs.frames import Frame

        return Frame("fp32", DIGEST, {"x": torch.ones(size // 4)})

    def both(self, frame: Any) -> None:
        self.t += 1
        arrived = self.network.exchange(self.t, 0, self.graph, {self.index: frame})
        assert arrived.frames[self.index][1 - self.index] is not None

    def close(self) -> None:
        self.network.finish()
        self.network.__exit__(None, None, None)


def work(index: int, folder: Path, ports: tuple[int, int, int, int], pipe: Connection) -> None:
    """Does what it is told at the other end of the pipe: (what, size) -> (seconds, bytes that the process grew by)."""
    import torch

    torch.set_num_threads(1)
    raw, streams, exchanges = None, None, None
    while (told := pipe.recv()) is not None:
        what, size = told
        if what.startswith("raw") and raw is None:
            raw = Raw(index, folder, ports[:2])
        elif what == "stream" and streams is None:
            streams = Streams(index, folder, ports[2])
        elif what == "exchange" and exchanges is None:
            exchanges = Exchanges(index, folder, ports[3])
        frame = exchanges.frame(size) if what == "exchange" and exchanges else None
        pipe.send("ready")
        pipe.recv()
        before, start = restarted_peak(), time.perf_counter()
        if what == "exchange" and exchanges:
            exchanges.both(frame)
        elif what == "raw both" and raw:
            raw.both(size)
        else:
            ends: Any = streams if what == "stream" else raw
            (ends.send if index == LISTENS else ends.receive)(size)
        pipe.send((time.perf_counter() - start, peak() - before))
    for open in (streams, exchanges):
        if open is not None:
            open.close()


def restarted_peak() -> int:
    """Returns the resident size, which the largest one is counted from anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


# ---- in the process that measures


class Counting:
    """Passes TCP on and counts it."""

    def __init__(self, to: int) -> None:
        self.to, self.bytes = to, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            here, _ = self.server.accept()
            try:
                there = socket.create_connection(("127.0.0.1", self.to))
            except ConnectionRefusedError:
                here.close()
                continue
            for source, sink in ((here, there), (there, here)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self.carry, args=(source, sink), daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(2**18):
                self.bytes += len(content)
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)


@dataclass
class Pair:
    """The two processes."""

    pipes: list[Connection]
    processes: list[Any]

    @staticmethod
    def of(folder: Path, ports: tuple[int, int, int, int]) -> "Pair":
        context = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        for index in (LISTENS, DIALS):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(index, folder, ports, there))
            process.start()
            pipes.append(here)
            processes.append(process)
        return Pair(pipes, processes)

    def do(self, what: str, size: int) -> tuple[float, int]:
        """Returns the seconds of the slower end, and the bytes that the larger one grew by."""
        for pipe in self.pipes:
            pipe.send((what, size))
        for pipe in self.pipes:
            pipe.recv()
        for pipe in self.pipes:
            pipe.send("go")
        ends = [pipe.recv() for pipe in self.pipes]
        return max(seconds for seconds, _ in ends), max(grown for _, grown in ends)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def federation(folder: Path, port: int) -> None:
    """Writes two identities and their roster: the one who listens is reached at a port."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    organiser = Ed25519PrivateKey.generate()
    addresses: tuple[tuple[str, ...], ...] = ((f"127.0.0.1:{port}",), ())
    members = [Member.of(create_identity(folder / str(i)), [i], addresses[i]) for i in (LISTENS, DIALS)]
    unsigned = Roster(public_of(organiser), 1, "0" * 32, DIGEST, 2, tuple(members))
    write_roster(folder / "roster.json", unsigned.sealed_by(organiser))


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports


def started(counted: bool) -> tuple[Pair, Counting | None]:
    """Returns a new pair of processes, with a proxy between them where bytes are counted."""
    first, second, third, fourth = free_ports(4)
    counting = Counting(fourth) if counted else None
    folder = Path(tempfile.mkdtemp())
    federation(folder, counting.port if counting else fourth)
    return Pair.of(folder, (first, second, third, fourth)), counting


def times(sizes: list[float], repetitions: int) -> list[dict[str, Any]]:
    """Measures seconds, in alternation."""
    first, second = started(counted=False)[0], started(counted=False)[0]  # gRPC wants one event loop in a process
    rows = []
    for mb in sizes:
        size = int(mb * MB)
        seconds: dict[str, list[float]] = {what: [] for what in ("raw one way", "stream", "raw both", "exchange")}
        for number in range(repetitions + 1):
            for what, taken in seconds.items():
                took, _ = (second if what == "exchange" else first).do(what, size)
                if number:  # the first warms up
                    taken.append(took)
        median = {what: statistics.median(taken) for what, taken in seconds.items()}
        ratios = {"one way": median["stream"] / median["raw one way"], "both": median["exchange"] / median["raw both"]}
        rows.append({"mb": mb, "seconds": median, "all": seconds, "ratio": ratios})
    first.close()
    second.close()
    return rows


def memory(sizes: list[float]) -> list[dict[str, Any]]:
    """Measures what a process grows by in the second of two exchanges, in bodies."""
    rows = []
    for mb in sizes:
        pair = started(counted=False)[0]
        first = pair.do("exchange", int(mb * MB))[1]
        second = pair.do("exchange", int(mb * MB))[1]
        pair.close()
        rows.append({"mb": mb, "first": first / MB, "second": second / MB})
    return rows


def wire(sizes: list[float]) -> list[dict[str, Any]]:
    """Counts bytes of an exchange in one direction, against those of the body."""
    rows = []
    pair, counting = started(counted=True)
    assert counting is not None
    pair.do("exchange", MB)
    for mb in sizes:
        size, count = int(mb * MB) // 4 * 4, 3
        pair.do("exchange", size)
        time.sleep(0.3)
        before = counting.bytes
        for _ in range(count):
            pair.do("exchange", size)
        time.sleep(0.3)
        sent = (counting.bytes - before) / count / 2
        body = size + 72
        rows.append({"mb": mb, "bytes": sent, "ratio": sent / body, "more": sent - body})
    pair.close()
    return rows


def shown(results: dict[str, Any]) -> list[Table]:
    """Returns the tables."""
    time_table = Table("MB", "raw", "stream", "ratio", "raw both", "exchange", "ratio", title="milliseconds")
    for row in results["times"]:
        s, r = row["seconds"], row["ratio"]
        cells = [f"{1000 * s[what]:.1f}" for what in ("raw one way", "stream", "raw both", "exchange")]
        time_table.add_row(f"{row['mb']:g}", *cells[:2], f"{r['one way']:.2f}", *cells[2:], f"{r['both']:.2f}")
    memory_table = Table("MB", "first exchange", "second", title="MB that a process grows by")
    for row in results["memory"]:
        memory_table.add_row(f"{row['mb']:g}", f"{row['first']:.1f}", f"{row['second']:.1f}")
    wire_table = Table("MB", "bytes one way", "ratio to the body", "more", title="on the wire")
    for row in results["wire"]:
        wire_table.add_row(f"{row['mb']:g}", f"{row['bytes']:,.0f}", f"{row['ratio']:.4f}", f"{row['more']:,.0f}")
    return [time_table, memory_table, wire_table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--only", choices=["times", "memory", "wire"])
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results: dict[str, Any] = {"times": [], "memory": [], "wire": []}
    measured: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "times": lambda: times([10, 100], given.repetitions),
        "memory": lambda: memory([1, 10, 100, 500]),
        "wire": lambda: wire([0.01, 0.1, 1, 10, 100]),
    }
    for name, measure in measured.items():
        if given.only in (None, name):
            results[name] = measure()
    for table in shown(results):
        if table.row_count:
            Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
