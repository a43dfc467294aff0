"""The node file: what one process of a federation knows for itself, and never leaves its machine.

Which peers of the recipe it hosts, where its keys, its rows and its base model are, where it listens, how long it
waits. Strict as the recipe; paths count from the folder of the file. What it says of data, model and compute takes the
place of what the recipe says, and none of it is part of the recipe's digest.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from dfl_lora.choices import PositiveFloat
from dfl_lora.data.places import is_local
from dfl_lora.errors import UserError
from dfl_lora.membership.addresses import is_loopback, split_address
from dfl_lora.membership.identity import SHOWN, Identity, load_identity
from dfl_lora.membership.roster import Roster, read_roster
from dfl_lora.reading import read_mapping, sentence
from dfl_lora.recipe import Compute, Part, PathText, Recipe, is_path

RUN = "run"
"""The run directory beside a node file that names none."""
MARK = re.compile(r"\{i?\}")
PeerIndex = Annotated[int, Field(ge=0, lt=100_000, strict=True)]


def checked_address(address: str) -> str:
    """Returns an address; raises where it is none."""
    split_address(address)
    return address


class Rows(Part):
    """Where this machine's rows are, over the recipe's."""

    path: PathText | None = None
    """A folder, a file or a hub name; null: the recipe's."""
    per_peer: PathText | None = None
    """The own rows; {i} or {} stands for the peer, from 1, and may be left out where one peer is hosted."""
    validation: PathText | None = None
    """A path, where the recipe says a path."""


class Node(Part):
    """One process of a federation."""

    peers: Annotated[list[PeerIndex], Field(min_length=1)]
    """Which peers of the recipe it hosts, counted from 0."""
    identity: PathText = "identity"
    """The folder with key.pem, tls.pem and certificate.pem."""
    roster: PathText = "roster.json"
    """Who belongs to the federation, as its organiser has signed it."""
    listen: Annotated[str, AfterValidator(checked_address)] | None = None
    """host:port, or [host]:port for IPv6; null: it listens to nobody and dials everybody."""
    data: Rows = Rows()
    model: PathText | None = None
    """The folder of the base model here; null: the recipe's name_or_path."""
    compute: Compute = Compute()
    """How this machine computes: what is given here takes the place of what the recipe says."""
    output: PathText | None = None
    """The run directory; null: run, beside this file."""
    deadline_s: PositiveFloat = 600.0
    """The longest wait, in one exchange, for a neighbour that is there but slow."""
    grace_s: PositiveFloat = 3.0
    """How long a neighbour that is lost is waited for."""
    assemble_s: PositiveFloat = 600.0
    """How long the first round waits for all neighbours."""
    norm_bound: PositiveFloat = 1000.0
    """A message longer than so many times the own one (at least 1) is refused."""
    insecure: bool = False
    """No TLS; only where every address is a loopback address of this machine."""
    _folder: Path = PrivateAttr(default=Path())

    @field_validator("peers")
    @classmethod
    def each_once(cls, peers: list[int]) -> list[int]:
        if len(set(peers)) < len(peers):
            raise ValueError(f"{peers} names a peer twice; give each once")
        return sorted(peers)

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.insecure and self.listen is not None and not is_loopback(self.listen):
            raise ValueError(
                f"insecure without TLS is for this machine alone, but listen is {self.listen}; "
                "listen at 127.0.0.1, or remove insecure"
            )
        return self

    @property
    def identity_folder(self) -> Path:
        return self.place(self.identity)

    @property
    def roster_path(self) -> Path:
        return self.place(self.roster)

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.place(self.output or RUN)

    def place(self, path: str) -> Path:
        """Returns an absolute path; a relative one counts from the folder of the node file."""
        return Path(os.path.normpath(self._folder / Path(path).expanduser()))

    def beside(self, path: str) -> str:
        """Returns an absolute path, or the text as it stands where it is a name (of the hub, builtin/sentences)."""
        local = is_local(path) or "{" in path or self.place(path).exists()
        return str(self.place(path)) if local else path

    def over(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with this machine's data, model and compute in the place of its own."""
        num_peers = recipe.peers.num_peers
        if self.peers[-1] >= num_peers:
            raise UserError(
                f"The node hosts peer {self.peers[-1]}, but the recipe has {num_peers} peers, counted from 0; "
                "correct peers in the node file, or take the recipe of this federation."
            )
        self.check_rows(recipe)
        rows = {key: self.beside(value) for key, value in self.data if value is not None}
        model = {} if self.model is None else {"name_or_path": self.beside(self.model)}
        compute = self.compute.model_dump(exclude_unset=True)
        return recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update=rows),
                "model": recipe.model.model_copy(update=model),
                "compute": recipe.compute.model_copy(update=compute),
            }
        )

    def check_rows(self, recipe: Recipe) -> None:
        """Raises where this machine's own rows cannot take the place of the recipe's."""
        own, shared = self.data, recipe.data
        validation, per_peer = own.validation or shared.validation, own.per_peer or shared.per_peer
        if is_path(validation) != is_path(shared.validation):
            raise UserError(
                f"data.validation of the node is '{validation}', and of the recipe '{shared.validation}': only a path "
                "in the place of a path is a machine's own matter; correct one of them."
            )
        if own.path is not None and per_peer is not None and is_path(validation):
            raise UserError(
                f"data.path of the node has no effect: rows come from per_peer '{per_peer}' and from '{validation}'; "
                "remove it."
            )
        if own.per_peer is not None and len(self.peers) > 1 and not MARK.search(own.per_peer):
            raise UserError(
                f"data.per_peer of the node is '{own.per_peer}' for peers {self.peers}; "
                "put {i} or {} where the peer's number stands."
            )


def membership(node: Node, num_peers: int) -> tuple[Identity, Roster]:
    """Returns the identity and the roster of a node; raises where they do not go together, or others can read a key."""
    identity, roster = load_identity(node.identity_folder), read_roster(node.roster_path)
    member = roster.member(identity.id)
    if member is None:
        raise UserError(
            f"The identity in {node.identity_folder} is {identity.id[:SHOWN]}, which is no member of the roster in "
            f"{node.roster_path}; join the federation first, or give the roster that names it."
        )
    if list(member.peers) != node.peers:
        raise UserError(
            f"The node file hosts peers {node.peers}, but by the roster this member hosts {list(member.peers)}; "
            "write these into the node file, or join anew."
        )
    if roster.num_peers != num_peers:
        raise UserError(
            f"The roster is of {roster.num_peers} peers and the recipe of {num_peers}; take the recipe of this "
            "federation, or found another one."
        )
    if node.listen is None and member.addresses:
        raise UserError(
            f"By the roster others reach this member at {', '.join(member.addresses)}, but listen is null; "
            "say where to listen in the node file, such as 0.0.0.0:7000."
        )
    outside = [a for m in roster.members for a in m.addresses if not is_loopback(a)] if node.insecure else []
    if outside:
        raise UserError(
            f"insecure without TLS is for this machine alone, but the roster names {outside[0]}; remove insecure."
        )
    return identity, roster


def load_node(path: Path) -> Node:
    """Reads a node file; raises one sentence where anything is wrong."""
    try:
        node = Node.model_validate(read_mapping(path, "node file", "peers and roster"))
    except ValidationError as error:
        raise UserError(f"{path}: {sentence(error, Node)}") from None
    node._folder = path.absolute().parent
    return node
