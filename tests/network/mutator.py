"""Frames as no honest peer sends them: seeded changes of valid ones, most of them signed again by a roster's key.

Each mutation says by its name what was done; none leaves a frame valid. So every mutant must be refused, and every
frame that was not changed, sent in between, must be taken in to the bit.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from struct import pack_into

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from dfl_lora.codecs.frames import Frame
from dfl_lora.membership.identity import Identity, certify, id_of, pem, public_of
from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks.body import Expectation
from dfl_lora.networks.border import Border
from dfl_lora.networks.sealed import MAGIC, START, VERSION, Header, Refusal, open_sealed, seal, to_sign

MAX_NORM = 1000.0
HOSTS = ((0,), (1, 6), (2,), (4,))
"""The peers of each member; 3, 5 and 7 are nobody's. Two flipped bits do not make 1 of 6."""
EPOCH = 8
"""Two flipped bits do not make the epoch before of it."""
MOMENT = (5, 1)
RECIPE = hashlib.sha256(b"recipe").hexdigest()
LAYOUT = hashlib.sha256(b"layout").hexdigest()


@dataclass(frozen=True)
class Federation:
    """Members with their keys, and what their peers send each other at this moment."""

    identities: Mapping[str, Identity]
    roster: Roster
    moment: tuple[int, int]
    frame: Frame
    organiser: Ed25519PrivateKey

    def host(self, peer: int) -> Identity:
        member = self.roster.of_peer(peer)
        assert member is not None
        return self.identities[member.id]

    def border(self) -> Border:
        """Returns a border at which the exchange of this moment is open."""
        border = Border(self.roster, RECIPE, lambda member, refusal: None)
        border.expect(self.moment, Expectation.of(self.frame), MAX_NORM)
        return border


def federation(seed: int = 0) -> Federation:
    """Returns four members with five peers; a message holds tensors of four types."""
    random = Random(f"federation {seed}")
    keys = [Ed25519PrivateKey.from_private_bytes(random.randbytes(32)) for _ in range(len(HOSTS) + 1)]
    identities, members = [], []
    for key, peers in zip(keys[1:], HOSTS, strict=True):
        tls_key = ec.generate_private_key(ec.SECP256R1())
        certificate = certify(tls_key, id_of(public_of(key))).public_bytes(Encoding.PEM)
        one = Identity(key, pem(tls_key), certificate)
        identities.append(one)
        members.append(Member(one.id, one.public, one.certificate_der, one.vouch, peers, ("127.0.0.1:7000",)))
    unsigned = Roster(public_of(keys[0]), EPOCH, random.randbytes(16).hex(), RECIPE, 8, tuple(members))
    body = {
        "x": torch.zeros(6, 4),
        "scale": torch.zeros(3, dtype=torch.float64),
        "half": torch.zeros(4, dtype=torch.bfloat16),
        "q": torch.zeros(5, dtype=torch.int8),
    }
    frame = Frame("fp32", LAYOUT, body)
    return Federation({i.id: i for i in identities}, unsigned.sealed_by(keys[0]), MOMENT, frame, keys[0])


@dataclass(frozen=True)
class Valid:
    """A frame as an honest peer sends it."""

    identity: Identity
    header: Header
    body: bytearray
    passed: tuple[bytes, ...] = ()
    """The announcements of the same peer that passed so far, the last one last."""

    @cached_property
    def sealed(self) -> bytes:
        return seal(self.header, self.identity.sign)

    @property
    def content(self) -> bytes:
        return self.header.to_json()


@dataclass(frozen=True)
class Mutant:
    """What a member sends in place of a valid frame."""

    member: str
    sealed: bytes
    body: bytearray
    resigned: bool = False


@dataclass
class Source:
    """Valid frames of a federation, each with a sequence of its own."""

    federation: Federation
    random: Random
    sequence: int = 0
    passed: dict[int, deque[bytes]] = field(default_factory=dict)

    @cached_property
    def expected(self) -> Expectation:
        return Expectation.of(self.federation.frame)

    def valid(self) -> Valid:
        """Returns a new frame of a random peer, with random numbers."""
        random, roster, body = self.random, self.federation.roster, bytearray(self.expected.length)
        body[: len(self.expected.prefix)] = self.expected.prefix
        pack_into("<24f", body, self.expected.places["x"].start, *(random.uniform(-1, 1) for _ in range(24)))
        pack_into("<5s", body, self.expected.places["q"].start, random.randbytes(5))
        sender = random.choice([peer for peers in HOSTS for peer in peers])
        self.sequence += 1
        header = Header(
            roster.federation, roster.run, RECIPE, LAYOUT, "fp32", roster.epoch, *self.federation.moment,
            self.sequence, sender, len(body), hashlib.sha256(body).hexdigest(),
        )  # fmt: skip
        return Valid(self.federation.host(sender), header, body, tuple(self.passed.get(sender, ())))

    def note(self, sender: int, sealed: bytes) -> None:
        """Takes down that an announcement passed."""
        self.passed.setdefault(sender, deque(maxlen=8)).append(sealed)


Mutation = Callable[[Random, Federation, Valid], Mutant]


def as_sent(good: Valid, sealed: bytes, body: bytearray | None = None) -> Mutant:
    return Mutant(good.identity.id, sealed, good.body if body is None else body)


def signed(
    good: Valid,
    content: bytes,
    body: bytearray | None = None,
    *,
    magic: bytes = MAGIC,
    version: int = VERSION,
    size: int | None = None,
) -> Mutant:
    """Returns a header, whatever it is, with a signature that is right."""
    unsigned = START.pack(magic, version, len(content) if size is None else size) + content
    sealed = unsigned + good.identity.sign(to_sign(unsigned))
    return Mutant(good.identity.id, sealed, good.body if body is None else body, resigned=True)


def with_body(good: Valid, body: bytearray) -> Mutant:
    """Returns a body, whatever it is, with a header and a signature that are right for it."""
    header = replace(good.header, length=len(body), sha256=hashlib.sha256(body).hexdigest())
    return signed(good, header.to_json(), body)


def flipped(random: Random, content: bytes, most: int, first: int = 0, last: int | None = None) -> bytearray:
    """Returns the bytes with a few bits of a part of them turned over."""
    changed = bytearray(content)
    for bit in random.sample(range(8 * first, 8 * (len(content) if last is None else last)), random.randint(1, most)):
        changed[bit // 8] ^= 1 << bit % 8
    return changed


def cut_or_longer(random: Random, content: bytes) -> bytearray:
    """Returns the bytes without an end, or with something put in."""
    if random.random() < 0.5:
        return bytearray(content[: random.randrange(len(content))])
    place = random.randint(0, len(content))
    return bytearray(content[:place] + random.randbytes(random.randint(1, 64)) + content[place:])


def raw(pairs: list[tuple[str, object]]) -> bytes:
    """Returns JSON of pairs as they are given."""
    return ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}").encode()


# ---- the announcement, not signed again


def seal_flipped(random: Random, here: Federation, good: Valid) -> Mutant:
    return as_sent(good, bytes(flipped(random, good.sealed, 8)))


def seal_cut_or_longer(random: Random, here: Federation, good: Valid) -> Mutant:
    return as_sent(good, bytes(cut_or_longer(random, good.sealed)))


def signature_of_another_frame(random: Random, here: Federation, good: Valid) -> Mutant:
    other = seal(replace(good.header, sequence=good.header.sequence + 1), good.identity.sign)
    return as_sent(good, good.sealed[:-64] + other[-64:])


def last_again(random: Random, here: Federation, good: Valid) -> Mutant:
    return as_sent(good, good.passed[-1])


def recorded(random: Random, here: Federation, good: Valid) -> Mutant:
    return as_sent(good, random.choice(good.passed[:-1]))


def on_the_link_of_another(random: Random, here: Federation, good: Valid) -> Mutant:
    return replace(as_sent(good, good.sealed), member=another(random, here, good).id)


def another(random: Random, here: Federation, good: Valid) -> Identity:
    return random.choice([identity for identity in here.identities.values() if identity.id != good.identity.id])


# ---- the announcement, signed again


def signed_by_another(random: Random, here: Federation, good: Valid) -> Mutant:
    return replace(signed(replace(good, identity=another(random, here, good)), good.content), member=good.identity.id)


def another_magic(random: Random, here: Federation, good: Valid) -> Mutant:
    return signed(good, good.content, magic=bytes(flipped(random, MAGIC, 4)))


def another_version(random: Random, here: Federation, good: Valid) -> Mutant:
    return signed(good, good.content, version=random.choice([0, *range(2, 256)]))


def another_size(random: Random, here: Federation, good: Valid) -> Mutant:
    size = len(good.content)
    return signed(good, good.content, size=random.choice([n for n in (0, size - 1, size + 1, 65_535) if n != size]))


def header_too_long(random: Random, here: Federation, good: Valid) -> Mutant:
    return signed(good, good.content + b" " * random.randint(1024, 4096))


def header_flipped(random: Random, here: Federation, good: Valid) -> Mutant:
    """A sequence is let alone: any higher one is right."""
    content, first, last = good.content, 0, good.content.index(b'"sequence"')
    if random.random() < 0.3:
        first, last = good.content.index(b',"sha256"'), len(content)
    return signed(good, bytes(flipped(random, content, 2, first, last)))


def header_cut_or_longer(random: Random, here: Federation, good: Valid) -> Mutant:
    return signed(good, bytes(cut_or_longer(random, good.content)))


def header_in_another_order(random: Random, here: Federation, good: Valid) -> Mutant:
    pairs = list(vars(good.header).items())  # not in the order of the alphabet
    if random.random() < 0.5:
        pairs = sorted(pairs)
        pairs.insert(random.randint(0, len(pairs)), random.choice(pairs))
    elif random.random() < 0.5:
        random.shuffle(pairs)
        pairs.append(pairs.pop(pairs.index(("codec", "fp32"))))
    return signed(good, raw(pairs))


def header_with_blanks(random: Random, here: Federation, good: Valid) -> Mutant:
    content = good.content
    place = random.choice([n for n, byte in enumerate(content) if byte in b'{}:,"'])
    return signed(good, content[:place] + random.choice([b" ", b"\n", b"\t", b"\0", b"\\u0020"]) + content[place:])


def value_of_another_type(random: Random, here: Federation, good: Valid) -> Mutant:
    values = [None, True, [], {}, 1.5, -1, 2**63, 10**40, float("nan"), float("inf"), "", "A" * 64, "../../x", "é", 1e3]
    name = random.choice(list(vars(good.header)))
    return signed(good, raw(sorted((vars(good.header) | {name: random.choice(values)}).items())))


def other_field(random: Random, here: Federation, good: Valid) -> Mutant:
    """One field says something that would be right elsewhere."""
    digest, member, far = hashlib.sha256(random.randbytes(8)).hexdigest(), another(random, here, good), 2**62
    (round, exchange), last = here.moment, open_sealed(good.passed[-1])
    assert not isinstance(last, Refusal)
    choices: list[dict[str, object]] = [
        {"federation": member.id},
        {"run": digest[:32]},
        {"recipe": digest},
        {"epoch": random.choice([0, EPOCH - 2, EPOCH + 1, random.randrange(EPOCH + 1, far)])},
        {"codec": random.choice(["fp16", "int8", "f", "x" * 32])},
        {"layout": digest},
        {"length": random.choice([0, good.header.length + random.choice([-1, 1]), 10**11, 2**63 - 1])},
        {"sender": random.choice([3, 5, 7, 8, far, *[p for p in (0, 1, 2, 4, 6) if here.host(p) is member]])},
        {"sequence": random.choice([0, last.header.sequence, random.randrange(last.header.sequence + 1)])},
        {"sha256": digest},
        random.choice([{"exchange": exchange - 1}, {"round": random.randrange(round)}]),
        {"round": random.choice([round + 2, random.randrange(round + 2, far)])},
        random.choice([{"exchange": random.randrange(exchange + 2, far)}, {"round": round + 1}]),
    ]
    return signed(good, raw(sorted((vars(good.header) | random.choice(choices)).items())))


def ahead(random: Random, here: Federation, good: Valid) -> Mutant:
    """The announcement may come already, its body not."""
    round, exchange = random.choice([(here.moment[0], here.moment[1] + 1), (here.moment[0] + 1, 0)])
    return signed(good, replace(good.header, round=round, exchange=exchange).to_json())


# ---- the body


def body_flipped(random: Random, here: Federation, good: Valid) -> Mutant:
    return as_sent(good, good.sealed, flipped(random, good.body, 8))


def body_cut_or_longer(random: Random, here: Federation, good: Valid) -> Mutant:
    return as_sent(good, good.sealed, cut_or_longer(random, good.body))


def body_of_another_length(random: Random, here: Federation, good: Valid) -> Mutant:
    return with_body(good, cut_or_longer(random, good.body))


def beginning_flipped(random: Random, here: Federation, good: Valid) -> Mutant:
    return with_body(good, flipped(random, good.body, 8, last=8 + int.from_bytes(good.body[:8], "little")))


def beginning_in_another_order(random: Random, here: Federation, good: Valid) -> Mutant:
    """The same safetensors for any reader: entries change places, names their tensors, or a blank goes to the front."""
    stop = 8 + int.from_bytes(good.body[:8], "little")
    entries = list(json.loads(good.body[8:stop]).items())
    first, second = random.sample(range(len(entries)), 2)
    if random.random() < 0.5:
        entries[first], entries[second] = entries[second], entries[first]
    else:
        (one, a), (two, b) = entries[first], entries[second]
        entries[first], entries[second] = (two, a), (one, b)
    header = json.dumps(dict(entries), separators=(",", ":")).encode().ljust(stop - 8)
    return with_body(good, bytearray(good.body[:8] + header + good.body[stop:]))


def number_not_finite(random: Random, here: Federation, good: Valid) -> Mutant:
    body, sign, rest = bytearray(good.body), random.getrandbits(1), random.choice([0, random.getrandbits(52)])
    name, layout, bits, mantissa = random.choice([("x", "<I", 32, 23), ("scale", "<Q", 64, 52), ("half", "<H", 16, 7)])
    value = sign << (bits - 1) | ((1 << (bits - 1 - mantissa)) - 1) << mantissa | rest & ((1 << mantissa) - 1)
    pack_into(layout, body, number_in(random, here, name), value)
    return with_body(good, body)


def number_too_large(random: Random, here: Federation, good: Valid) -> Mutant:
    body, (name, layout, most) = bytearray(good.body), random.choice([("x", "<f", 38), ("scale", "<d", 307)])
    value = random.choice([-1, 1]) * random.uniform(1.01, 3) * 10 ** random.randint(3, most)
    pack_into(layout, body, number_in(random, here, name), value)
    return with_body(good, body)


def number_in(random: Random, here: Federation, name: str) -> int:
    place = Expectation.of(here.frame).places[name]
    return place.start + place.dtype.itemsize * random.randrange(here.frame.body[name].numel())


MUTATIONS: tuple[Mutation, ...] = (
    seal_flipped, seal_cut_or_longer, signature_of_another_frame, last_again, recorded, on_the_link_of_another,
    signed_by_another, another_magic, another_version, another_size, header_too_long, header_flipped,
    header_cut_or_longer, header_in_another_order, header_with_blanks, value_of_another_type, other_field, other_field,
    ahead, body_flipped, body_cut_or_longer, body_of_another_length, beginning_flipped, beginning_in_another_order,
    number_not_finite, number_too_large,
)  # fmt: skip


def mutants(source: Source, count: int) -> Iterator[tuple[str, Mutant]]:
    """Yields mutants: what was done, and what is sent. Two announcements of each peer must have passed before."""
    for _ in range(count):
        mutation = source.random.choice(MUTATIONS)
        yield mutation.__name__, mutation(source.random, source.federation, source.valid())
