"""What a configuration builds: the shapes of a model class without its memory, and what each field changes.

A class that is built from a configuration describes its own structure: double the FFN width in the configuration,
build the class on the meta device, and the dimensions that have grown are those that belong together. No family is
known here by name.

Cost: a build on the meta device takes milliseconds to tens of milliseconds for models of a billion parameters.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Blueprint", "Change", "Path", "Shapes", "edited", "leaves", "text_path"]

Path = tuple[str, ...]
Values = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


class Change(dict[tuple[str, int], tuple[int, int]]):
    """What an edit does: (tensor, dimension) -> (size before, size after)."""

    def per_unit(self, number: int, factor: float) -> dict[tuple[str, int], int]:
        """Return how much each dimension grows per unit, where a number of units was multiplied by a factor."""
        return {place: round((after - before) / (number * (factor - 1))) for place, (before, after) in self.items()}


def leaves(values: Values, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, value) of every field of nested values; lists are values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        elif isinstance(key, str):
            yield (*prefix, key), value


def edited(values: Values, edits: Mapping[Path, Any]) -> dict[str, Any]:
    """Return a copy of nested values with some fields set."""
    result = copy.deepcopy(dict(values))
    for path, value in edits.items():
        inner = result
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    return result


def text_path(config: Any) -> Path:
    """Return where the configuration of the text part lies in that of a model of several parts; () if it is all."""
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    return next(((name,) for name, part in vars(config).items() if part is text and part is not config), ())


class Blueprint:
    """Builds the class of a model from edited configurations.

    Args:
        model: has a `config` with `to_dict`, whose class has `from_dict`; its class takes the configuration alone.

    Raises:
        ValueError: if the model has no such configuration, or it does not describe the model.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        if not callable(getattr(config, "to_dict", None)) or not callable(getattr(type(config), "from_dict", None)):
            raise ValueError(
                f"{type(model).__name__} has no configuration it is built from, so it cannot be rebuilt smaller; "
                "wrap it in a transformers PreTrainedModel with a config class"
            )
        self.model_class: Any = type(model)
        self.config = config
        self.values: dict[str, Any] = config.to_dict()
        self.shapes = _shapes(model)
        self._cache: dict[str, Shapes | None] = {}
        self._reasons: dict[str, str] = {}
        built = self.shapes_with({})
        if built is None:
            raise ValueError(f"{type(model).__name__} cannot be built from its configuration: {self.why_not({})}")
        if built != self.shapes:
            odd = sorted(name for name in {*built, *self.shapes} if built.get(name) != self.shapes.get(name))
            raise ValueError(
                f"the configuration of {type(model).__name__} does not describe the model: it builds "
                f"{built.get(odd[0])} for {odd[0]}, the model has {self.shapes.get(odd[0])}; "
                "cut models as they were loaded, before adapters, wrappers or quantization change them"
            )

    def configuration(self, edits: Mapping[Path, Any]) -> Any:
        """Return the configuration with some fields set, as it would be after saving and loading."""
        config = type(self.config).from_dict(edited(self.values, edits))
        implementation = getattr(self.config, "_attn_implementation", None)
        if implementation is not None:
            config._attn_implementation = implementation
        return config

    def with_values(self, edits: Mapping[Path, Any]) -> "Blueprint | None":
        """Return the blueprint of the same weights under a configuration with other values; None if it does not fit."""
        if self.shapes_with(edits) != self.shapes:
            return None
        other = copy.copy(self)
        other.values = edited(self.values, edits)
        other._cache, other._reasons = {}, {}
        return other

    def skeleton(self, edits: Mapping[Path, Any]) -> nn.Module:
        """Return the class built on the meta device."""
        with torch.device("meta"), _without_initialization(self.model_class):
            model: nn.Module = self.model_class(self.configuration(edits))
        return model

    def shapes_with(self, edits: Mapping[Path, Any]) -> Shapes | None:
        """Return the shapes an edited configuration gives, None if it builds nothing."""
        key = _key(edits)
        if key not in self._cache:
            try:
                self._cache[key] = _shapes(self.skeleton(edits))
            except Exception as error:  # noqa: BLE001 - configurations refuse impossible values each in its own way
                self._cache[key] = None
                self._reasons[key] = " ".join(str(error).split())
        return self._cache[key]

    def why_not(self, edits: Mapping[Path, Any]) -> str:
        """Return what the class said about an edit that builds nothing."""
        return self._reasons.get(_key(edits), "")

    def change(self, edits: Mapping[Path, Any]) -> Change | None:
        """Return the dimensions an edit changes; None if it builds nothing, or other tensors."""
        shapes = self.shapes_with(edits)
        if shapes is None or shapes.keys() != self.shapes.keys():
            return None
        result = Change()
        for name, before in self.shapes.items():
            after = shapes[name]
            if len(after) != len(before):
                return None
            result.update(
                {(name, dim): pair for dim, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}
            )
        return result


@contextmanager
def _without_initialization(model_class: Any) -> Iterator[None]:
    """Leave out the drawing of weights that have no values, where the class does it in a method of its own."""
    name = "initialize_weights"
    own = vars(model_class).get(name)
    if hasattr(model_class, name):
        setattr(model_class, name, lambda model, *args, **kwargs: None)
    try:
        yield
    finally:
        if own is not None:
            setattr(model_class, name, own)
        elif name in vars(model_class):
            delattr(model_class, name)


def _key(edits: Mapping[Path, Any]) -> str:
    return repr(sorted(edits.items()))


def _shapes(model: nn.Module) -> Shapes:
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
