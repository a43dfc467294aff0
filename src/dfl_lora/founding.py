"""What a member keeps in a folder, and what of a recipe it shares with those who join.

    FOLDER/identity/       keys and certificate          FOLDER/recipe.yaml   what all members agree on
    FOLDER/roster.json     the signed roster             FOLDER/node.yaml     what only this machine knows
    FOLDER/organiser.key   of who founds: it signs epochs of the roster, so it belongs on a disk in a drawer

A recipe is shared without what belongs to one machine: how it computes and where it writes; of a path only the last
name is left, as ./NAME, since neither the path nor the folders above are of use to others, and a node file says where
the thing is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dfl_lora.data.places import is_local
from dfl_lora.errors import UserError
from dfl_lora.membership.addresses import is_loopback, join_address, split_address
from dfl_lora.recipe import Recipe, is_path
from dfl_lora.strict_yaml import read_yaml, yaml_text

IDENTITY, ROSTER, RECIPE, NODE, ORGANISER = "identity", "roster.json", "recipe.yaml", "node.yaml", "organiser.key"
KEYS: Mapping[str, str] = {
    "peers": "The peers of the recipe that this process hosts, counted from 0.",
    "identity": "The folder of its keys, which nobody else may read.",
    "roster": "Who belongs to the federation, signed by its organiser.",
    "listen": "host:port; null: it listens to nobody, and calls all others itself.",
    "data": "Where this machine's rows are: {path: ...} or {per_peer: ...}, and validation where it is a path.",
    "model": "The folder of the base model here; null: the recipe's name_or_path.",
    "compute": "How this machine computes: dtype, attention, group_tokens, device, threads.",
    "output": "The run directory; null: run, beside this file.",
}
"""What a node file is written with, and what the keys mean."""


def shared(recipe: Recipe, digest: str) -> str:
    """Returns the recipe as others get it, in YAML, with its digest."""
    content = recipe.model_dump(mode="json", exclude={"compute", "output"}) | {"digest": digest}
    content["data"]["path"] = recipe.data.path if reads_path(recipe) else None
    for part, found in places(recipe).items():
        content[part] |= {key: last_name(place) for key, place in found.items()}
    head = "# What all members of the federation agree on. What belongs to one machine is in its node.yaml.\n"
    return head + yaml_text(content)


def places(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Returns the keys of a recipe that say where something is on this machine, with that place."""
    data, model = recipe.data, recipe.model.name_or_path
    validation = data.validation if is_path(data.validation) else None
    path = data.path if data.path and reads_path(recipe) and is_place(data.path) else None
    found = {"per_peer": data.per_peer, "path": path, "validation": validation}
    return {
        "data": {key: absolute(place) for key, place in found.items() if place is not None},
        "model": {"name_or_path": absolute(model)} if is_place(model) else {},
    }


def reads_path(recipe: Recipe) -> bool:
    """Tells whether data.path is read at all: not where rows and validation both are elsewhere."""
    return recipe.data.per_peer is None or not is_path(recipe.data.validation)


def last_name(place: str) -> str:
    """Returns the end of a path, as a path: its last name, or all from the name on that stands for the peer."""
    names = Path(place).parts
    first = next((i for i, name in enumerate(names) if "{" in name), len(names) - 1)
    return "./" + "/".join(names[first:])


def is_place(name: str) -> bool:
    """Tells a place on this machine from a name that means the same everywhere."""
    return is_local(name) or Path(name).expanduser().exists()


def absolute(place: str) -> str:
    return str(Path(place).expanduser().absolute())


def founders_node(recipe: Recipe, peers: Sequence[int], listen: str | None) -> str:
    """Returns the node file of who founds: what the recipe says of this machine, and the peers."""
    here, compute = places(recipe), recipe.compute.model_dump(mode="json", exclude_defaults=True)
    return node_text(peers, listen, here["data"], here["model"].get("name_or_path"), compute)


def node_text(
    peers: Sequence[int],
    listen: str | None,
    data: Mapping[str, str] = MappingProxyType({}),
    model: str | None = None,
    compute: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Returns a node file, whose keys are explained."""
    values = (list(peers), IDENTITY, ROSTER, listen, dict(data), model, dict(compute), None)
    lines = (
        f"# {meaning}\n{key}: {json.dumps(value, ensure_ascii=False)}\n"
        for (key, meaning), value in zip(KEYS.items(), values, strict=True)
    )
    return "\n".join(("# What only this machine knows, and never leaves it. Paths count from this file.\n", *lines))


def check_agreed(text: str, digest: str) -> None:
    """Raises where a recipe that was sent is none, or not the one of the invitation."""
    try:
        content = read_yaml(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("digest") != digest:
        raise UserError(f"The recipe that was sent is not the one of digest {digest[:16]}...; ask who invited for it.")


def check_address(flag: str, address: str) -> None:
    """Raises where what a flag gives is no address; only one listens at port 0, which is any free one."""
    try:
        _, port = split_address(address)
    except ValueError as error:
        raise UserError(f"{flag}: {error}.") from None
    if port == 0 and flag != "--listen":
        raise UserError(f"{flag} {address} has port 0, where nobody can be reached; give the port it listens at.")


def checked_addresses(addresses: Sequence[str], listen: str | None) -> tuple[tuple[str, ...], str | None]:
    """Returns where others reach a member, and where it listens: unless given, at the first port, on all networks."""
    for address in addresses:
        check_address("--address", address)
    if listen:
        check_address("--listen", listen)
    if len(set(addresses)) < len(addresses) or len(addresses) > 8:
        raise UserError(f"--address is given {len(addresses)} times; give each once, and 8 at most.")
    if listen and not addresses:
        raise UserError(f"--listen {listen} without --address has no effect, since nobody is told; give both.")
    if addresses and not listen:
        host, port = split_address(addresses[0])
        everywhere = "::" if ":" in host else "0.0.0.0"
        listen = addresses[0] if is_loopback(addresses[0]) else join_address(everywhere, port)
    return tuple(addresses), listen


def check_new(folder: Path) -> None:
    """Raises where a folder is there already and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"There is something at {folder} already; give a new or an empty folder with --to.")
