"""Reading recipes: YAML, --set settings, and one sentence where anything is wrong."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any, cast, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from dfl_lora.choices import NAME, named, options_of
from dfl_lora.codecs import CODECS
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.data.partition import PARTITIONS
from dfl_lora.errors import UserError, nearest
from dfl_lora.mixers import MIXERS
from dfl_lora.recipe import WINNER, Recipe
from dfl_lora.schedules import SCHEDULES
from dfl_lora.strict_yaml import read_yaml
from dfl_lora.topologies import TOPOLOGIES

ALTERNATIVES = (
    {"train.local.steps", "train.local.epochs"},
    {"data.path", "data.per_peer"},
)
"""Keys of which one drops the other when it is set."""
TABLES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "data.partition": PARTITIONS,
    "peers.topology": TOPOLOGIES,
    "method.schedule": SCHEDULES,
    "method.correction": CORRECTIONS,
    "method.mixer": MIXERS,
    "method.codec": CODECS,
}
"""Keys whose value is a row of a table with options; setting another row drops the options of the old one."""
BRANCH = re.compile(r"(?:literal|list)\[.*\]|str|(?:constrained-)?int|<.*>", re.DOTALL)


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `a.b=value` settings; raises one sentence where anything is wrong."""
    return resolve(read_mapping(path, "recipe", "model and data"), settings, str(path))


def read_mapping(path: Path, what: str, keys: str) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping with such keys; `what` it is stands in the sentence where it is not."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"There is no {what} at {path}; give the path of a YAML file.") from None
    except OSError as error:
        raise UserError(f"{path} is not readable YAML: {error.strerror}; give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not readable YAML: it is no text in UTF-8; save it as such.") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable YAML: {error}.") from None
    if not isinstance(content, dict):
        held = {"NoneType": "nothing", "str": "a text", "list": "a list"}.get(type(content).__name__, "a value")
        raise UserError(f"{path} holds {held}, not a mapping of {what} keys such as {keys}.")
    return cast(dict[str, Any], content)


def with_method(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a mapping of recipe keys with the default method where it says none."""
    return content | {"method": dict(WINNER)} if content.get("method") in (None, {}) else content


def resolve(content: dict[str, Any], settings: Sequence[str] = (), source: str = "the recipe") -> Recipe:
    """Returns the checked recipe of a mapping with settings applied."""
    content = with_method(content)  # a setting changes one axis of it, and leaves the others
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write key=value, such as --set train.rounds=5.")
        try:
            value = read_yaml(text)
        except ValueError as error:
            raise UserError(f"--set {setting}: '{text}' is not a YAML value ({error}).") from None
        try:
            set_key(content, key.strip(), value)
        except ValueError as error:
            raise UserError(f"--set {setting}: {error}.") from None
    try:
        return Recipe.model_validate(with_method(content))
    except ValidationError as error:
        raise UserError(f"{source}: {sentence(error)}") from None


def set_key(content: dict[str, Any], key: str, value: object) -> None:
    """Sets a dotted key in place; a setting drops its alternative and the recorded digest."""
    content.pop("digest", None)
    for group in ALTERNATIVES:
        if key in group:
            for other in group - {key}:
                drop(content, other.split("."))
    *parents, last = key.split(".")
    inner = content
    for parent in parents:
        child = inner.get(parent)
        child = named(child) if isinstance(child, str) and NAME.fullmatch(child) else child
        inner[parent] = child if isinstance(child, dict) else {}
        inner = inner[parent]
    table = TABLES.get(".".join(parents), {})
    if last == "kind" and inner.get("kind") in tuple(table):
        for option in options_of(table[inner["kind"]]):
            inner.pop(option, None)
    inner[last] = value


def drop(content: dict[str, Any], path: Sequence[str]) -> None:
    inner: object = content
    for parent in path[:-1]:
        inner = inner.get(parent) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        inner.pop(path[-1], None)


def sentence(error: ValidationError, whole: Any = Recipe, at: str = "") -> str:
    """Returns the first mistake in a value of type `whole` as one sentence, with the nearest key or what is allowed."""
    first, *others = error.errors()
    place = ".".join(filter(None, [at, place_of(first["loc"])]))
    branches = [e["msg"] for e in others if place_of(e["loc"]) == place_of(first["loc"])]
    follow = len(others) - len(branches)
    more = f" ({follow} more {'mistake follows' if follow == 1 else 'mistakes follow'}.)" if follow else ""
    if first["type"] == "extra_forbidden":
        key, fields = str(first["loc"][-1]), fields_at(whole, first["loc"][:-1])
        owners = owners_of(key, whole, first["loc"][:-1])
        hint = f" It is an option of {', '.join(owners)}." if owners else nearest(key, fields)
        return f"unknown key '{place}'; allowed here are {', '.join(fields)}.{hint}{more}"
    if first["type"] == "missing":
        return f"the key '{place}' is required and missing; add it.{more}"
    if first["type"] == "union_tag_invalid":
        given, allowed = str(first["ctx"]["tag"])[1:-1], re.findall(r"<([^<>]*)>", str(first["ctx"]["expected_tags"]))
        return f"{place} is '{given}'; allowed are {', '.join(allowed)}.{nearest(given, allowed)}{more}"
    if first["type"] == "literal_error":
        given = str(first["input"])
        allowed = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
        other = f" or a number ({'; '.join(branches)})" if branches else ""
        return f"{place} is '{given}'; allowed are {', '.join(allowed)}{other}.{nearest(given, allowed)}{more}"
    if first["type"] in ("model_type", "dict_type"):
        fields = fields_at(whole, first["loc"])
        own = f"it holds keys of its own: {', '.join(fields)}; write them below it"
        return f"{place} is {shown(first['input'])}, but {own}.{more}"
    if first["type"] == "string_pattern_mismatch":
        return f"{place} is {shown(first['input'])}; allowed are letters, digits, '_', '-' and '.'.{more}"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{place}{': ' if place else ''}{message}{'' if message.endswith(('.', '?')) else '.'}{more}"
    messages = (re.sub(r" after validation.*", "", message) for message in (first["msg"], *branches))
    wanted = " or ".join(dict.fromkeys(re.sub(r"^\w+ should ", "", message) for message in messages))
    return f"{place}: it should {wanted.replace(' or be ', ' or ')} (given: {shown(first['input'])}).{more}"


def shown(value: object) -> str:
    """Returns a value as Python writes it, cut where it is long."""
    short = Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def place_of(loc: Sequence[str | int]) -> str:
    """Returns the dotted key of a mistake, without pydantic's names for the branches of a union."""
    return ".".join(str(part) for part in loc if not BRANCH.fullmatch(str(part)))


def fields_at(whole: Any, loc: Sequence[str | int]) -> list[str]:
    """Returns the keys allowed at a place of a model, or of a choice from a table."""
    part = whole
    for key in loc:
        inner = part_at(part, str(key))
        part = part if inner is None else inner
    return list(part.model_fields)


def owners_of(key: str, whole: Any, loc: Sequence[str | int]) -> list[str]:
    """Returns the rows of a choice that have an option, where the place is such a row."""
    part = whole
    for step in loc[:-1]:
        inner = part_at(part, str(step))
        part = part if inner is None else inner
    return [row.__name__ for row in rows_of(part) if key in row.model_fields]


def rows_of(part: Any) -> list[type[BaseModel]]:
    """Returns the models of a choice from a table; none where the type is no such choice."""
    return [get_args(row)[0] for row in get_args(part) if get_args(row)]


def part_at(part: Any, key: str) -> Any:
    """Returns the type of a field, or the row of a choice that a tag such as <dirichlet> means."""
    if isinstance(part, type) and issubclass(part, BaseModel):
        field = part.model_fields.get(key)
        return None if field is None else field.annotation
    return next((row for row in rows_of(part) if f"<{row.__name__}>" == key), None)


def parse(kind: Any, value: object, key: str) -> Any:
    """Returns a choice made from what a user typed outside a recipe, such as the NAME of `topology NAME`."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(sentence(error, get_args(kind)[0], key)) from None
