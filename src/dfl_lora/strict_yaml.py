"""YAML as a recipe means it: a key given twice is a mistake, 1e-3 is a number, and mistakes are told in few words.

PyYAML reads YAML 1.1, where the last of two equal keys wins in silence and 1e-3, having no point, is a text.
"""

import re
from typing import Any

import yaml


class Reader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice and reads numbers as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class Writer(yaml.SafeDumper):
    """A safe dumper that quotes a text which the reader would take for a number."""


for kind in (Reader, Writer):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),  # a digest may begin with 58e1
        list("-+0123456789"),
    )


def yaml_text(content: object) -> str:
    """Returns YAML that `read_yaml` reads as it was, keys in their order."""
    return yaml.dump(content, Dumper=Writer, sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> object:
    """Returns what a YAML text holds; raises ValueError with what is wrong and where."""
    try:
        return yaml.load(text, Reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        tabs = "; indent with blanks, not with tabs" if "'\\t'" in str(error.problem) else ""
        raise ValueError(f"{error.problem or error.context}{where}{tabs}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).partition(' in "')[0].split())) from None
    except ValueError as error:  # of a number with 5,000 digits, or a 13th month
        raise ValueError(str(error).partition(";")[0]) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
