"""`dfl-lora found`, `invite` and `join`: how a federation begins, and who belongs to it."""

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfl_lora.cli.options import Settings
from dfl_lora.errors import UserError

if TYPE_CHECKING:
    from dfl_lora.membership.roster import Member, Roster

LONGEST_H = 8760
"""Hours of a year: the inviter's certificate holds no longer."""
To = Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder for keys, roster, recipe and node file.")]
Addresses = Annotated[
    list[str] | None,
    typer.Option("--address", metavar="HOST:PORT", help="Where others reach this machine; may be repeated."),
]
Listen = Annotated[
    str | None, typer.Option("--listen", metavar="HOST:PORT", help="Where it listens; default: the address's port.")
]


def found(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/demo.yaml.")],
    to: To,
    address: Annotated[
        list[str],
        typer.Option("--address", metavar="HOST:PORT", help="Where others reach this machine; may be repeated."),
    ],
    listen: Listen = None,
    peer: Annotated[list[int] | None, typer.Option("--peer", min=0, help="A peer hosted here; default 0.")] = None,
    settings: Settings = None,
) -> None:
    """Begin a federation: its organiser's key, its roster, and this machine as the first member."""
    from dfl_lora import founding
    from dfl_lora.preflight import preflight
    from dfl_lora.reading import load_recipe

    founding.check_new(to)
    addresses, listen = founding.checked_addresses(address, listen)
    resolved = load_recipe(recipe, settings or ())
    peers = hosted(peer or [0], resolved.peers.num_peers)
    preflight(resolved, peers, real=True)

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from dfl_lora.build import checked_digest
    from dfl_lora.files import new_folder
    from dfl_lora.membership.identity import SHOWN, create_identity, write_key
    from dfl_lora.membership.roster import Member, first_roster, write_roster
    from dfl_lora.models.base import locate

    toy = resolved.task.kind == "toy"
    digest = checked_digest(resolved, None if toy else locate(resolved.model.name_or_path, resolved.model.revision))
    organiser = Ed25519PrivateKey.generate()
    with new_folder(to) as folder:
        identity = create_identity(folder / founding.IDENTITY)
        member = Member.of(identity, peers, addresses)
        roster = first_roster(organiser, digest, resolved.peers.num_peers, [member])
        write_key(folder / founding.ORGANISER, organiser)
        write_roster(folder / founding.ROSTER, roster)
        (folder / founding.RECIPE).write_text(founding.shared(resolved, digest), encoding="utf-8")
        (folder / founding.NODE).write_text(founding.founders_node(resolved, peers, listen), encoding="utf-8")
    print(f"Federation {roster.federation[:SHOWN]} of {roster.num_peers} peers is founded in {to}.")
    print(
        f"Keep {to / founding.ORGANISER} to yourself, best offline: it admits members and is needed for nothing else."
    )
    if others := roster.num_peers - len(peers):
        print(f"Invite the others:     dfl-lora invite {to / founding.NODE} --count {others}")
    print(f"Start the peer:        dfl-lora peer {to / founding.RECIPE} --node {to / founding.NODE}")


def invite(
    node: Annotated[Path, typer.Argument(metavar="NODE", help="The node file of this member, such as DIR/node.yaml.")],
    peer: Annotated[
        list[int] | None, typer.Option("--peer", min=0, help="A peer to give away; default: the lowest free one.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many of the lowest free peers.")] = None,
    hours: Annotated[float, typer.Option("--hours", help="How long an invitation holds.")] = 24.0,
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="Where those invited reach this command.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="HOST:PORT", help="Where it waits; default: the node's listen.")
    ] = None,
    organiser: Annotated[
        Path | None, typer.Option("--organiser", help="The organiser's key; default: organiser.key beside NODE.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give away peers that somebody hosts, who lost its keys, for example.")
    ] = False,
) -> None:
    """Print one invitation a line, and wait until each is used or has expired."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from dfl_lora import founding
    from dfl_lora.cli.interruption import Interrupted
    from dfl_lora.membership.admission import Admissions
    from dfl_lora.membership.identity import SHOWN, id_of, load_identity, load_key, public_of
    from dfl_lora.membership.invitation import invite as invitation_to
    from dfl_lora.membership.reception import Reception, listen_at
    from dfl_lora.membership.roster import read_roster
    from dfl_lora.node import load_node

    if not 0 < hours <= LONGEST_H:
        raise UserError(f"--hours is {hours:g}; give more than 0 and at most {LONGEST_H}.")
    own = load_node(node)
    identity, roster = load_identity(own.identity_folder), read_roster(own.roster_path)
    key_file = organiser or node.parent / founding.ORGANISER
    if not key_file.exists():
        raise UserError(f"There is no organiser's key at {key_file}; who founded has it: give it with --organiser.")
    key, recipe = load_key(key_file), recipe_beside(node)
    if id_of(public_of(key)) != roster.federation:
        raise UserError(
            f"{key_file} is not the key of the organiser of federation {roster.federation[:SHOWN]}; "
            "give the right one with --organiser."
        )
    peers = given_away(roster, peer, count, replace)
    place = listen or own.listen
    if place is None:
        raise UserError(f"{node} says listen: null; say with --listen where those you invite reach this command.")
    for flag, given in (("--listen", place), ("--address", address)):
        if given is not None:
            founding.check_address(flag, given)
    with closing(listen_at(place)) as listening:
        reached = address or reached_at(roster.member(identity.id), listen, listening.getsockname()[1])
        expires = int(time.time() + 3600 * hours)
        invitations = [invitation_to(roster, identity.fingerprint, reached, each, expires) for each in peers]
        admissions = Admissions(own.roster_path, key, invitations, replacing=replace)
        reception = Reception(admissions, own.identity_folder, recipe, tell)
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(expires))
        with ThreadPoolExecutor(1) as apart:  # a signal, which the main thread hears, interrupts no admission
            try:
                done = apart.submit(lambda: asyncio.run(reception.receive(listening)))
                for invitation in invitations:
                    print(invitation.token, flush=True)
                tell(f"Waiting at {reached} for {len(peers)} to join, until {until}.")
                done.result()
            except KeyboardInterrupt:
                raise Interrupted("Interrupted; the invitations that were not used are void.") from None
            finally:
                reception.stop()
    if unused := len(peers) - len(admissions.used):
        tell(f"{unused} of {len(peers)} invitations expired unused.")


def join(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="The line that invite printed.")],
    to: To,
    address: Addresses = None,
    listen: Listen = None,
) -> None:
    """Accept an invitation: make keys, be admitted, and fetch the roster and the recipe."""
    from dfl_lora import founding
    from dfl_lora.files import new_folder
    from dfl_lora.membership.identity import SHOWN, create_identity
    from dfl_lora.membership.invitation import read_token
    from dfl_lora.membership.joining import ask
    from dfl_lora.membership.roster import write_roster

    invitation = read_token(token)
    founding.check_new(to)
    addresses, listen = founding.checked_addresses(address or (), listen)
    with new_folder(to) as folder:
        identity = create_identity(folder / founding.IDENTITY)
        roster, recipe = ask(invitation, identity, addresses)
        founding.check_agreed(recipe, invitation.recipe)
        write_roster(folder / founding.ROSTER, roster)
        (folder / founding.RECIPE).write_text(recipe, encoding="utf-8")
        (folder / founding.NODE).write_text(founding.node_text([invitation.peer], listen), encoding="utf-8")
    print(
        f"Member {identity.id[:SHOWN]} hosts peer {invitation.peer} of federation {roster.federation[:SHOWN]} "
        f"(epoch {roster.epoch}, {len(roster.hosts)} of {roster.num_peers} peers have a host)."
    )
    print(f"Say where its rows are: data in {to / founding.NODE}")
    print(f"Start the peer:         dfl-lora peer {to / founding.RECIPE} --node {to / founding.NODE}")


def tell(said: str) -> None:
    """Says what happens beside the output, which is for tokens."""
    print(said, file=sys.stderr, flush=True)


def hosted(peers: list[int], num_peers: int) -> list[int]:
    """Returns the peers in order; raises where one is none of the recipe's or is there twice."""
    if len(set(peers)) < len(peers) or max(peers) >= num_peers:
        raise UserError(f"--peer is {', '.join(map(str, peers))}; give peers from 0 to {num_peers - 1}, each once.")
    return sorted(peers)


def given_away(roster: "Roster", peers: list[int] | None, count: int | None, replace: bool) -> list[int]:
    """Returns the peers to invite to: those named, or the lowest free ones."""
    free = [peer for peer in range(roster.num_peers) if roster.of_peer(peer) is None]
    if peers and count is not None:
        raise UserError("--peer names the peers, and --count takes the lowest free ones; give one of them.")
    if replace and not peers:
        raise UserError("--replace gives away peers that somebody hosts; name them with --peer.")
    if not peers:
        if len(free) < (count or 1):
            raise UserError(
                f"{count or 1} free peers are asked for, and {len(free)} of {roster.num_peers} have no host yet; "
                "lower --count, or give away one that is hosted with --peer and --replace."
            )
        return free[: count or 1]
    named = hosted(peers, roster.num_peers)
    for peer in named:
        if not replace and (holder := roster.of_peer(peer)):
            raise UserError(
                f"Peer {peer} is hosted by member {holder.id[:8]}; name a free one (the lowest is "
                f"{free[0] if free else 'none'}), or give it away all the same with --replace."
            )
        if replace and peer in free:
            raise UserError(f"--replace has no effect on peer {peer}, which nobody hosts; leave it out.")
    return named


def reached_at(member: "Member | None", listen: str | None, port: int) -> str:
    """Returns where those invited call: the member's first address, at the port that --listen has given."""
    from dfl_lora.membership.addresses import join_address, split_address

    if member is None or not member.addresses:
        raise UserError("This member has no address in the roster; say with --address where others reach this command.")
    host, _ = split_address(member.addresses[0])
    return join_address(host, port) if listen else member.addresses[0]


def recipe_beside(node: Path) -> str:
    """Returns the recipe beside a node file, which those who join are sent."""
    from dfl_lora.founding import RECIPE

    path = node.parent / RECIPE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"There is no recipe to send at {path}; it lies beside the node file that found or join made."
        ) from None
