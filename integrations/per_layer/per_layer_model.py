"""Models whose blocks differ in shape: a stock class of Transformers, with the sizes of single blocks overridden.

The configuration carries `per_layer_config`, in the schema of Transformers: block -> the fields that differ there, for
example {"2": {"intermediate_size": 96}, "3": {"skip": ["mlp"], "intermediate_size": null}}. Every block is what the
stock class builds from the fields that hold for it. A part that is skipped has no weights and adds nothing to the
residual stream; its sizes are null, at which a stock class stops that would build it whole. A block with `share_with`
computes with the matrices of that block, which are stored once, and with differences of rank `share_rank`; on disk its
number of heads is null, for the same reason.

This file and the shared blocks it imports need torch and transformers alone. A copy of both travels with every exported
model, so that the folder loads with `trust_remote_code=True` where nothing else is installed.

Cost: loading builds the stock class once more for every set of sizes; on the meta device, as `from_pretrained` does,
this takes no memory.
Limits: one stack of blocks that `num_hidden_layers` counts, in a configuration without sub-configurations.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_prune.structured.depth.shared_block import share_block

__all__ = ["Nothing", "PerLayerConfig", "PerLayerModel", "strictly"]

_SHARING = ("share_with", "share_rank")


class _Layers(list[Any]):
    """Configurations by block, and by type of layer: rotary tables are made for each type."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self[0].layer_types.index(key) if isinstance(key, str) else key)


def _of_whole(name: str) -> Any:
    """Return a property that configurations of single blocks have in common with that of the model."""

    def read(self: Any) -> Any:
        return self.__dict__.get("whole", self).__dict__.get(f"shared{name}")

    def write(self: Any, value: Any) -> None:
        self.__dict__.get("whole", self).__dict__[f"shared{name}"] = value

    return property(read, write)


class PerLayerConfig:
    """Mixed into a stock configuration class; holds what differs per block.

    `layer_overrides` maps block numbers to fields and their values there. `block_lists` names the lists of blocks,
    seen from the base model; `skip_parts` says for each part that may be skipped (attention, mlp, or both) which
    modules of a block go with it, and what they give instead: see `Nothing`.
    """

    layer_overrides: ClassVar[Any]  # a plain attribute of each configuration, and no field of the dataclass
    block_lists: ClassVar[Any]
    skip_parts: ClassVar[Any]
    # What may be switched on a built model reaches the blocks, whose configurations are objects of their own.
    _attn_implementation_internal = _of_whole("_attn_implementation_internal")
    _experts_implementation_internal = _of_whole("_experts_implementation_internal")

    def __init__(self, **kwargs: Any) -> None:
        """Read the fields, where the stock configuration is a plain class, as in Transformers 4."""
        own = self._begin(kwargs)
        super().__init__(**kwargs)
        self._number(*own)

    def __post_init__(self, **kwargs: Any) -> None:
        """Read the fields that the stock configuration does not know, where it is a dataclass, as in Transformers 5."""
        own = self._begin(kwargs)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self._number(*own)

    def _begin(self, kwargs: dict[str, Any]) -> tuple[Mapping[Any, Any], Any]:
        self.__dict__.setdefault("block_lists", [])
        self.__dict__.setdefault("skip_parts", {})
        self.__dict__["layer_overrides"] = {}
        for name in _SHARING:
            kwargs.pop(name, None)
        return kwargs.pop("per_layer_config", None) or {}, kwargs.pop("per_layer_index", None)

    def _number(self, overrides: Mapping[Any, Any], index: Any) -> None:
        """Number the blocks that are listed anew, in their order."""
        known = {int(layer): dict(values) for layer, values in overrides.items() if values}
        # The blocks that are listed, in this order: a list with one entry per block is cut when blocks are removed.
        chosen = range(self._num_layers) if index is None else index
        if len(chosen) != self._num_layers or (index is None and set(known) - set(chosen)):
            raise ValueError(
                f"per_layer_config is of blocks {sorted(known)} out of {list(chosen)}, but {self._num_layers} are built"
            )
        for layer, fields in known.items():
            donor = fields.get("share_with", chosen[0])
            if donor not in chosen:
                raise ValueError(f"block {layer} shares with block {donor}, which is not among {list(chosen)}")
            if "share_with" in fields:
                known[layer] = {name: value for name, value in fields.items() if value is not None}
                known[layer]["share_with"] = chosen.index(donor)
        self.__dict__["layer_overrides"] = {new: known[old] for new, old in enumerate(chosen) if old in known}

    @property
    def _num_layers(self) -> int:
        config: Any = self
        return int(config.num_hidden_layers)

    @property
    def per_layer_config(self) -> list[Any]:
        """Return the configuration that holds in each block, as Transformers' caches read it."""
        return _Layers(self._resolved(layer) for layer in range(self._num_layers))

    @per_layer_config.setter
    def per_layer_config(self, overrides: Mapping[int | str, dict[str, Any]] | None) -> None:
        self.__dict__["layer_overrides"] = {int(layer): dict(values) for layer, values in (overrides or {}).items()}

    def _resolved(self, layer: int) -> Any:
        config = copy.copy(self)
        config.__dict__["layer_overrides"] = {}
        config.__dict__["skip"] = self.skipped(layer)
        for name, value in self.sizes(layer).items():
            setattr(config, name, value)
        return config

    def sizes(self, layer: int) -> dict[str, Any]:
        """Return the fields that differ in a block; the sizes of what it leaves out are null and not among them."""
        fields = dict(self.layer_overrides.get(layer, {}))
        skipped = fields.pop("skip", [])
        for name in _SHARING:
            fields.pop(name, None)
        return {name: value for name, value in fields.items() if value is not None or not skipped}

    def skipped(self, layer: int) -> list[str]:
        """Return the parts that a block leaves out: attention, mlp."""
        return list(self.layer_overrides.get(layer, {}).get("skip", []))

    def shared(self, layer: int) -> tuple[int, int] | None:
        """Return the block whose matrices this one computes with, and the rank of its differences; None if its own."""
        fields = self.layer_overrides.get(layer, {})
        return (int(fields["share_with"]), int(fields["share_rank"])) if "share_with" in fields else None

    def stand_ins(self, layer: int) -> dict[str, str]:
        """Return module of a block -> what it gives instead; see `Nothing`."""
        parts = self.skipped(layer)
        result: dict[str, str] = {}
        for part in [*parts, "both"] if len(parts) > 1 else parts:
            result |= self.skip_parts.get(part, {})
        return result

    def uniform(self, overrides: Mapping[str, Any]) -> Any:
        """Return a configuration by which all blocks have these fields."""
        config: Any = self
        values = {**config.to_dict(), **overrides, "per_layer_config": None}
        values.pop("model_type", None)
        result = type(config).from_dict(values)
        result.__dict__["whole"] = self.__dict__.get("whole", self)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `from_dict` makes the same configuration."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for name in ("layer_overrides", "whole", "skip", "shared_attn_implementation_internal"):
            values.pop(name, None)
        values.pop("shared_experts_implementation_internal", None)
        width = len(str(max(self._num_layers - 1, 0)))
        values["per_layer_config"] = {
            str(layer).zfill(width): copy.deepcopy(fields) for layer, fields in sorted(self.layer_overrides.items())
        }
        values["per_layer_index"] = list(range(self._num_layers))
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to disk: what a class that knows no more than the schema can read, or stops at.

        `AutoTokenizer` reads it as a plain configuration, to which what differs per block must exist for the whole. A
        stock class would build blocks that share as whole ones, with random weights; at null it stops.
        """
        values: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        values.pop("per_layer_index", None)
        names = getattr(self, "attribute_map", None) or {}
        for fields in values["per_layer_config"].values():
            if "share_with" in fields:
                fields[names.get("num_attention_heads", "num_attention_heads")] = None
                values |= dict.fromkeys(_SHARING)
        return values | {"num_hidden_layers": self._num_layers}

    def validate_architecture(self) -> None:
        """Accept what the blocks are built from; the head size stands on its own, so heads need not divide widths."""


class Nothing(nn.Module):
    """In place of a module that was removed; it adds nothing.

    Args:
        kind: `tensor` gives zeros like the input, `tuple N` those and N - 1 times None, `empty` no features at all,
            `identity` the input.
        width: number of features of the zeros; None for that of the input.
    """

    def __init__(self, kind: str, width: int | None = None) -> None:
        super().__init__()
        self.kind, self.width = kind, width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what stands for the output."""
        values = [*args, *kwargs.values()]
        hidden = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
        if self.kind == "identity":
            return hidden
        if self.kind == "empty":
            return hidden[..., :0]
        zeros = hidden.new_zeros(*hidden.shape[:-1], hidden.shape[-1] if self.width is None else self.width)
        name, _, number = self.kind.partition(" ")
        return (zeros, *[None] * (int(number) - 1)) if name == "tuple" else zeros

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"kind={self.kind!r}, width={self.width}"


def strictly(config_class: Any) -> Any:
    """Return a class of configurations that checks its fields, where they are declared."""
    is_declared = dataclasses.is_dataclass(config_class)
    return strict(config_class) if is_declared else config_class


class PerLayerModel:
    """Mixed into a stock model class, before it; gives every block its own shape."""

    stock_class: ClassVar[Any]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self._exchange_blocks()
        for layer in range(config.num_hidden_layers):
            for block in self._blocks(self, layer):
                self._leave_out(block, config.stand_ins(layer))
        for layer in range(config.num_hidden_layers):
            self._share(layer, config.shared(layer))
        self._number_caches()

    def _blocks(self, model: Any, layer: int) -> Iterator[Any]:
        base = getattr(model, model.base_model_prefix, model)
        for name in model.config.block_lists:
            yield base.get_submodule(name)[layer]

    def _exchange_blocks(self) -> None:
        """Take every block that differs from a model of the stock class in which all are like it."""
        config: Any = self.config  # type: ignore[attr-defined]
        wanted: dict[str, list[int]] = {}
        for layer in config.layer_overrides:
            sizes = config.sizes(layer)
            if sizes:
                wanted.setdefault(json.dumps(sizes, sort_keys=True), []).append(layer)
        base: Any = getattr(self, self.base_model_prefix, self)  # type: ignore[attr-defined]
        for sizes_text, layers in wanted.items():
            donor = self.stock_class(config.uniform(json.loads(sizes_text)))
            for layer in layers:
                for name, block in zip(config.block_lists, self._blocks(donor, layer), strict=True):
                    base.get_submodule(name)[layer] = block

    def _leave_out(self, block: Any, stand_ins: Mapping[str, str]) -> None:
        for name, kind in stand_ins.items():
            parent, _, leaf = name.rpartition(".")
            owner = block.get_submodule(parent)
            old = getattr(owner, leaf, None)
            if old is not None:
                setattr(owner, leaf, Nothing(kind, getattr(old, "out_features", getattr(old, "nf", None))))

    def _share(self, layer: int, shared: tuple[int, int] | None) -> None:
        """Let a block compute with the matrices of another one."""
        if shared is None:
            return
        config: Any = self.config  # type: ignore[attr-defined]
        donor, rank = shared
        if config.shared(donor) is not None:
            raise ValueError(f"block {layer} shares with block {donor}, which has no matrices of its own")
        for block, lender in zip(self._blocks(self, layer), self._blocks(self, donor), strict=True):
            names = [name for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
            share_block(block, lender, rank, width=config.hidden_size, names=names)

    def _number_caches(self) -> None:
        """Give the attentions that are left the first places in the cache: its length is read from those.

        Places have a type (full or sliding attention), so they are handed out within each type.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        number = config.num_hidden_layers
        attending = [layer for layer in range(number) if "attention" not in config.skipped(layer)]
        if len(attending) == number:
            return
        types = list(getattr(config, "layer_types", None) or [""] * number)
        if types[0] not in {types[layer] for layer in attending}:
            kind = f" of type {types[0]}" if types[0] else ""
            raise ValueError(f"no attention{kind} is left, by which the cache counts its tokens; keep at least one")
        free = {kind: iter([layer for layer in range(number) if types[layer] == kind]) for kind in types}
        for layer in attending:
            slot = next(free[types[layer]])
            for block in self._blocks(self, layer):
                for module in block.modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx = slot
