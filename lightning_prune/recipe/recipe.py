"""Read, check and write recipes: YAML on one side, typed objects on the other.

A recipe states one job. The sections `prune`, `condition`, `shrink`, `recover`, `evaluate`, `export`, `report` and
`seed` are the library's own; `trainer`, `model` and `data` belong to `lightning-prune run` and are kept as they were
written.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from lightning_prune.base import registry
from lightning_prune.base.names import brief, shorten, unknown
from lightning_prune.base.plain_values import plain, read, without_none
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.granularity import Channel
from lightning_prune.recipe.sections import Evaluate, Export, Lora, Prune, Recover, ReportOptions, Shrink
from lightning_prune.recipe.yaml_text import read_yaml, read_yaml_file, write_yaml
from lightning_prune.schedules import Existing

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
    condition: ConditionMethod | None = None
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
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {self.seed}")
        form = None if self.export is None else self.export.format
        if form == "per_layer" and (self.shrink is None or self.shrink.method is None):
            raise ValueError("export.format per_layer is for blocks of different shapes; only shrink.method makes such")
        if self.condition is not None:
            self._check_condition()
        elif form == "conditional":
            raise ValueError("export.format conditional writes what the section condition added; there is none")
        elif self.shrink is not None:
            self._check_shrink(self.shrink)
        elif self.prune is None and self.recover is None:
            raise ValueError(
                "the section prune is missing; a recipe prunes, has shrink.method, has a condition, or recovers"
            )
        if self.evaluate is not None and self.evaluate.mask_from == "task" and self.condition is None:
            raise ValueError(
                "evaluate.mask_from: task reads the masks of a model that chooses its sub-network, and there is no "
                "section condition; leave it out"
            )
        if form == "adapter" and (self.recover is None or self.recover.lora is None):
            raise ValueError("export.format adapter writes LoRA adapters; only recover.lora makes such")

    def _check_condition(self) -> None:
        for name in ("prune", "shrink"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"condition lets the model choose its parts per input, and {name} takes parts away for good; use "
                    f"two recipes, {name} first"
                )
        if self.condition is not None and not self.condition.is_trained:
            self._check_once(type(self.condition).__name__)
        if self.condition is not None and self.recover is not None:
            self._check_taught(self.condition, self.recover)
        if self.export is not None and self.condition is not None and not self.condition.is_exported:
            raise ValueError(
                f"what {type(self.condition).__name__} adds is in the trainer's checkpoints and the model's own "
                "state_dict; there is no folder for it yet: set export: null"
            )
        if self.export is not None and self.export.format != "conditional":
            raise ValueError(
                f"export.format {self.export.format} has no place for what condition adds to the model; use conditional"
            )

    def _check_once(self, name: str) -> None:
        for section in ("recover", "evaluate"):
            if getattr(self, section) is not None:
                raise ValueError(
                    f"{name} is made once, without a training, and {section} belongs to one; set {section}: null"
                )
        if self.report.dir is not None:
            raise ValueError(f"report.dir has no effect with {name}, which is not trained; leave it out")

    @staticmethod
    def _check_taught(condition: ConditionMethod, recover: Recover) -> None:
        for name in ("lora", "retrain", "reconstruct", "learning_rate"):
            if getattr(recover, name):
                raise ValueError(
                    f"recover.{name} says what is trained or how, and so does condition; beside it recover takes "
                    f"distill alone: leave {name} out (adapters: give the trainer a model of PEFT)"
                )
        if not condition.is_taught:
            raise ValueError(
                f"{type(condition).__name__} trains on the model's own loss, which recover.distill would replace; set "
                "recover: null"
            )

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
            where, content = shorten(str(path), 160), read_yaml_file(path)
        if not isinstance(content, dict):
            raise ValueError(f"{where}: a recipe is a mapping of sections, got {brief(content)}")
        _fill_default_classes(content)
        for override in sorted(overrides, key=_num_names):
            _override(content, override)
        if overrides:
            where = f"{where} with {shorten(' '.join(overrides), 100)}"
        try:
            recipe = cls(name=name, **_parse(content))
            if recipe.shrink is None or recipe.shrink.method is None:
                recipe.sparsifier()
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        return recipe

    def as_dict(self) -> dict[str, Any]:
        """Return every value as plain lists, dicts, numbers and strings; sections a callback ignores only if given."""
        own = {key: plain(getattr(self, key)) for key in _own_sections()}
        raw = {key: copy.deepcopy(getattr(self, key)) for key in _RAW if getattr(self, key) is not None}
        return own | raw

    def dump(self) -> str:
        """Return the recipe as YAML; loading it gives an equal recipe."""
        return write_yaml(self.as_dict())

    def fingerprint(self) -> dict[str, Any]:
        """Return the section that decides the masks, as plain values to compare when a run is resumed."""
        values: dict[str, Any] = plain(self.masking())
        return values

    def masking(self) -> Prune:
        """Return the section `prune`; without one, what holds the zeros there are.

        Raises:
            ValueError: if the recipe has none, because it shrinks a model at once.
        """
        if self.prune is None and (self.recover is not None or self.condition is not None):
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
    package = Path(__file__).resolve().parents[1]
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
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path.stem, path
        there, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # over-long, unreadable, ~nosuchuser, a zero byte
        raise ValueError(f"{shorten(source, 80)}: cannot be opened: {shorten(_reason(error), 100)}") from error
    if there:
        what = "a folder" if is_folder else "no regular file"
        raise ValueError(f"{shorten(source, 120)}: is {what}; a recipe is a YAML file or a packaged name")
    if path.suffix in (".yaml", ".yml", ".json") or source.startswith((".", "/", "~")):
        raise ValueError(f"{shorten(source, 120)}: no such file; a recipe is a YAML file or a packaged name")
    raise ValueError(
        f"{unknown('recipe', source, packaged)}; no file of this name either, and lightning-prune methods lists all"
    )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _own_sections() -> list[str]:
    return [item.name for item in fields(Recipe) if item.name not in (*_RAW, "name")]


def _parse(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Check a recipe's content and return the arguments of `Recipe`; a section that is null is left out."""
    sections = [*_own_sections(), *_RAW]
    for key in content:
        if key not in sections:
            raise ValueError(unknown("key", str(key), sections))
    for key in _RAW:
        allowed = (Mapping,) if key == "trainer" else (Mapping, str)  # a class alone may stand by its name
        if content.get(key) is not None and not isinstance(content[key], allowed):
            raise ValueError(f"{key} must be a mapping, got {brief(content[key])}")
    hints = get_type_hints(Recipe)
    given = {key: value for key, value in content.items() if value is not None or key == "seed"}
    return {key: value if key in _RAW else read(without_none(hints[key]), value, key) for key, value in given.items()}


def _fill_default_classes(content: dict[str, Any]) -> None:
    """Write out the default class of each choice left out, so that its options can be overridden."""
    prune = content.get("prune")
    if not isinstance(prune, dict):
        return
    hints = get_type_hints(Prune)
    for item in fields(Prune):
        if registry.room_of(hints[item.name]) and item.default_factory is not MISSING:
            prune.setdefault(item.name, plain(item.default_factory()))


def _num_names(override: str) -> int:
    """Count the names of a dotted key, so that what holds others is overridden before them."""
    return len([name for name in override.partition("=")[0].split(".") if name not in ("init_args", "class_path")])


def _override(content: dict[str, Any], override: str) -> None:
    """Set one value of a recipe's content, by its dotted key; a new class keeps no option of the one before."""
    key, equals, text = override.lstrip("-").partition("=")
    if not equals or not key:
        raise ValueError(f"an override is written section.key=value, got {brief(override)}")
    *parents, last = key.split(".")
    node = content
    for name in parents:
        node = _open(node, name)
    if last not in node and "class_path" in node and last != "init_args":
        node = _open(node, "init_args")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise ValueError(
            f"the value of {brief(override)} is not YAML: {error}; text with signs needs quotes"
        ) from error
    if last == "class_path":
        node.clear()
    node[last] = value


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
