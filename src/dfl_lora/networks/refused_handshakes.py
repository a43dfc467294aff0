"""Handshakes of TLS that failed, as gRPC tells of them: on standard error and nowhere else.

`Listening` puts a pipe in the place of file descriptor 2. Lines of gRPC about handshakes become reasons, each told
once and counted; other lines of gRPC are dropped, since strangers can cause any number of them; everything else goes
where it was meant to go. Only a process that is a peer does so: it is the border of the program.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Thread
from types import TracebackType

REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "somebody without a certificate",
    "CERTIFICATE_VERIFY_FAILED": "somebody whose certificate is not in the roster",
    "NO_SHARED_CIPHER": "somebody who speaks TLS 1.2, only 1.3 is spoken here",
    "UNSUPPORTED_PROTOCOL": "somebody who speaks TLS 1.1 or older, only 1.3 is spoken here",
    "HTTP_REQUEST": "somebody who speaks without TLS (HTTP)",
    "HTTPS_PROXY_REQUEST": "somebody who speaks without TLS (a proxy's request)",
    "WRONG_VERSION_NUMBER": "somebody who speaks without TLS",
    "CERTIFICATE_EXPIRED": "somebody whose certificate has expired, or a clock that is wrong",
}
FAILED = re.compile(rb"Handshake failed with error|[Hh]andshake.*(?:failed|timed? ?out)")
NAMED = re.compile(rb"OPENSSL_internal:([A-Z0-9_]+)(?:: *([\w ]*))?")
GRPC_OWN = re.compile(rb"[IWE]\d{4} [\d:.]+ +\d+ \w+\.cc:\d+\]")
LONGEST_LINE = 4096


class Listening(AbstractContextManager["Listening"]):
    """While it lasts, `tell(reason)` is called for the first refused handshake of each reason; all are counted."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.counts = Counter[str]()

    def __enter__(self) -> "Listening":
        self.original = os.dup(2)
        source, sink = os.pipe()
        os.dup2(sink, 2)
        os.close(sink)
        self.thread = Thread(target=self.read, args=(source,), name="refused handshakes", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.dup2(self.original, 2)  # the pipe's last writing end is closed, and the thread reads its end
        self.thread.join(2)
        os.close(self.original)

    def read(self, source: int) -> None:
        """Reads line by line; a line without an end is passed on in pieces."""
        rest = b""
        while piece := os.read(source, LONGEST_LINE):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self.take(line + b"\n")
            if len(rest) > LONGEST_LINE:
                self.take(rest)
                rest = b""
        self.take(rest)
        os.close(source)

    def take(self, line: bytes) -> None:
        """Counts a refused handshake, or passes a line on."""
        if FAILED.search(line):
            named = NAMED.search(line)
            code = named[1].decode() if named else "unknown"
            said = named[2].decode() if named and named[2] else ""
            reason = REASONS.get(code, f"somebody with whom TLS failed ({code.lower().replace('_', ' ')})")
            if code == "CERTIFICATE_VERIFY_FAILED" and "expired" in said:
                reason = REASONS["CERTIFICATE_EXPIRED"]
            self.counts[reason] += 1
            if self.counts[reason] == 1:
                self.tell(reason)
        elif line and not GRPC_OWN.match(line):
            os.write(self.original, line)
