"""Invitations: a secret works once, is said to the inviter alone, and what strangers send changes nothing."""

import asyncio
import json
import socket
import ssl
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dfl_lora.errors import UserError
from dfl_lora.membership.admission import REQUEST, Admissions, Refused, Request
from dfl_lora.membership.identity import Identity, create_identity, load_identity, new_identity
from dfl_lora.membership.invitation import INVITATION, MARK, Invitation, invite, read_token
from dfl_lora.membership.joining import ask
from dfl_lora.membership.reception import LONGEST, TOLD, Reception, listen_at
from dfl_lora.membership.roster import Member, Roster, read_roster
from forging import ORGANISER, RECIPE, certificate_like, founded, with_certificate

PATIENCE_S = 0.5
YAML = "name: of the inviter\n"


@dataclass(frozen=True)
class Door:
    """An inviter that waits in a thread."""

    folder: Path
    invitations: list[Invitation]
    reception: Reception
    said: list[str]
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.invitations[0].address.rpartition(":")[2])

    @property
    def roster(self) -> Roster:
        return read_roster(self.folder / "roster.json")

    def tls(self, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLSocket:
        """Returns a stranger's TLS connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, highest
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout=10)) as plain:
            return context.wrap_socket(plain)

    def ended(self) -> bool:
        self.thread.join(20)
        return not self.thread.is_alive()


@contextmanager
def waiting(folder: Path, peers: list[int], seconds: float = 60, replacing: bool = False) -> Iterator[Door]:
    """Waits for those who are invited to host the peers; ends them in the end."""
    if not (folder / "roster.json").exists():
        founded(folder)
    identity, roster = load_identity(folder / "identity"), read_roster(folder / "roster.json")
    with closing(listen_at("127.0.0.1:0")) as listening:
        address, expires = f"127.0.0.1:{listening.getsockname()[1]}", int(time.time() + seconds)
        invitations = [invite(roster, identity.fingerprint, address, peer, expires) for peer in peers]
        admissions, said = Admissions(folder / "roster.json", ORGANISER, invitations, replacing=replacing), list[str]()
        reception = Reception(admissions, folder / "identity", YAML, said.append, PATIENCE_S)
        thread = threading.Thread(target=lambda: asyncio.run(reception.receive(listening)))
        thread.start()
        door = Door(folder, invitations, reception, said, thread)
        try:
            yield door
        finally:
            for invitation in admissions.waiting(time.time()):
                ask(invitation, new_identity(), [])
            assert door.ended()


def request_of(invitation: Invitation, identity: Identity, addresses: tuple[str, ...] = ()) -> bytes:
    member = Member.of(identity, [invitation.peer], addresses)
    request = Request(invitation.secret, member.key, member.certificate, member.vouch, addresses)
    return bytes(REQUEST.dump_json(request)) + b"\n"


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def answer_to(connection: socket.socket, said: bytes) -> bytes:
    """Returns all that comes back, until the other side ends it."""
    answer = b""
    with suppress(OSError):
        connection.sendall(said)
        while more := connection.recv(65536):
            answer += more
    return answer


# ---- the token


def invitation(**parts: object) -> Invitation:
    made = Invitation("127.0.0.1:7000", 2_000_000_000, "a" * 52, "0" * 64, 1, RECIPE, bytes(range(16)))
    return replace(made, **parts)  # type: ignore[arg-type]


def test_a_token_is_one_line_that_says_all_and_its_representation_says_no_secret() -> None:
    made = invitation()
    assert read_token(made.token) == made and read_token(f"  {made.token}\n") == made
    assert made.token.startswith(MARK) and made.token.isprintable() and " " not in made.token
    assert made.secret.hex() not in repr(made) and repr(made.secret) not in repr(made)


@pytest.mark.parametrize("token", [
    "", "dfl1:", "dfl1:e30", "dfl1:!!!!", "dfl2:" + invitation().token[5:], invitation().token[:-7],
    invitation().token[5:], "dfl1:" + "A" * 5000, invitation().token + "=", invitation(address="nowhere").token,
    invitation(address="\x1b[2J:7").token, MARK + urlsafe_b64encode(b"[" * 3000).decode().rstrip("="),
    MARK + urlsafe_b64encode(INVITATION.dump_json(invitation())[:-1] + b',"more":1}').decode().rstrip("="),
])  # fmt: skip
def test_what_is_no_token_is_refused_without_repeating_it(token: str) -> None:
    with pytest.raises(UserError, match="This is no invitation, or a part of it is lost") as raised:
        read_token(token)
    assert len(token) < 8 or token[5:] not in str(raised.value)


def test_two_invitations_never_share_a_secret(tmp_path: Path) -> None:
    identity, roster = founded(tmp_path)
    made = [invite(roster, identity.fingerprint, "127.0.0.1:7000", 1, 0) for _ in range(2)]
    assert made[0].secret != made[1].secret


# ---- joining


def test_who_brings_an_invitation_is_in_the_next_epoch_and_the_inviter_ends(tmp_path: Path) -> None:
    with waiting(tmp_path, [1, 3]) as door:
        for epoch, (each, addresses) in enumerate(zip(door.invitations, ([], ["[::1]:7001"]), strict=True), 2):
            identity = new_identity()
            roster, recipe = ask(each, identity, addresses)
            assert recipe == YAML and roster == door.roster and roster.epoch == epoch
            assert roster.of_peer(each.peer) == Member.of(identity, [each.peer], addresses)
        assert door.ended()
    assert sorted(door.roster.hosts) == [0, 1, 3] and not door.reception.refused
    assert [line.rpartition(" as ")[2] for line in door.said] == ["peer 1 (epoch 2).", "peer 3 (epoch 3)."]


def test_an_invitation_works_once(tmp_path: Path) -> None:
    with waiting(tmp_path, [1, 2]) as door:
        ask(door.invitations[0], new_identity(), [])
        before = door.roster
        with pytest.raises(UserError, match="refuses the invitation: this invitation has been used"):
            ask(door.invitations[0], new_identity(), [])
        assert door.roster == before


def test_an_expired_invitation_is_refused_by_the_inviters_clock_and_the_inviter_ends(tmp_path: Path) -> None:
    identity, roster = founded(tmp_path)
    late = invite(roster, identity.fingerprint, "127.0.0.1:7000", 1, int(time.time()) - 1)
    request = REQUEST.validate_json(request_of(late, new_identity()))
    admissions = Admissions(tmp_path / "roster.json", ORGANISER, [late])
    with pytest.raises(Refused, match="has expired"):
        admissions.admit(request, time.time())
    assert read_roster(tmp_path / "roster.json") == roster and admissions.admit(request, time.time() - 10)
    with waiting(tmp_path, [2], seconds=1) as door:
        assert door.ended() and door.roster.of_peer(2) is None


def test_wrong_secrets_end_nothing_are_answered_late_and_told_a_few_times(tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door:
        wrong, start = replace(door.invitations[0], secret=bytes(16)), time.monotonic()
        lines = []
        for _ in range(2):
            with pytest.raises(UserError, match="the secret is of no invitation that is out"):
                ask(wrong, new_identity(), [])
        assert time.monotonic() - start >= 2
        for _ in range(TOLD):
            connection = door.tls()
            connection.sendall(request_of(wrong, new_identity()))
            lines.append(connection)
        assert until(lambda: door.reception.refused["secret"] == 2 + TOLD)
        for connection in lines:
            connection.close()
        assert sum("secret" in line for line in door.said) == TOLD and door.roster.epoch == 1
        assert ask(door.invitations[0], new_identity(), [])[0].epoch == 2


@contextmanager
def in_between(folder: Path, answer: bytes = b"") -> Iterator[tuple[int, list[bytes]]]:
    """Listens with a certificate of its own, or that of a folder; keeps what is said to it."""
    if not (folder / "certificate.pem").exists():
        create_identity(folder)
    context, heard = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), list[bytes]()
    context.load_cert_chain(folder / "certificate.pem", folder / "tls.pem")

    def listen() -> None:
        with closing(listening.accept()[0]) as plain, suppress(OSError):
            plain.settimeout(10)
            with closing(context.wrap_socket(plain, server_side=True)) as connection:
                heard.append(connection.recv(65536))
                connection.sendall(answer)

    with closing(listen_at("127.0.0.1:0")) as listening:
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield listening.getsockname()[1], heard
        finally:
            thread.join(20)


def test_who_stands_in_between_hears_no_secret(tmp_path: Path) -> None:
    identity, roster = founded(tmp_path / "inviter")
    with in_between(tmp_path / "stranger") as (port, heard):
        made = invite(roster, identity.fingerprint, f"127.0.0.1:{port}", 1, int(time.time()) + 60)
        with pytest.raises(UserError, match=r"is not who invited.*the secret was not sent"):
            ask(made, new_identity(), [])
    assert b"".join(heard) == b""


@pytest.mark.parametrize(("forge", "said"), [
    (lambda roster, own, made: b"", "did not answer"),
    (lambda roster, own, made: b"{}\n", "not what the invitation says: the roster is malformed"),
    (lambda roster, own, made: b"[1, 2]\n", "did not answer"),
    (lambda roster, own, made: answering(roster), "does not say that member .* hosts peer 1"),
    (lambda roster, own, made: answering(joined(roster, own, [2])), "does not say that member .* hosts peer 1"),
    (lambda roster, own, made: answering(joined(foreign(roster), own, [1])), "is of federation"),
    (lambda roster, own, made: answering(joined(replace(roster, recipe="b" * 64), own, [1])), "digest bbbb"),
    (lambda roster, own, made: json.dumps({"refused": "\x1b[2J" + "no" * 999}).encode() + b"\n", r"\[2Jno"),
])  # fmt: skip
def test_an_answer_that_is_not_what_the_invitation_says_is_refused(
    forge: Callable[[Roster, Identity, Invitation], bytes], said: str, tmp_path: Path
) -> None:
    inviter, roster = founded(tmp_path)
    own = new_identity()
    with in_between(tmp_path / "identity", forge(roster, own, invitation())) as (port, _):
        made = invite(roster, inviter.fingerprint, f"127.0.0.1:{port}", 1, int(time.time()) + 60)
        with pytest.raises(UserError, match=said) as raised:
            ask(made, own, [])
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500


def answering(roster: Roster) -> bytes:
    return json.dumps({"roster": roster.to_json().decode(), "recipe": YAML}).encode() + b"\n"


def joined(roster: Roster, identity: Identity, peers: list[int]) -> Roster:
    key = STRANGER if roster.organiser == STRANGER.public_key().public_bytes_raw() else ORGANISER
    return roster.admitting(Member.of(identity, peers, [])).sealed_by(key)


STRANGER = new_identity().key


def foreign(roster: Roster) -> Roster:
    return replace(roster, organiser=STRANGER.public_key().public_bytes_raw())


def test_nobody_at_the_address_is_told_with_what_to_do() -> None:
    with closing(listen_at("127.0.0.1:0")) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(UserError, match=r"Nobody who could admit answers at 127.0.0.1:\d+ \(nobody listens there\)"):
        ask(invitation(address=f"127.0.0.1:{port}"), new_identity(), [])


# ---- entries that are refused, and keep the secret's worth


def test_an_entry_that_is_no_good_is_refused_and_the_invitation_stays_good(tmp_path: Path) -> None:
    member, other = new_identity(), new_identity()
    signing = with_certificate(member, *certificate_like(member.id, signs=True))
    forged = with_certificate(member, *certificate_like(other.id))
    with waiting(tmp_path, [1]) as door:
        first = door.invitations[0]
        for identity, addresses, said in (
            (signing, [], "could sign other"),
            (forged, [], "bears another name"),
            (member, ["nowhere"], "no address"),
            (member, ["127.0.0.1:0"], "has port 0"),
        ):
            with pytest.raises(UserError, match=said):
                ask(first, identity, addresses)
        assert door.roster.epoch == 1
        assert ask(first, member, [])[0].epoch == 2


def test_a_member_does_not_join_twice_and_a_peer_is_not_given_away_twice(tmp_path: Path) -> None:
    with waiting(tmp_path, [1, 2, 1]) as door:
        first, second, again = door.invitations
        identity = new_identity()
        ask(first, identity, [])
        with pytest.raises(UserError, match="is in the federation already"):
            ask(second, identity, [])
        with pytest.raises(UserError, match="peer 1 is hosted by member"):
            ask(again, new_identity(), [])
        ask(second, new_identity(), [])
        door.reception.admissions.used.add(again)
        with suppress(OSError):
            door.tls().close()  # wakes the door


def test_a_lost_member_is_replaced_where_the_invitation_says_so(tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door:
        ask(door.invitations[0], new_identity(), [])
    lost = door.roster.of_peer(1)
    with waiting(tmp_path, [1], replacing=True) as door:
        roster, _ = ask(door.invitations[0], new_identity(), [])
    assert lost and roster.member(lost.id) is None and roster.of_peer(1) not in (None, lost)


def test_a_roster_that_cannot_be_written_admits_nobody_and_the_invitation_stays_good(tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door:
        whole = (tmp_path / "roster.json").read_bytes()
        (tmp_path / "roster.json").write_bytes(b"")
        with pytest.raises(UserError, match="the inviter cannot read or write its roster"):
            ask(door.invitations[0], new_identity(), [])
        (tmp_path / "roster.json").write_bytes(whole)
        assert any("Cannot admit" in line for line in door.said)


# ---- strangers at the door


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00" + b"\xff" * 999, b"", b"\0" * 9]
)
def test_garbage_and_plaintext_are_refused_with_a_line(said: bytes, tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door:
        with closing(socket.create_connection(("127.0.0.1", door.port), timeout=10)) as connection:
            assert YAML.encode() not in answer_to(connection, said)
        assert until(lambda: door.reception.refused["tls"] == 1)
        assert "no TLS 1.3 handshake" in door.said[0] and door.roster.epoch == 1


def test_a_request_in_plaintext_admits_nobody(tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door:
        with closing(socket.create_connection(("127.0.0.1", door.port), timeout=10)) as connection:
            answer_to(connection, request_of(door.invitations[0], new_identity()))
        assert until(lambda: door.reception.refused["tls"] == 1) and door.roster.epoch == 1


def test_tls_1_2_is_refused_with_a_line(tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door:
        with pytest.raises(OSError):
            door.tls(ssl.TLSVersion.TLSv1_2)
        assert until(lambda: door.reception.refused["tls"] == 1)
        assert "unsupported protocol" in door.said[0] and door.roster.epoch == 1


@pytest.mark.parametrize(("said", "kind"), [
    (b"x" * (LONGEST + 9), "size"), (b"x" * 10_000_000, "size"),
    (b"\n", "malformed"), (b"{}\n", "malformed"), (b"\xff\xfe\n", "malformed"), (b"[" * 60_000 + b"\n", "malformed"),
    (b'{"secret": NaN}\n', "malformed"),
])  # fmt: skip
def test_a_giant_or_malformed_request_is_refused_with_a_line(said: bytes, kind: str, tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door:
        with closing(door.tls()) as connection:
            assert answer_to(connection, said) == b""
        assert until(lambda: door.reception.refused[kind] == 1) and len(door.said) == 1
        assert door.roster.epoch == 1


def test_who_drips_bytes_is_refused_in_time_and_delays_nobody(tmp_path: Path) -> None:
    with waiting(tmp_path, [1, 2]) as door:
        request, start = request_of(door.invitations[0], new_identity()), time.monotonic()
        with closing(door.tls()) as connection, closing(socket.create_connection(("127.0.0.1", door.port))) as silent:
            assert ask(door.invitations[0], new_identity(), [])[0].epoch == 2
            assert time.monotonic() - start < PATIENCE_S
            with suppress(OSError):
                for byte in request[:40]:
                    connection.sendall(bytes([byte]))
                    time.sleep(PATIENCE_S / 20)
            assert answer_to(silent, b"") == b""
        assert until(lambda: door.reception.refused == {"late": 1, "tls": 1})


def test_who_says_nothing_after_the_handshake_is_refused_in_time(tmp_path: Path) -> None:
    with waiting(tmp_path, [1]) as door, closing(door.tls()) as connection:
        assert answer_to(connection, request_of(door.invitations[0], new_identity())[:50]) == b""
        assert door.reception.refused == {"late": 1} and "no request within" in door.said[0]


def test_an_address_in_use_is_told_with_what_to_do() -> None:
    with closing(listen_at("127.0.0.1:0")) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=r"Cannot listen at .* another port with --listen"):
            listen_at(f"127.0.0.1:{port}")
