"""Names with options, read from the signatures of a table."""

from typing import Any, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from dfl_lora.choices import Choice, Positive, Share, choice, named


def plain(n: int) -> str:
    """Plain."""
    return f"plain {n}"


def drawn(n: int, *, p: Share = 0.5, seed: int = 0) -> str:
    """Drawn with probability p."""
    return f"drawn {n} {p} {seed}"


def needy(n: int, *, size: Positive, how: Literal["fast", "slow"] = "fast") -> str:
    """Needs a size."""
    return f"needy {n} {size} {how}"


def spoken(n: int, *, text: str, pairs: list[list[int]] | None = None) -> str:
    """Takes text and lists."""
    return f"spoken {n} {text}" + (f" {pairs}" if pairs else "")


TABLE = {"plain": plain, "drawn": drawn, "needy": needy, "spoken": spoken}


class Extended(Choice):
    """Adds a field to every row."""

    least: Positive = 1


KIND: TypeAdapter[Any] = TypeAdapter(choice(TABLE, "drawn"))
EXTENDED: TypeAdapter[Any] = TypeAdapter(choice(TABLE, "plain", Extended))


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("plain", "plain 7"),
        ("plain()", "plain 7"),
        ({"kind": "plain"}, "plain 7"),
        ("drawn", "drawn 7 0.5 0"),
        ("drawn(p=0.25, seed=3)", "drawn 7 0.25 3"),
        (" drawn ( p = 1 ) ", "drawn 7 1.0 0"),
        ({"kind": "drawn", "p": 0.25}, "drawn 7 0.25 0"),
        ({"p": 0.25}, "drawn 7 0.25 0"),
        ({}, "drawn 7 0.5 0"),
        ("needy(size=2, how=slow)", "needy 7 2 slow"),
        ("spoken(text=a=b)", "spoken 7 a=b"),
        ("spoken(text=what's up)", "spoken 7 what's up"),
        ("spoken(text=o'b, pairs=[])", "spoken 7 o'b"),
        ('spoken(text="a\\"b")', 'spoken 7 a"b'),
        ("spoken(text='p=1, q = 2')", "spoken 7 p=1, q = 2"),
        ('spoken(text="it\'s")', "spoken 7 it's"),
        ("spoken(text=${HOME:-x}/y)", "spoken 7 ${HOME:-x}/y"),
        ("spoken(text=x, pairs=[[0, 1], [1, 2]])", "spoken 7 x [[0, 1], [1, 2]]"),
    ],
)
def test_a_name_with_options_makes_what_the_function_makes(given: object, made: str) -> None:
    assert KIND.validate_python(given).of(7) == made


@pytest.mark.parametrize(
    "given",
    ["other", "", "a b", "drawn(", "drawn(p)", "drawn(p=0)", "drawn(p=2)", "drawn(q=1)",
     "drawn(p=0.1, p=0.2)", "drawn(p=0.1,)", "drawn(p=[)", "drawn(p={)",
     "plain(p=0.3)", "needy", 3,
     None, [], {"kind": "other"}, {"kind": ["plain"]}, {"kind": "drawn", "p": "x"}, "needy(size=0)",
     "needy(size=1, how=soon)"],
    ids=str,
)  # fmt: skip
def test_what_the_table_does_not_know_is_refused(given: object) -> None:
    with pytest.raises(ValidationError):
        KIND.validate_python(given)


def test_an_option_of_another_row_is_passed_over_at_its_default_and_only_there() -> None:
    assert KIND.validate_python({"kind": "plain", "p": 0.5, "seed": 0, "how": "fast"}).of(1) == "plain 1"
    with pytest.raises(ValidationError):
        KIND.validate_python({"kind": "plain", "p": 0.4})


@pytest.mark.parametrize("given", ["plain", "drawn(p=0.25)", "needy(size=3)"])
def test_what_is_written_down_reads_back_equal(given: str) -> None:
    value = KIND.validate_python(given)
    written = KIND.dump_python(value, mode="json")
    assert KIND.validate_python(written) == value
    assert KIND.validate_python(str(value)) == value


def test_a_row_without_options_is_written_as_its_name() -> None:
    assert KIND.dump_python(KIND.validate_python("plain")) == "plain"
    assert EXTENDED.dump_python(EXTENDED.validate_python("plain")) == {"kind": "plain", "least": 1}
    assert [str(KIND.validate_python(text)) for text in ("plain", "drawn(p=0.2)")] == ["plain", "drawn(p=0.2, seed=0)"]


def test_fields_of_the_base_are_no_options() -> None:
    value = EXTENDED.validate_python("drawn(p=0.2, least=4)")
    assert (value.options, value.least, value.of(1)) == ({"p": 0.2, "seed": 0}, 4, "drawn 1 0.2 0")


def test_the_schema_tells_rows_options_ranges_and_what_they_mean() -> None:
    rows = KIND.json_schema()["$defs"]
    assert rows["drawn"]["description"] == "Drawn with probability p."
    assert rows["drawn"]["properties"]["p"]["maximum"] == 1
    assert rows["needy"]["required"] == ["size"]
    assert {"type": "string"} in KIND.json_schema()["anyOf"]


def test_anything_but_text_is_left_to_the_model() -> None:
    assert named(3) == 3
    assert named({"kind": "x"}) == {"kind": "x"}
