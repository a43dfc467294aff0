"""Reading recipes: YAML, --set settings, and one sentence where anything is wrong."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from dfl_lora.errors import UserError, nearest
from dfl_lora.recipe import NAME, Recipe, named

ALTERNATIVES = (
    {"train.local.steps", "train.local.epochs"},
    {"data.path", "data.per_peer"},
)
"""Keys of which one drops the other when it is set."""
BRANCH = re.compile(r"(?:literal|list)\[.*\]|str|(?:constrained-)?int")


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `a.b=value` settings; raises one sentence where anything is wrong."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no recipe at {path}; give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not a mapping of recipe keys such as model and data.")
    return resolve(cast(dict[str, Any], content), settings, str(path))


def resolve(content: dict[str, Any], settings: Sequence[str] = (), source: str = "the recipe") -> Recipe:
    """Returns the checked recipe of a mapping with settings applied."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write key=value, such as --set train.rounds=5.")
        try:
            set_key(content, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"--set {setting}: '{text}' is not a YAML value.") from None
        except ValueError as error:
            raise UserError(f"--set {setting}: {error}.") from None
    try:
        return Recipe.model_validate(content)
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
    inner[last] = value


def drop(content: dict[str, Any], path: Sequence[str]) -> None:
    inner: object = content
    for parent in path[:-1]:
        inner = inner.get(parent) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        inner.pop(path[-1], None)


def sentence(error: ValidationError) -> str:
    """Returns the first mistake as one sentence, with the nearest key or the allowed values."""
    first, *others = error.errors()
    place = place_of(first["loc"])
    branches = [e["msg"] for e in others if place_of(e["loc"]) == place]
    follow = len(others) - len(branches)
    more = f" ({follow} more mistakes follow.)" if follow else ""
    if first["type"] == "extra_forbidden":
        fields = fields_at(first["loc"][:-1])
        hint = nearest(str(first["loc"][-1]), fields)
        return f"unknown key '{place}'; allowed here are {', '.join(fields)}.{hint}{more}"
    if first["type"] == "missing":
        return f"the key '{place}' is required and missing; add it.{more}"
    if first["type"] == "literal_error":
        given = str(first["input"])
        allowed = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
        other = f" or a number ({'; '.join(branches)})" if branches else ""
        return f"{place} is '{given}'; allowed are {', '.join(allowed)}{other}.{nearest(given, allowed)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {first['input']!r})"
    end = "" if not given and message.endswith((".", "?")) else "."
    return f"{place}: {message}{given}{end}{more}"


def place_of(loc: Sequence[str | int]) -> str:
    """Returns the dotted key of a mistake, without pydantic's names for the branches of a union."""
    return ".".join(str(part) for part in loc if not BRANCH.fullmatch(str(part)))


def fields_at(loc: Sequence[str | int]) -> list[str]:
    """Returns the keys allowed at a place of the recipe."""
    part: type[BaseModel] = Recipe
    for key in loc:
        field = part.model_fields.get(str(key))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            part = field.annotation
    return list(part.model_fields)
