"""A choice from a table: a name, or a name with options, as `erdos_renyi(p=0.3)` or {kind: erdos_renyi, p: 0.3}.

A table maps names to functions. Their keyword-only parameters are the options: type, range and default are
read from the signature, the meaning from the docstring, so a new row of a table is all that a new choice needs.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    create_model,
    model_serializer,
)

from dfl_lora.strict_yaml import read_yaml

Whole = Annotated[int, Field(strict=True)]
"""Strict: yes, on and true are no numbers, nor is a text of digits."""
Positive = Annotated[int, Field(ge=1, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
"""Of a whole, or a probability that is not zero."""

NAME = re.compile(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
LIST = r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"
QUOTED = r"""(?<=[=,\[\s])"(?:[^"\\]|\\.)*"|(?<=[=,\[\s])'(?:[^']|'')*'|(?<![=,\[\s])['"]"""
PIECE = re.compile(rf"""(?:{QUOTED}|{LIST}|[^,"'\[\]])+""")
"""An option and its value: up to a comma that stands in no list and in no quotes, which open where a value begins."""
PIECES = re.compile(rf"{PIECE.pattern}(?:,{PIECE.pattern})*")


class Choice(BaseModel):
    """A name and its options; one without options is written as the name alone."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    make: ClassVar[Callable[..., Any]]
    """The function of the table."""
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        names = options_of(type(self).make)
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items() if value is not None)
        return f"{self.kind}({options})" if options else self.kind

    def of(self, *given: object) -> Any:
        """Returns what the function makes of the positional arguments and the options."""
        return type(self).make(*given, **self.options)

    @model_serializer(mode="wrap")
    def compact(self, handler: SerializerFunctionWrapHandler) -> Any:
        fields = handler(self)
        return self.kind if set(fields) == {"kind"} else fields


def options_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the keyword-only parameters of a function."""
    parameters = inspect.signature(make).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def choice(table: Mapping[str, Callable[..., Any]], default: str, base: type[Choice] = Choice) -> Any:
    """Returns the type of a recipe's key whose values are the rows of a table; `base` adds fields to all of them.

    `default` is the row that is meant where options are given without a name.
    """
    models = [model_of(name, make, base) for name, make in table.items()]
    tagged: list[Any] = [Annotated[model, Tag(f"<{name}>")] for name, model in zip(table, models, strict=True)]
    union = reduce(or_, tagged[1:], tagged[0]) if len(tagged) > 1 else tagged[0] | tagged[0]

    def read(value: object) -> object:
        mapping = named(value)
        if isinstance(mapping, dict):
            mapping = {"kind": default, **mapping}
        return without_defaults(mapping, table)

    return Annotated[union, Discriminator(tag_of), BeforeValidator(read, json_schema_input_type=str | union)]


def model_of(name: str, make: Callable[..., Any], base: type[Choice]) -> type[Choice]:
    fields: dict[str, Any] = {"kind": (Literal[name], name)}
    for option, parameter in options_of(make).items():
        required = parameter.default is inspect.Parameter.empty
        fields[option] = (parameter.annotation, ... if required else parameter.default)
    model = create_model(name, __base__=base, __doc__=inspect.getdoc(make), **fields)
    model.make = staticmethod(make)
    return model


def tag_of(value: object) -> str:
    return f"<{value.get('kind') if isinstance(value, dict) else getattr(value, 'kind', value)}>"


def without_defaults(value: object, table: Mapping[str, Callable[..., Any]]) -> object:
    """Drops options of other rows that are at their default: they say nothing. The rest is judged by the model."""
    if not isinstance(value, dict) or value.get("kind") not in tuple(table):  # a kind may be anything
        return value
    own = options_of(table[value["kind"]])
    others = [(name, p.default) for make in table.values() for name, p in options_of(make).items() if name not in own]
    return {name: given for name, given in value.items() if (name, given) not in others}


def named(value: object) -> object:
    """Reads a name with options, `dirichlet(alpha=0.1)`, as the mapping {kind: dirichlet, alpha: 0.1}."""
    if not isinstance(value, str):
        return value
    match = NAME.fullmatch(value)
    if match is None:
        raise ValueError(f"'{value}' is not a name or a name with options such as dirichlet(alpha=0.1)")
    text, how = (match.group(2) or "").strip(), f"write {match.group(1)}(option=value)"
    options = dict[str, object]()
    if text and not PIECES.fullmatch(text):
        raise ValueError(f"'{text}' in '{value}' are no options; {how}")
    for piece in PIECE.findall(text):
        key, equals, given = (part.strip() for part in piece.partition("="))
        if not equals or not re.fullmatch(r"[\w-]+", key):
            raise ValueError(f"'{piece.strip()}' in '{value}' is not an option; {how}")
        if key in options:
            raise ValueError(f"'{key}' in '{value}' is given twice; {how} once")
        try:
            options[key] = read_yaml(given)
        except ValueError:
            raise ValueError(f"'{given}' in '{value}' is no value; {how}") from None
    return {"kind": match.group(1), **options}
