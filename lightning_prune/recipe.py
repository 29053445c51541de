"""Read, check and write recipes: YAML on one side, typed objects on the other.

A recipe states one job. The sections `prune`, `shrink`, `recover`, `evaluate`, `export`, `report` and `seed` are the
library's own; `trainer`, `model` and `data` belong to `lightning-prune run` and are kept as they were written.
"""

import copy
import inspect
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from lightning_prune import registry
from lightning_prune.granularity import Channel
from lightning_prune.recipe_sections import Evaluate, Export, Lora, Prune, Recover, ReportOptions, Shrink
from lightning_prune.schedules import Existing
from lightning_prune.sparsifier import Sparsifier

__all__ = [
    "Evaluate",
    "Export",
    "Lora",
    "Prune",
    "Recipe",
    "Recover",
    "ReportOptions",
    "Shrink",
    "one_line",
    "packaged_recipes",
]

_RAW = ("trainer", "model", "data")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One job, as typed objects; see the module text.

    `name` is the packaged name or the file's, and takes no part in comparisons.
    """

    prune: Prune | None = None
    shrink: Shrink | None = None
    recover: Recover | None = None
    evaluate: Evaluate | None = None
    export: Export | None = None
    report: ReportOptions = field(default_factory=ReportOptions)
    seed: int = 0
    trainer: Any = None
    model: Any = None
    data: Any = None
    name: str = field(default="recipe", compare=False)

    def __post_init__(self) -> None:
        form = None if self.export is None else self.export.format
        if form == "per_layer" and (self.shrink is None or self.shrink.method is None):
            raise ValueError("export.format per_layer is for blocks of different shapes; only shrink.method makes such")
        if self.shrink is not None:
            self._check_shrink(self.shrink)
        elif self.prune is None and self.recover is None:
            raise ValueError("the section prune is missing; a recipe prunes, has shrink.method, or recovers")
        if form == "adapter" and (self.recover is None or self.recover.lora is None):
            raise ValueError("export.format adapter writes LoRA adapters; only recover.lora makes such")

    def _check_shrink(self, shrink: Shrink) -> None:
        if self.export is not None and self.export.format == "dense":
            raise ValueError("shrink changes shapes, which export.format dense does not record; use huggingface")
        if shrink.zeros and (self.prune is None or not isinstance(self.prune.granularity, Channel)):
            raise ValueError("shrink.zeros cuts units that prune masks with granularity Channel; set prune.granularity")
        if shrink.method is not None:
            for name in ("prune", "recover", "evaluate"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"shrink.method makes a smaller model and nothing else; set {name}: null, and use a second "
                        "recipe on the smaller model"
                    )
            if self.report.dir is not None:
                raise ValueError("report.dir has no effect with shrink.method; the numbers are in lightning_prune.json")

    @classmethod
    def load(cls, source: "str | Path | Recipe | Mapping[str, Any]", *, overrides: Iterable[str] = ()) -> Self:
        """Read a recipe.

        Args:
            source: a packaged name such as `oneshot/wanda_half`, a path to a YAML file, a recipe, or its sections.
            overrides: `section.key=value` each, with or without leading dashes; `init_args` may be left out of a key.

        Raises:
            ValueError: if the recipe is not found, is not YAML, or holds an unknown key, class or value.
        """
        overrides = list(overrides)
        if isinstance(source, Recipe):
            name, where, content = source.name, f"recipe {source.name}", source.as_dict()
        elif isinstance(source, Mapping):
            name, where, content = "recipe", "recipe", copy.deepcopy(dict(source))
        else:
            name, path = _locate(str(source))
            where, content = str(path), _read(path)
        if not isinstance(content, dict):
            raise ValueError(f"{where}: a recipe is a mapping of sections, got {type(content).__name__}")
        _fill_default_classes(content)
        for override in overrides:
            _override(content, override)
        if overrides:
            where = f"{where} with {' '.join(overrides)}"
        try:
            recipe = cls(name=name, **_parse(content))
            if recipe.prune is not None or recipe.recover is not None:
                recipe.sparsifier()
        except (ValueError, TypeError, ArgumentError) as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        return recipe

    def as_dict(self) -> dict[str, Any]:
        """Return every value as plain lists, dicts, numbers and strings; sections a callback ignores only if given."""
        own = {key: _plain(getattr(self, key)) for key in _own_sections()}
        raw = {key: copy.deepcopy(getattr(self, key)) for key in _RAW if getattr(self, key) is not None}
        return own | raw

    def dump(self) -> str:
        """Return the recipe as YAML; loading it gives an equal recipe."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, width=120)

    def fingerprint(self) -> dict[str, Any]:
        """Return the section that decides the masks, as plain values to compare when a run is resumed."""
        plain: dict[str, Any] = _plain(self.masking())
        return plain

    def masking(self) -> Prune:
        """Return the section `prune`; for a recipe that only recovers, one that holds the zeros there are.

        Raises:
            ValueError: if the recipe has none, because it shrinks a model at once.
        """
        if self.prune is None and self.recover is not None:
            return Prune(schedule=Existing(allow_dense=True))
        if self.prune is None:
            raise ValueError(
                f"recipe {self.name} has no section prune and makes a model smaller at once; run it with "
                "lightning-prune oneshot"
            )
        return self.prune

    def sparsifier(self) -> Sparsifier:
        """Return a fresh conductor for this recipe."""
        prune = self.masking()
        return Sparsifier(
            schedule=prune.schedule,
            targets=prune.targets,
            granularity=prune.granularity,
            scorer=prune.scorer,
            allocation=prune.allocation,
            guard=prune.guard,
            seed=self.seed,
        )


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that come with the library: name -> file."""
    package = Path(__file__).resolve().parent
    folder = package / "recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def one_line(error: Exception) -> str:
    """Return what an error of the parser says, on one line and without the types that were tried in vain."""
    text = " ".join(str(error).split())
    tried = re.search(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", text)
    if tried is None:
        return text
    said = re.sub(r" - Expected a <class 'NoneType'>.*$", "", text[tried.end() :])
    return text[: tried.start()] + said


def _locate(source: str) -> tuple[str, Path]:
    """Return (name, file) of a packaged recipe or of a path."""
    packaged = packaged_recipes()
    if source in packaged:
        return source, packaged[source]
    path = Path(source).expanduser()
    if path.is_file():
        return path.stem, path
    raise ValueError(f"{registry.unknown('recipe', source, packaged)}; a path to a YAML file works too")


def _read(path: Path) -> Any:
    try:
        return get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {one_line(error)}") from error


def _own_sections() -> list[str]:
    return [item.name for item in fields(Recipe) if item.name not in (*_RAW, "name")]


def _parse(content: dict[str, Any]) -> dict[str, Any]:
    """Check a recipe's content and return the arguments of `Recipe`."""
    _check_keys(Recipe, content, "")
    parser = ArgumentParser(exit_on_error=False)
    hints = get_type_hints(Recipe)
    own = [key for key in _own_sections() if content.get(key) is not None]
    for key in own:
        parser.add_argument(f"--{key}", type=_without_none(hints[key]))
    parsed = parser.instantiate(parser.parse_object({key: content[key] for key in own}))
    return {key: parsed[key] for key in own} | {key: content[key] for key in _RAW if key in content}


def _check_keys(kind: Any, value: Any, path: str) -> None:
    """Compare every key and class name with what the types know.

    Args:
        kind: the type that stands at this place.
        value: the raw content at this place.
        path: the dotted key of this place, empty at the top.

    Raises:
        ValueError: naming the key or class and the nearest known one.
    """
    kind = _without_none(kind)
    rooms = _rooms(kind)
    if rooms:
        _check_class(rooms, value, path)
    elif is_dataclass(kind) and isinstance(value, Mapping):
        known = [item.name for item in fields(kind) if item.name != "name" or kind is not Recipe]
        _check_names(value, known, path)
        hints = get_type_hints(kind)
        for key, inner in value.items():
            _check_keys(hints[key], inner, _join(path, key))


def _without_none(kind: Any) -> Any:
    """Return the type that an optional value has when it is given; other types unchanged."""
    options = [option for option in get_args(kind) if option is not type(None)]
    return options[0] if get_origin(kind) in (Union, types.UnionType) and len(options) == 1 else kind


def _check_class(rooms: Sequence[str], value: Any, path: str) -> None:
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping):
        return
    _check_names(spec, ("class_path", "init_args"), path)
    name = spec.get("class_path")
    if not isinstance(name, str):
        raise ValueError(
            f"{path} needs a class name, for example {registry.entries(rooms[0])[0].cls.__name__}, got {value!r}"
        )
    if "." not in name:
        try:
            cls = registry.get(rooms, name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        options, known = spec.get("init_args") or {}, inspect.signature(cls).parameters
        if options and not known:
            raise ValueError(f"unknown key {_join(path, next(iter(options)))!r}; {name} takes no options")
        _check_names(options, known, path)
        hints = get_type_hints(cls) if is_dataclass(cls) else {}
        for key, inner in options.items() if isinstance(options, Mapping) else ():
            _check_keys(hints.get(key, Any), inner, _join(path, key))


def _check_names(names: Iterable[str], known: Iterable[str], path: str) -> None:
    offered = [_join(path, name) for name in known]
    for name in names:
        if _join(path, name) not in offered:
            raise ValueError(registry.unknown("key", _join(path, name), offered))


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _rooms(kind: Any) -> list[str]:
    """Return the rooms that a value of this type is chosen from; none if it may be something else too."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    found = [room for option in options for room, base in registry.rooms().items() if base is option]
    return found if len(found) == len(options) else []


def _fill_default_classes(content: dict[str, Any]) -> None:
    """Write out the default class of each choice left out, so that its options can be overridden."""
    prune = content.get("prune")
    if not isinstance(prune, dict):
        return
    hints = get_type_hints(Prune)
    for item in fields(Prune):
        if _rooms(hints[item.name]) and item.default_factory is not MISSING:
            prune.setdefault(item.name, _plain(item.default_factory()))


def _override(content: dict[str, Any], override: str) -> None:
    """Set one value of a recipe's content, by its dotted key."""
    key, equals, text = override.lstrip("-").partition("=")
    if not equals or not key:
        raise ValueError(f"an override is written section.key=value, got {override!r}")
    *parents, last = key.split(".")
    node = content
    for name in parents:
        node = _open(node, name)
    if last not in node and "class_path" in node and last != "init_args":
        node = _open(node, "init_args")
    try:
        value = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"the value of {override!r} is not YAML: {one_line(error)}; text with signs needs quotes"
        ) from error
    node[last] = _switch_class(node.get(last), value)


def _open(node: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping under a name, writing a short class name out and making what is missing."""
    if "class_path" in node and name not in ("class_path", "init_args"):
        node = _open(node, "init_args")
    inner = node.get(name)
    if isinstance(inner, str):
        inner = {"class_path": inner}
    if not isinstance(inner, dict):
        inner = {}
    node[name] = inner
    return inner


def _switch_class(old: Any, new: Any) -> Any:
    """Return the value that replaces another; a class takes over the options it shares with the class before it."""
    if not (isinstance(old, dict) and "class_path" in old and isinstance(new, str)):
        return new
    for room in registry.rooms():
        for entry in registry.entries(room):
            if new == entry.cls.__name__:
                shared = inspect.signature(entry.cls).parameters
                kept = {key: value for key, value in (old.get("init_args") or {}).items() if key in shared}
                return {"class_path": new, "init_args": kept}
    return new


def _plain(value: Any) -> Any:
    """Turn options into lists, dicts, numbers and strings; a class of a room becomes class_path and init_args."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    cls = type(value)
    room = next((room for room, base in registry.rooms().items() if isinstance(value, base)), None)
    if room is None:
        return (
            {item.name: _plain(getattr(value, item.name)) for item in fields(value)} if is_dataclass(value) else value
        )
    is_packaged = any(cls is entry.cls for entry in registry.entries(room))
    options = {name: _plain(getattr(value, name)) for name in inspect.signature(cls).parameters}
    path = cls.__name__ if is_packaged else f"{cls.__module__}.{cls.__qualname__}"
    return {"class_path": path} | ({"init_args": options} if options else {})
