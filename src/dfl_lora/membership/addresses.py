"""Addresses of peers: "host:port", or "[host]:port" where the host is an IPv6 address."""

import re
from ipaddress import IPv6Address, ip_address

HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
LONGEST = 300


def split_address(address: str) -> tuple[str, int]:
    """Returns the host, without brackets, and the port (0: any free one); raises ValueError where it is no address."""
    host, colon, port = address[:LONGEST].rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else ""
    named = is_ipv6(bare) if bare else HOST.fullmatch(host) is not None
    if not (named and colon and re.fullmatch(r"[0-9]{1,5}", port) and int(port) < 2**16):
        raise ValueError(
            f"{address[:60]!r} is no address; write host:port, such as 192.0.2.7:7000 or peer.example.org:7000, "
            "or [host]:port for IPv6"
        )
    return bare or host, int(port)


def join_address(host: str, port: int) -> str:
    """Returns the address of a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Tells an address that only this machine can reach."""
    host, _ = split_address(address)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_ipv6(host: str) -> bool:
    try:
        return IPv6Address(host).scope_id is None
    except ValueError:
        return False
