"""Streams over gRPC with mutual TLS 1.3: the certificates of the roster are the only roots, one server, one port.

A stream is one bidirectional call `/dfl.Peer/Link` of plain bytes. The dialler trusts the certificate of the member
that it dials and no other; the listener trusts those of the roster, and learns from gRPC whose it was. A certificate
without keyCertSign cannot vouch for another one, so no member can pass for another (`membership.identity` refuses the
rest).

What gRPC for Python does not offer, and what stands in for it:
- No lowest version of TLS can be set. Only suites of TLS 1.2 for RSA keys are offered, and the certificates are ECDSA,
  so that TLS 1.2 finds no suite; the suites of TLS 1.3 are not subject to that setting.
- Handshakes that fail are told on standard error alone, at level INFO; `refused_handshakes.py` reads them there.
- A peer that is frozen is noticed by the ping timeout of HTTP/2 (10 s after a ping that is sent after 10 s of silence);
  `grpc.keepalive_timeout_ms` waits 61 s. 1.5 s was too short on a link of 5 Mbit/s with a full buffer.
- gRPC accepts any number of connections, until the process can open no file any more. So no more than half of the
  files that it may open are for who dials; one more is closed at once. Strangers who hold them all lose them after
  10 s, when the handshake times out, and links that are open go on.
- What a handshake is made with must not be replaced while another one begins: gRPC 1.85 aborts the process then
  ("Check failed: prior > 0"), and 300 connections that are closed at once were enough. So it is replaced only where
  the roster is another one.
"""

import asyncio
import os
import resource
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"  # read when gRPC is loaded
os.environ.setdefault("GRPC_VERBOSITY", "INFO")

import grpc

from dfl_lora.errors import UserError
from dfl_lora.membership.identity import Identity
from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks.messages import MOST_BYTES
from dfl_lora.networks.transport import Serve, Stream, Unreachable

SERVICE, METHOD = "dfl.Peer", "Link"
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MOST_BYTES + 1024),
    ("grpc.max_send_message_length", MOST_BYTES + 1024),
    ("grpc.max_metadata_size", 8192),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
LISTENING: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_concurrent_streams", 4),
]
OVER = (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError, asyncio.CancelledError)
"""What gRPC raises where a call has ended."""
MOST_CONNECTIONS = 1024
"""Of those who dial this member, however many files it may open."""
REFUSED = ("Connection refused", "No route to host")
"""What the system says where nobody listens."""


def let_through(error: BaseException) -> None:
    """Raises a cancellation of the task again; gRPC raises the same where the call was ended on this side."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error


def most_connections() -> int:
    """Returns how many connections are accepted at a time."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, files // 2)


class GrpcStream:
    """One end of a call: reading and writing are the same for the one who dialled and the one who listens."""

    def __init__(self, call: Any, address: str, certificate: bytes | None, end: Callable[[], Any]) -> None:
        self.call, self.address, self.certificate, self.end = call, address, certificate, end
        self.ended = self.closed = False

    async def read(self) -> bytes | None:
        try:
            message = await self.call.read()
        except OVER as error:
            let_through(error)
            message = grpc.aio.EOF
        if isinstance(message, bytes) and not self.ended:
            return message
        self.ended = True
        return None

    async def write(self, message: bytes) -> None:
        if not self.ended:
            try:
                await self.call.write(message)
            except OVER as error:
                let_through(error)
                self.ended = True

    async def close(self) -> None:
        self.ended = True
        if not self.closed:
            self.closed = True
            await self.end()


class GrpcTransport:
    """Listens and dials as one member; without TLS only where `insecure` is asked for."""

    def __init__(self, identity: Identity, *, insecure: bool = False) -> None:
        self.identity, self.insecure = identity, insecure
        self.roots = self.offered = b""
        self.server: Any = None
        self.serving = set[asyncio.Task[Any]]()
        self.serve: Serve | None = None

    def trust(self, roster: Roster) -> None:
        self.roots = b"".join(member.certificate_pem for member in roster.members)

    def admitted(self) -> Any:
        """Returns what handshakes are made with from now on; gRPC asks before each, None is what it has already."""
        if self.roots == self.offered:
            return None
        self.offered = self.roots
        pair = (self.identity.tls_key, self.identity.certificate)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=self.roots)

    async def listen(self, at: str, serve: Serve) -> int:
        self.serve = serve
        most = ("grpc.max_allowed_incoming_connections", most_connections())
        self.server = grpc.aio.server(options=[*OPTIONS, *LISTENING, most])
        handler = grpc.stream_stream_rpc_method_handler(self.answer)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        try:
            if self.insecure:
                port = self.server.add_insecure_port(at)
            else:
                credentials = grpc.dynamic_ssl_server_credentials(self.admitted(), self.admitted, True)
                port = self.server.add_secure_port(at, credentials)
        except RuntimeError:
            await self.server.stop(None)
            raise UserError(
                f"Cannot listen at {at}: the address is not this machine's, or the port is taken; give another one."
            ) from None
        await self.server.start()
        return int(port)

    async def answer(self, requests: Any, context: Any) -> None:
        """Serves one call for as long as it lasts."""
        assert self.serve is not None
        certificates = context.auth_context().get("x509_pem_cert") or [None]
        certificate = ssl.PEM_cert_to_DER_cert(certificates[0].decode()) if certificates[0] else None
        ended = asyncio.Event()

        async def end() -> None:
            ended.set()

        address = str(context.peer()).replace("%5B", "[").replace("%5D", "]").partition(":")[2]  # after ipv4: or ipv6:
        stream = GrpcStream(context, address, certificate, end)
        serving, ending = asyncio.ensure_future(self.serve(stream)), asyncio.ensure_future(ended.wait())
        try:
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stream.ended = True
            ending.cancel()
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving

    async def dial(self, member: Member, address: str) -> Stream:
        if self.insecure:
            channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            pair = (self.identity.tls_key, self.identity.certificate)
            credentials = grpc.ssl_channel_credentials(member.certificate_pem, *pair)
            named = [*OPTIONS, ("grpc.ssl_target_name_override", member.id)]
            channel = grpc.aio.secure_channel(address, credentials, options=named)
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()

        async def end() -> None:
            call.cancel()
            await channel.close()

        try:
            await call.wait_for_connection()
        except grpc.RpcError as error:
            await channel.close()
            said = " ".join(str(error.details()).split())
            raise Unreachable(said[-300:], any(word in said for word in REFUSED)) from None
        except BaseException:
            call.cancel()
            await channel.close()
            raise
        return GrpcStream(call, address, None if self.insecure else member.certificate, end)

    async def close(self) -> None:
        if self.server is not None:
            await self.server.stop(0.5)
