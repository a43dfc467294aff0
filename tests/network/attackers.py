"""Those who do not play by the rules: outsiders on raw sockets, and members of the roster who say what they like."""

import asyncio
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from dfl_lora.membership.identity import Identity, new_identity, pem
from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks.contract import Contract
from dfl_lora.networks.grpc_transport import METHOD, SERVICE, GrpcStream, grpc
from dfl_lora.networks.messages import PROTOCOL, Chunk, Hello, Message, Settle, decoded, encoded
from dfl_lora.networks.transport import Stream
from forging import certificate_like

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def context_of(identity: Identity | None, folder: Path, *, more: bytes = b"", server: bool = False) -> ssl.SSLContext:
    """Returns what TLS is spoken with: nothing of the other end is checked; `more` certificates follow the own one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if identity is not None:
        file = folder / f"{identity.id[:8]}-{len(more)}.pem"
        file.touch(0o600)
        file.write_bytes(identity.tls_key + identity.certificate + more)
        context.load_cert_chain(file)
    return context


def forged(name: str, by: Identity) -> Identity:
    """Returns an identity whose certificate bears the name of a member and is signed with the key of another."""
    tls_key, own = certificate_like(name)
    signer = load_pem_private_key(by.tls_key, None)
    issuer = x509.load_pem_x509_certificate(by.certificate).subject
    builder = x509.CertificateBuilder(
        issuer, own.subject, own.public_key(), own.serial_number, own.not_valid_before_utc, own.not_valid_after_utc,
        list(own.extensions),
    )  # fmt: skip
    certificate = builder.sign(signer, hashes.SHA256())
    stranger = new_identity()
    return Identity(stranger.key, pem(tls_key), certificate.public_bytes(Encoding.PEM))


def dialled(port: int) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), 10)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def admitted(port: int, context: ssl.SSLContext) -> bool:
    """Tells whether the one who listens speaks HTTP/2 with whoever has this context."""
    try:
        with dialled(port) as raw, context.wrap_socket(raw) as tls:
            tls.sendall(PREFACE + SETTINGS)
            return bool(tls.recv(1))
    except OSError:  # among them ssl.SSLError
        return False


def answered(port: int, content: bytes) -> bytes:
    """Returns what is said to somebody who sends these bytes, as they are."""
    with dialled(port) as raw, suppress(OSError):
        raw.sendall(content)
        raw.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: raw.recv(65536), b""))
    return b""


class Dripping:
    """Sends one byte of something twice a second until it is cut off."""

    def __init__(self, stream: socket.socket, content: bytes) -> None:
        self.stream, self.content, self.started = stream, content, time.monotonic()
        self.lasted: float | None = None
        self.thread = threading.Thread(target=self.drip, daemon=True)
        self.thread.start()

    def drip(self) -> None:
        self.stream.settimeout(0.5)
        with suppress(OSError):
            for n in range(120):
                self.stream.send(self.content[n % len(self.content) :][:1])
                try:
                    while self.stream.recv(65536):
                        pass
                    break
                except TimeoutError:
                    continue
        self.lasted = time.monotonic() - self.started
        self.stream.close()


class Listener:
    """Listens where a member is expected, with whatever certificate, and writes down who took it for that member."""

    def __init__(self, port: int) -> None:
        self.server = socket.create_server(("127.0.0.1", port))
        self.faces: list[ssl.SSLContext | None] = [None]
        """What it answers with, in turn; None: without TLS."""
        self.tried = self.fooled = 0
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                raw, _ = self.server.accept()
            except OSError:
                return
            face = self.faces[self.tried % len(self.faces)]
            self.tried += 1
            raw.settimeout(5)
            with raw, suppress(OSError):
                if face is None:
                    raw.sendall(SETTINGS)
                    raw.recv(65536)
                    continue
                with face.wrap_socket(raw, server_side=True) as tls:
                    self.fooled += tls.recv(len(PREFACE)) != b""

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join(5)


class Recorder:
    """Stands between two ends of TCP, passes everything on, counts it, and writes down how each dialler begins."""

    def __init__(self, to: int, keep: int = 2**18) -> None:
        self.to, self.keep = to, keep
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        self.recorded: list[bytearray] = []
        self.bytes = {"there": 0, "back": 0}
        self.threads = [threading.Thread(target=self.serve, daemon=True)]
        self.open: list[socket.socket] = []
        self.slow = threading.Event()
        """From then on what the dialler sends is passed on byte by byte, fifty in a second."""
        self.threads[0].start()

    def serve(self) -> None:
        while True:
            try:
                here, _ = self.server.accept()
            except OSError:
                return
            try:
                there, tape = dialled(self.to), bytearray()
            except OSError:
                here.close()
                continue
            there.settimeout(None)
            here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.open += [here, there]
            self.recorded.append(tape)
            for way, source, sink, kept in (("there", here, there, tape), ("back", there, here, None)):
                thread = threading.Thread(target=self.carry, args=(way, source, sink, kept), daemon=True)
                thread.start()
                self.threads.append(thread)

    def carry(self, way: str, source: socket.socket, sink: socket.socket, tape: bytearray | None) -> None:
        with suppress(OSError):
            while content := source.recv(2**18):
                self.bytes[way] += len(content)
                if tape is not None and len(tape) < self.keep:
                    tape += content
                while content and way == "there" and self.slow.is_set():
                    sink.send(content[:1])
                    content = content[1:]
                    time.sleep(0.02)
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.slow.clear()
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for end in self.open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)
        for end in self.open:
            end.close()


async def nothing(message: Message) -> None:
    """Answers nothing."""


class Rogue:
    """A member of the roster on a link with another. Reading goes on by itself; `judge` may answer what it hears."""

    def __init__(self, identity: Identity, roster: Roster, contract: Contract, stream: Stream) -> None:
        self.identity, self.roster, self.contract, self.stream = identity, roster, contract, stream
        self.heard: deque[Message] = deque(maxlen=1000)
        self.judge: Callable[[Message], Awaitable[None]] = nothing
        self.now: tuple[int, int] = (-1, -1)
        self.ended, self.writing = asyncio.Event(), asyncio.Lock()
        self.reading = asyncio.ensure_future(self.read())

    @classmethod
    async def dial(cls, identity: Identity, roster: Roster, contract: Contract, to: Member, port: int) -> "Rogue":
        """Dials like the transport, but for the limits that it keeps to itself."""
        credentials = grpc.ssl_channel_credentials(to.certificate_pem, identity.tls_key, identity.certificate)
        options = [
            ("grpc.ssl_target_name_override", to.id), ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]  # fmt: skip
        channel = grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        await call.wait_for_connection()

        async def end() -> None:
            call.cancel()
            await channel.close()

        return cls(identity, roster, contract, GrpcStream(call, "", to.certificate, end))

    async def read(self) -> None:
        while (content := await self.stream.read()) is not None:
            message = decoded(content)
            if isinstance(message, Settle):
                self.now = message.now
            if not isinstance(message, Chunk):
                self.heard.append(message)
            await self.judge(message)
        self.ended.set()

    def hello(self, **changes: Any) -> Hello:
        """Returns a hello that is right but for some changes."""
        right: dict[str, Any] = {
            "protocol": PROTOCOL, "id": self.identity.id, "federation": self.roster.federation, "run": self.roster.run,
            **vars(self.contract), "epoch": self.roster.epoch, "session": "0" * 16, "seen": [],
        }  # fmt: skip
        return Hello.model_construct(**(right | changes))

    async def say(self, *messages: Message | bytes) -> None:
        for message in messages:
            async with self.writing:
                await self.stream.write(message if isinstance(message, bytes) else encoded(message))

    async def hears(self, kind: type[Message], seconds: float = 5) -> Any:
        """Returns the first message of a kind, as soon as it is there."""
        end = time.monotonic() + seconds
        while not (found := [m for m in self.heard if isinstance(m, kind)]):
            assert time.monotonic() < end, f"no {kind.__name__} within {seconds} s, but {list(self.heard)[-3:]}"
            await asyncio.sleep(0.01)
        return found[0]

    async def close(self) -> None:
        await self.stream.close()
        self.reading.cancel()
        with suppress(asyncio.CancelledError):
            await self.reading


def hang_up(raw: socket.socket) -> None:
    """Ends a connection with a reset."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
