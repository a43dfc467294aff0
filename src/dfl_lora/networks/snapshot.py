"""How things are with each neighbour, as JSON: what `status` shows."""

from typing import Any

from dfl_lora.networks.conversation import AT_LAST, Conversation
from dfl_lora.networks.messages import BEFORE


def snapshot(c: Conversation) -> dict[str, Any]:
    """Returns how things are with each neighbour, as JSON."""
    members = [seen_as(c, id) for id in sorted(c.links.standing)]
    return {
        "id": c.identity.id,
        "peers": sorted(c.hosted),
        "epoch": c.roster.epoch,
        "round": c.next[0] if c.next < AT_LAST else None,
        "bytes_sent": sum(m["bytes_sent"] for m in members),
        "bytes_received": sum(m["bytes_received"] for m in members),
        "members": members,
    }


def seen_as(c: Conversation, id: str) -> dict[str, Any]:
    """Returns one member as this end sees it."""
    standing, link, member = c.links.standing[id], c.links.open.get(id), c.roster.member(id)
    there, here = c.positions.get(id, BEFORE)[0], c.next[0]
    known = 0 <= there < AT_LAST[0] and here < AT_LAST[0]
    return {
        "id": id,
        "peers": list(member.peers) if member else [],
        "state": standing.state,
        "since": standing.since.isoformat(timespec="seconds"),
        "why": standing.why,
        "address": link.stream.address if link else None,
        "round": there if 0 <= there < AT_LAST[0] else None,
        "lag": here - there if known else None,
        "links": standing.links,
        "bytes_sent": standing.sent + (link.sent if link else 0),
        "bytes_received": standing.received + (link.received if link else 0),
        "refused": dict(c.border.refused.get(id, {})),
        "strikes": c.border.strikes(id),
    }
