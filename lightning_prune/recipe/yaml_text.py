"""YAML as recipes use it: read with bounds and without surprises, written so that it reads back the same.

Numbers such as 1e-3 are numbers, dates are text, a key stands once in its mapping, and anchors and merge keys work.
What a file could do to a reader is bounded: its size, how deep it nests, and how much its aliases multiply.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.base.names import brief, shorten

__all__ = ["read_yaml", "read_yaml_file", "write_yaml"]

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 40
_MAX_NODES = 50_000  # counted as they unfold: an alias counts as what it stands for
_TAG = "tag:yaml.org,2002:"
_KINDS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_RESOLVERS = {
    f"{_TAG}int": (re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), "-+0123456789"),
    f"{_TAG}float": (
        re.compile(
            r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
        ),
        "-+0123456789.",
    ),
}


class _Loader(yaml.SafeLoader):
    """Refuses what no recipe needs, at the place where it stands."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, and check it: depth, kind, repeated keys, and how large it is with its aliases unfolded."""
        event = self.peek_event()
        if self._depth == _MAX_DEPTH:
            raise _error(f"nested more than {_MAX_DEPTH} levels deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._check(node)
        elif id(node) not in self._sizes:
            raise _error(f"the alias {brief(event.anchor)} stands inside what it stands for", event)
        return node

    def _check(self, node: Any) -> None:
        if node.tag not in _KINDS:
            raise _error(f"the tag {brief(node.tag)} has no place in a recipe", node)
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            children = [item for pair in node.value for item in pair]
            _check_keys(node)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        else:
            self._check_scalar(node)
        size = 1 + sum(self._sizes[id(child)] for child in children)
        if size > _MAX_NODES:
            raise _error(f"more than {_MAX_NODES} values once its aliases are unfolded", node)
        self._sizes[id(node)] = size

    def _check_scalar(self, node: Any) -> None:
        if not _is_writable(node.value):
            raise _error("text with a character that cannot be written to a file", node)
        looks_like = self.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.tag not in (looks_like, f"{_TAG}str") and (node.tag, looks_like) != (f"{_TAG}float", f"{_TAG}int"):
            raise _error(f"{brief(node.value)} is no {node.tag.removeprefix(_TAG)}", node)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out."""
        return True


def _use_resolvers(cls: Any) -> None:
    """Replace the numbers of YAML 1.1, and leave out its dates and its key `=`."""
    left_out = {*_RESOLVERS, f"{_TAG}timestamp", f"{_TAG}value"}
    own = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in left_out]
        for first, resolvers in cls.yaml_implicit_resolvers.items()
    }
    cls.yaml_implicit_resolvers = own
    for tag, (pattern, first) in _RESOLVERS.items():
        cls.add_implicit_resolver(tag, pattern, list(first))


_use_resolvers(_Loader)
_use_resolvers(_Dumper)


def read_yaml(text: str) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: if the text is not YAML, or holds what no recipe needs; one line with the place.
    """
    loader = _Loader.__new__(_Loader)
    try:
        loader.__init__(text)  # type: ignore[misc]  # reads the first characters, which may be wrong already
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ValueError(_sentence(error)) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(shorten(str(error), 200)) from error
    return content


def read_yaml_file(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: if it cannot be read or is not YAML; one line with the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: {os.strerror(error.errno) if error.errno else error}") from error
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path}: over {_MAX_BYTES:,} bytes, which is no recipe")
    try:
        return read_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a YAML file: byte {error.start} is not UTF-8 text") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error


def write_yaml(content: Any) -> str:
    """Return plain values as YAML that reads back equal."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error("a key must be a word", key)
        if (key.tag, key.value) in seen and key.tag != f"{_TAG}merge":
            raise _error(f"the key {brief(key.value)} stands twice in one mapping; keep one", key)
        seen.add((key.tag, key.value))


def _is_writable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= sign <= "\udfff" for sign in text)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _sentence(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return shorten(f"{error.problem or error.context}{place}", 200)
