"""Which numbers of a configuration count something, and what following numbers must be set along with them.

The few names here are those that Transformers itself standardises; a class that calls them otherwise says so in its
`attribute_map`. FFN widths and everything else are found by what they change, under any name.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.structured.discovery.blueprint import Blueprint, Change, Path, leaves, text_path

__all__ = ["FFN_WORDS", "Count", "Fields", "HeadFields"]

_HIDDEN = ("hidden_size", "d_model", "n_embd", "model_dim", "dim")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "num_query_groups")
_NO_SIZES = ("vocab_size", "max_position_embeddings", "initializer_range")
FFN_WORDS = ("intermediate", "ffn", "dim_ff", "d_ff", "inner", "mlp", "feed_forward")


@dataclass(frozen=True)
class Count:
    """A field that counts units: one number, or one for each block."""

    path: Path
    value: int | tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the dotted name."""
        return ".".join(self.path)

    def at(self, layer: int | None) -> int:
        """Return the number that holds in a block."""
        return self.value if isinstance(self.value, int) else self.value[layer or 0]

    def times(self, factor: int) -> int | list[int]:
        """Return the value of the field with every number multiplied."""
        return self.value * factor if isinstance(self.value, int) else [value * factor for value in self.value]

    def halved(self) -> int | list[int]:
        """Return the value of the field with every number halved, rounded up."""
        return -(-self.value // 2) if isinstance(self.value, int) else [-(-value // 2) for value in self.value]


@dataclass(frozen=True)
class HeadFields:
    """The fields of one attention: what counts query heads, what counts key/value heads, and the head size."""

    heads: Count
    kv_heads: Count | None
    pins: Mapping[Path, int]


class Fields:
    """The counting fields of a model's configuration."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.flat: dict[Path, Any] = dict(leaves(blueprint.values))

    def named(self, names: Iterable[str]) -> list[Count]:
        """Return the counting fields with these names, or what the class calls them."""
        aliases: Mapping[str, str] = getattr(self.blueprint.config, "attribute_map", None) or {}
        wanted = {aliases.get(name, name) for name in names}
        return [count for count in self.counts() if count.path[-1] in wanted]

    def counts(self) -> list[Count]:
        """Return all fields that may count something: whole numbers from two up, or lists of them."""
        result = []
        for path, value in self.flat.items():
            if path[-1] in _NO_SIZES or path[-1].endswith("token_id"):
                continue
            if _is_number(value) and value >= 2:
                result.append(Count(path, value))
            elif (
                isinstance(value, list) and len(value) > 1 and all(_is_number(entry) and entry >= 2 for entry in value)
            ):
                result.append(Count(path, tuple(value)))
            elif value is None and any(word in path[-1] for word in FFN_WORDS):
                number = self._followed(path)
                if number is not None:
                    result.append(Count(path, number))
        return result

    def _followed(self, path: Path) -> int | None:
        """Return the number that a field stands for while it is not set and follows others."""
        few, many = self.blueprint.shapes_with({path: 64}), self.blueprint.shapes_with({path: 128})
        if few is None or many is None or not few.keys() == many.keys() == self.blueprint.shapes.keys():
            return None
        numbers = set()
        for name, before in self.blueprint.shapes.items():
            for size, small, large in zip(before, few[name], many[name], strict=True):
                if large != small:
                    numbers.add(64 + 64 * (size - small) // (large - small))
        number = numbers.pop() if len(numbers) == 1 else None
        return number if number is not None and self.blueprint.change({path: number}) == {} else None

    def inner(self) -> list[Count]:
        """Return the fields that may count units inside of modules: all but heads, blocks and residual channels."""
        taken = {count.path for count in self.named((*_HIDDEN, *_HEADS, *_KV_HEADS))} | self.all_pins().keys()
        return [count for count in self.counts() if count.path not in taken]

    def hidden(self) -> list[Count]:
        """Return the fields that may count residual channels, those of the text part first."""
        text = text_path(self.blueprint.config)
        return sorted(self.named(_HIDDEN), key=lambda count: count.path[:-1] != text)

    def heads(self) -> list[HeadFields]:
        """Return the attentions that the configuration describes."""
        kv_heads = self.named(_KV_HEADS)
        return [
            HeadFields(
                heads=heads,
                kv_heads=next((kv for kv in kv_heads if kv.path[:-1] == heads.path[:-1]), self._single_kv(heads.path)),
                pins=self.pins(heads),
            )
            for heads in self.named(_HEADS)
            if isinstance(heads.value, int)
        ]

    def _single_kv(self, heads: Path) -> Count | None:
        """Return the field that says that all query heads share one key/value head."""
        return next(
            (
                Count(path, 1)
                for path, value in self.flat.items()
                if path[:-1] == heads[:-1] and path[-1] in _KV_HEADS and value == 1
            ),
            None,
        )

    def pins(self, heads: Count) -> dict[Path, int]:
        """Return the field that holds the head size apart from the hidden size, if the class knows it."""
        prefix = heads.path[:-1]
        path = (*prefix, "head_dim")
        for hidden in self.hidden():
            if hidden.path[:-1] == prefix and isinstance(hidden.value, int):
                size = self.flat.get(path) or hidden.value // heads.at(None)
                if self.blueprint.change({path: size}) == {} and self.blueprint.change({path: 2 * size}):
                    return {path: size}
        return {}

    def all_pins(self) -> dict[Path, int]:
        """Return the head sizes of all attentions."""
        return {path: size for heads in self.named(_HEADS) for path, size in self.pins(heads).items()}

    def effect(self, counts: Iterable[Count], pins: Mapping[Path, int] | None = None) -> tuple[Change, float] | None:
        """Return what changes when counts are multiplied, and by how much they were; None if nothing can be built."""
        chosen = list(counts)
        for factor in (2, 3):
            change = self.blueprint.change({count.path: count.times(factor) for count in chosen} | dict(pins or {}))
            if change is not None:
                return change, factor
        change = self.blueprint.change({count.path: count.halved() for count in chosen} | dict(pins or {}))
        if change is not None and all(count.at(0) % 2 == 0 for count in chosen):
            return change, 0.5
        return None

    def epsilons(self, norms: Collection[str]) -> tuple[str, ...] | None:
        """Return the fields that norms add to a mean square.

        Args:
            norms: names of the modules whose constants are to change, and no others.

        Returns:
            None if some norm follows no field, or a field changes anything else.
        """
        fields, changed = [], set()
        for path, value in self.flat.items():
            if "eps" not in path[-1] or not isinstance(value, float) or not 0 < value < 1e-2:
                continue
            moved = _other_numbers(self.blueprint.skeleton({}), self.blueprint.skeleton({path: 2 * value}))
            if moved & set(norms):
                fields.append(".".join(path))
                changed |= moved
        return tuple(fields) if changed == set(norms) else None


def _other_numbers(model: nn.Module, other: nn.Module) -> set[str]:
    """Return the names of the modules that hold another floating-point number in the other model."""
    twins = dict(other.named_modules())
    return {
        name
        for name, module in model.named_modules()
        if any(isinstance(v, float) and vars(twins[name]).get(key) != v for key, v in vars(module).items())
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
