"""Turn the plain values of a recipe into objects of a type, and back.

A wrong value is refused by the key it stands under: what came, and what is allowed there. Numbers are finite, true and
false are no numbers, text is not empty, and null stands only where nothing is a choice.
"""

import importlib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_prune.base import registry
from lightning_prune.base.names import brief, shorten, unknown

__all__ = ["plain", "read", "without_none"]

_SEQUENCES = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)
_LONGEST = 230  # characters of what a class says about its options


def read(kind: Any, value: Any, key: str) -> Any:
    """Return a plain value as an object of a type.

    Args:
        kind: the type: a number, text, a Literal, a list, a mapping, a dataclass, the contract of a room, or a union.
        value: lists, mappings, numbers and strings.
        key: where it stands in the recipe, for messages.

    Raises:
        ValueError: if the value is not of the type; one line.
    """
    if kind is Any:
        return value
    options = _options(kind)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"{key} must not be null; leave it out, or give {_describe(kind)}")
    given = [option for option in options if option is not type(None)]
    rooms = [room for option in given if (room := registry.room_of(option)) is not None]
    if len(rooms) == len(given):
        return _read_class(rooms, value, key)
    return _read_fitting(given, value, key)


def without_none(kind: Any) -> Any:
    """Return the type that an optional value has when it is given; other types unchanged."""
    options = [option for option in _options(kind) if option is not type(None)]
    return options[0] if len(options) == 1 else kind


def plain(value: Any) -> Any:
    """Turn options into lists, dicts, numbers and strings; a class of a room becomes class_path and init_args."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    cls = type(value)
    room = next((room for base in cls.__mro__ if (room := registry.room_of(base)) is not None), None)
    if room is not None:
        options = {name: plain(getattr(value, name)) for name in inspect.signature(cls).parameters}
        name = cls.__name__ if registry.is_packaged(room, cls) else f"{cls.__module__}.{cls.__qualname__}"
        return {"class_path": name} | ({"init_args": options} if options else {})
    return {item.name: plain(getattr(value, item.name)) for item in fields(value)} if is_dataclass(value) else value


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _read_fitting(kinds: Sequence[Any], value: Any, key: str) -> Any:
    """Read a value as the one of several types that has its form."""
    fitting = [kind for kind in kinds if _has_form(kind, value)]
    if not fitting:
        raise ValueError(f"{key} must be {' or '.join(_describe(kind) for kind in kinds)}, got {brief(value)}")
    return _read_one(fitting[0], value, key)


def _has_form(kind: Any, value: Any) -> bool:
    """Return whether a type is written as a value like this one, whatever is inside."""
    origin = get_origin(kind) or kind
    if origin in _FORMS:
        return _FORMS[origin](value)
    if origin in _SEQUENCES:
        return isinstance(value, (list, tuple))
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(kind))
    if origin in _MAPPINGS or is_dataclass(kind):
        return isinstance(value, Mapping) or (isinstance(kind, type) and isinstance(value, kind))
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


_FORMS: Mapping[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: _is_number(value) and isinstance(value, int),
    float: _is_number,
    str: lambda value: isinstance(value, str) and bool(value.strip()),
}


def _read_one(kind: Any, value: Any, key: str) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is float:
        return float(value)
    if origin in (bool, int, str, Literal):
        return value
    if origin is tuple:
        return _read_tuple(inner, value, key)
    if origin in _SEQUENCES:
        return [read(inner[0] if inner else Any, item, f"{key}[{idx}]") for idx, item in enumerate(value)]
    if origin in _MAPPINGS:
        key_kind, value_kind = inner or (Any, Any)
        return {
            _read_key(key_kind, name, key): read(value_kind, item, _join(key, name)) for name, item in value.items()
        }
    if is_dataclass(kind):
        return value if isinstance(kind, type) and isinstance(value, kind) else _build(kind, value, key)
    return _read_foreign(kind, value, key)


def _read_tuple(kinds: Sequence[Any], value: Sequence[Any], key: str) -> tuple[Any, ...]:
    if not kinds or kinds[-1] is Ellipsis:
        kinds = [kinds[0] if kinds else Any] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{key} must have {len(kinds)} entries, got {len(value)}")
    return tuple(read(kind, item, f"{key}[{idx}]") for idx, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _read_key(kind: Any, name: Any, key: str) -> Any:
    if get_origin(kind) is Literal and isinstance(name, str) and name not in get_args(kind):
        raise ValueError(unknown("key", _join(key, name), [_join(key, known) for known in get_args(kind)]))
    return read(kind, name, f"the key {_join(key, name)}")


def _read_class(rooms: Sequence[str], value: Any, key: str) -> Any:
    """Return an object of a class of one of several rooms."""
    if isinstance(value, tuple(registry.contract(room) for room in rooms)):
        return value
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping):
        raise ValueError(f"{key} must be {_example(rooms)}, or class_path and init_args, got {brief(value)}")
    _check_names(spec, ("class_path", "init_args"), key)
    name = spec.get("class_path")
    if not isinstance(name, str):
        raise ValueError(f"{key} needs {_example(rooms)} as class_path, got {brief(name)}")
    cls = _import_class(rooms, name, key) if "." in name else _find_class(rooms, name, key)
    options = spec.get("init_args")
    return _build(cls, {} if options is None else options, key)


def _example(rooms: Sequence[str]) -> str:
    return f"a class name, for example {registry.example(rooms[0])}"


def _find_class(rooms: Sequence[str], name: str, key: str) -> type:
    try:
        return registry.get(rooms, name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _import_class(rooms: Sequence[str], path: str, key: str) -> type:
    """Return a class from outside the library."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two of names with empty parts
        raise ValueError(f"{key}: cannot import {brief(path)}: {shorten(str(error), 120)}") from error
    bases = tuple(registry.contract(room) for room in rooms)
    if not (isinstance(cls, type) and issubclass(cls, bases)) or inspect.isabstract(cls):
        names = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"{key}: {brief(path)} is no class that derives from {names}; see lightning-prune methods")
    return cls


def _build(cls: Any, options: Any, key: str) -> Any:
    """Construct a class with options read as its annotations say."""
    parameters = inspect.signature(cls).parameters
    known = {
        name: item for name, item in parameters.items() if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
    }
    if not isinstance(options, Mapping):
        raise ValueError(f"{key}: the options of {cls.__name__} must be a mapping, got {brief(options)}")
    if options and not parameters:
        raise ValueError(f"unknown key {brief(_join(key, next(iter(options))))}; {cls.__name__} takes no options")
    if len(known) == len(parameters):
        _check_names(options, known, key)
    hints = get_type_hints(cls if is_dataclass(cls) else cls.__init__)
    values = {name: read(hints.get(name, Any), item, _join(key, name)) for name, item in options.items()}
    for name, item in known.items():
        if item.default is item.empty and name not in values:
            raise ValueError(f"{_join(key, name)} is missing; give {_describe(hints.get(name, Any))}")
    try:
        return cls(**values)
    except (ValueError, TypeError, OverflowError) as error:
        said = shorten(str(error), _LONGEST)
        raise ValueError(said if f"{key.rpartition('.')[2]}." in said else f"{key}: {said}") from error


def _check_names(names: Iterable[Any], known: Iterable[str], key: str) -> None:
    offered = [_join(key, name) for name in known]
    for name in names:
        if _join(key, name) not in offered:
            raise ValueError(unknown("key", _join(key, name), offered))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _read_foreign(kind: Any, value: Any, key: str) -> Any:
    """Read an option of a class from outside the library whose type is none of those above."""
    from jsonargparse import ArgumentError, ArgumentParser  # takes a moment to import, and is rarely needed

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.instantiate(parser.parse_object({"value": value}))["value"]
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{key} must be {_describe(kind)}, got {brief(value)}") from error


def _describe(kind: Any) -> str:
    """Say in words what may stand at a place."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    simple = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text, not empty"}
    room = registry.room_of(kind)
    if origin in simple:
        return simple[origin]
    if room is not None:
        return _example([room])
    if len(_options(kind)) > 1:
        return " or ".join(_describe(option) for option in _options(kind) if option is not type(None))
    if origin is Literal:
        return f"one of {', '.join(str(option) for option in inner)}"
    if origin in _SEQUENCES:
        return f"a list ({_describe(inner[0])} each)" if inner else "a list"
    if origin in _MAPPINGS:
        return f"a mapping (to {_describe(inner[1])})" if inner else "a mapping"
    if is_dataclass(kind):
        return f"a mapping with {', '.join(item.name for item in fields(kind) if item.init)}"
    return getattr(kind, "__name__", str(kind)) if kind is not Any else "a value"
