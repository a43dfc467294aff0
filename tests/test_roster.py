"""The roster: what the organiser has signed and is well made is taken, all else is refused with a sentence."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from dfl_lora.errors import UserError
from dfl_lora.membership.identity import VOUCH, new_identity, public_of
from dfl_lora.membership.roster import LARGEST, Member, Roster, first_roster, read_roster, write_roster
from forging import ORGANISER, RECIPE, certificate_like, entry, signed, with_certificate

FIRST, SECOND = entry([0, 2]), entry([1], ["[::1]:7001", "peer.example.org:7001"])
ROSTER = first_roster(ORGANISER, RECIPE, 5, [FIRST, SECOND])
STRANGER = Ed25519PrivateKey.generate()


def member_with(tls: str) -> Member:
    """Returns a member whose key vouches for a certificate that is wrong in one thing."""
    identity = new_identity()
    how = {"ca": {"ca": True}, "signs": {"signs": True}, "of another": {}}[tls]
    name = new_identity().id if tls == "of another" else identity.id
    key, certificate = certificate_like(name, **how)  # type: ignore[arg-type]
    return Member.of(with_certificate(identity, key, certificate), [3], [])


FORGED: dict[str, tuple[Callable[[], Member], str]] = {
    "an id that is not its key's": (lambda: replace(entry([3]), id=new_identity().id), "is not that of its key"),
    "a key of another": (lambda: replace(entry([3]), key=new_identity().public), "is not that of its key"),
    "a certificate in another's name": (lambda: member_with("of another"), "another name"),
    "a certificate of an authority": (lambda: member_with("ca"), "could sign other"),
    "a certificate that may sign": (lambda: member_with("signs"), "could sign other"),
    "a damaged certificate": (lambda: replace(entry([3]), certificate=b"0" * 300), "damaged"),
    "no vouch": (lambda: replace(entry([3]), vouch=bytes(64)), "does not vouch"),
    "a vouch of another": (lambda: vouched_by(STRANGER), "does not vouch"),
    "a member twice": (lambda: replace(FIRST, peers=(3,)), "is there twice"),
    "a peer of another": (lambda: entry([1, 3]), "peer 1 is hosted twice"),
    "a peer twice": (lambda: replace(entry([3]), peers=(3, 3)), "allowed are peers below 5, in order"),
    "peers in another order": (lambda: replace(entry([3]), peers=(4, 3)), "allowed are peers below 5, in order"),
    "a peer that there is not": (lambda: entry([5]), "allowed are peers below 5, in order"),
    "no peer": (lambda: entry([]), "malformed: members.2.peers: "),
    "a peer below 0": (lambda: entry([-1]), "malformed"),
    "an address that is none": (lambda: entry([3], ["nowhere"]), "no address"),
    "an address with port 0": (lambda: entry([3], ["127.0.0.1:0"]), "has port 0"),
    "too many addresses": (
        lambda: entry([3], [f"127.0.0.1:{p}" for p in range(1, 10)]),
        "malformed: members.2.addresses: ",
    ),
    "a certificate too large": (
        lambda: replace(entry([3]), certificate=bytes(2049)),
        "malformed: members.2.certificate: ",
    ),
}


def vouched_by(key: Ed25519PrivateKey) -> Member:
    member = entry([3])
    return replace(member, vouch=key.sign(VOUCH + member.certificate))


def test_a_roster_that_is_read_is_the_one_that_was_signed(tmp_path: Path) -> None:
    assert Roster.from_json(ROSTER.to_json()) == ROSTER
    write_roster(tmp_path / "roster.json", ROSTER)
    assert read_roster(tmp_path / "roster.json") == ROSTER


def test_a_roster_says_who_hosts_a_peer_and_where_it_is() -> None:
    assert [ROSTER.of_peer(i) for i in range(5)] == [FIRST, SECOND, FIRST, None, None]
    assert ROSTER.member(SECOND.id) == SECOND and ROSTER.member("a") is None
    assert SECOND.addresses == ("[::1]:7001", "peer.example.org:7001")


def test_a_members_certificate_in_pem_is_the_one_it_was_made_with() -> None:
    identity = new_identity()
    member = Member.of(identity, [0], [])
    assert b"".join(member.certificate_pem.split()) == b"".join(identity.certificate.split())
    assert member.fingerprint == identity.fingerprint


@pytest.mark.parametrize("what", FORGED)
def test_an_entry_that_is_wrong_in_one_thing_is_refused_even_where_the_organiser_signed_it(what: str) -> None:
    make, said = FORGED[what]
    with pytest.raises(ValueError, match=said):
        Roster.from_json(signed(replace(ROSTER, members=(*ROSTER.members, make()))))


@pytest.mark.parametrize("what", FORGED)
def test_an_organiser_signs_no_entry_that_would_be_refused(what: str) -> None:
    make, said = FORGED[what]
    with pytest.raises(ValueError, match=said):
        replace(ROSTER, members=(*ROSTER.members, make())).sealed_by(ORGANISER)


def test_an_honest_entry_is_taken_in_the_same_way() -> None:
    members = (*ROSTER.members, entry([3, 4], []))
    assert Roster.from_json(signed(replace(ROSTER, members=members))).of_peer(4) == members[2]


def test_a_roster_that_its_organiser_did_not_sign_is_refused() -> None:
    for content in (
        signed(ROSTER, STRANGER),
        replace(ROSTER, signature=bytes(64)).to_json(),
        replace(ROSTER, epoch=2).to_json(),
        replace(ROSTER, members=ROSTER.members[:1]).to_json(),
        replace(ROSTER, organiser=public_of(STRANGER)).to_json(),
        replace(ROSTER, signature=ORGANISER.sign(replace(ROSTER, signature=bytes(64)).to_json())).to_json(),
    ):
        with pytest.raises(ValueError, match="not signed by its organiser"):
            Roster.from_json(content)


def test_only_the_organisers_key_signs() -> None:
    with pytest.raises(ValueError, match="the key is not that of the organiser"):
        ROSTER.sealed_by(STRANGER)


@pytest.mark.parametrize(("change", "said"), [
    (lambda j: j + b"\n", "canonical"),
    (lambda j: j.replace(b",", b", ", 1), "canonical"),
    (lambda j: j.replace(b'{"epoch":1,', b'{"epoch":1,"epoch":1,'), "canonical"),
    (lambda j: j.replace(b'"recipe":"a', b'"recipe":"\\u0061'), "canonical"),
    (lambda j: json.dumps(dict(reversed(json.loads(j).items())), separators=(",", ":")).encode(), "canonical"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":NaN'), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":1.0'), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":true'), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":0'), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":"1"'), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":9223372036854775808'), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":' + b"9" * 5000), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":1,"\x1b[31m":1'), "malformed"),
    (lambda j: j.replace(b'"epoch":1', b'"epoch":1,"more":1'), "malformed"),
    (lambda j: j.replace(b'"epoch":1,', b""), "malformed"),
    (lambda j: j.replace(b'"num_peers":5', b'"num_peers":0'), "malformed"),
    (lambda j: j.replace(b'"recipe":"a', b'"recipe":"g'), "malformed"),
    (lambda j: j.replace(b'"run":"', b'"run":"00'), "malformed"),
    (lambda j: j[:-1], "malformed"),
    (lambda j: b"", "malformed"),
    (lambda j: b"[]", "malformed"),
    (lambda j: b"[" * 10**6, "malformed"),
    (lambda j: b"\xff" + j, "malformed"),
    (lambda j: b" " * (LARGEST + 1), "bytes; allowed are"),
])  # fmt: skip
def test_a_roster_in_any_other_writing_is_refused_in_printable_letters(
    change: Callable[[bytes], bytes], said: str
) -> None:
    content = change(ROSTER.to_json())
    assert content != ROSTER.to_json()
    with pytest.raises(ValueError, match=said) as raised:
        Roster.from_json(content)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300


@given(st.data())
def test_no_byte_of_a_roster_can_be_changed(data: st.DataObject) -> None:
    content = bytearray(ROSTER.to_json())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        Roster.from_json(bytes(content))


def test_of_two_rosters_of_one_run_the_higher_epoch_holds() -> None:
    later = ROSTER.admitting(entry([3])).sealed_by(ORGANISER)
    assert later.epoch == 2 and later.supersedes(ROSTER)
    assert not ROSTER.supersedes(later) and not ROSTER.supersedes(ROSTER)
    sibling = ROSTER.admitting(entry([4])).sealed_by(ORGANISER)
    assert not sibling.supersedes(later) and not later.supersedes(sibling)


def test_a_roster_of_another_organiser_or_of_another_run_supersedes_none() -> None:
    foreign = replace(ROSTER, organiser=public_of(STRANGER), epoch=9).sealed_by(STRANGER)
    again = replace(ROSTER, run="0" * 32, epoch=9).sealed_by(ORGANISER)
    assert foreign.federation != ROSTER.federation
    assert not foreign.supersedes(ROSTER) and not again.supersedes(ROSTER)


def test_a_new_member_takes_its_peers_over_and_who_hosts_none_is_out() -> None:
    third, fourth = entry([2]), entry([1])
    later = ROSTER.admitting(third).sealed_by(ORGANISER)
    assert later.of_peer(0) == replace(FIRST, peers=(0,)) and later.of_peer(2) == third and later.of_peer(1) == SECOND
    last = later.admitting(fourth).sealed_by(ORGANISER)
    assert last.member(SECOND.id) is None and last.of_peer(1) == fourth


def test_two_foundings_never_share_a_run() -> None:
    assert first_roster(ORGANISER, RECIPE, 5, []).run != first_roster(ORGANISER, RECIPE, 5, []).run


def test_a_roster_file_that_is_absent_or_forged_is_told_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "roster.json"
    with pytest.raises(UserError, match=f"There is no roster at {file}"):
        read_roster(file)
    file.write_bytes(signed(ROSTER, STRANGER))
    with pytest.raises(UserError, match="is no good: the roster is not signed by its organiser"):
        read_roster(file)


def test_a_thousand_members_are_read_in_a_second() -> None:
    members = tuple(entry([i]) for i in range(1000))
    roster = first_roster(ORGANISER, RECIPE, 1000, members)
    content, start = roster.to_json(), time.process_time()
    assert Roster.from_json(content) == roster
    assert time.process_time() - start < 1 and len(content) < LARGEST / 10
