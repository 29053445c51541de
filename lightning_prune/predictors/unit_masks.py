"""Multiply what the readers of units read by a mask per sample.

A unit of a group (an FFN unit, a key/value group) is read by the columns of a few layers, the readers. Multiplying
their inputs masks the unit, whether the FFN before it is gated, plain or fused; with masks of numbers below 1 the same
numbers multiplied into the readers' columns give the same outputs without a mask.

The masks hold for one call of the model, inside `passing`. Where blocks are computed again in the backward pass, they
are an argument of the recomputation, never something that is remembered: see `pass_through_checkpoints`.

Shapes: B samples, U units, I input features of a reader.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.structured.groups import Group, Member

__all__ = ["UnitMasks", "columns_of_units", "reader_of"]

_RECOMPUTE = "_gradient_checkpointing_func"  # what blocks of Transformers call to be computed again


def columns_of_units(group: Group, width: int) -> list[Tensor]:
    """Return, for each reader of a group, the unit that each of its inputs belongs to; `num_units` where to none.

    Args:
        group: of units.
        width: input features, I; the same for all readers of the group.
    """
    found = []
    for member in group.readers:
        unit_I = torch.full((width,), group.num_units)
        for offset, size in member.runs:
            columns = torch.arange(group.num_units * size)
            unit_I[offset + columns] = columns // size
        found.append(unit_I)
    return found


def reader_of(model: nn.Module, member: Member) -> tuple[nn.Module, Tensor]:
    """Return the layer that reads units and its weight; below an adapter, which reads the same, that of its base."""
    reader = model.get_submodule(member.name.rpartition(".")[0])
    base = getattr(reader, "base_layer", reader)
    weight: Tensor = getattr(base, member.name.rpartition(".")[2])
    return reader, weight


class UnitMasks(nn.Module):
    """Holds the hooks that mask the units of a model, and the masks of the call that is running.

    Args:
        model: the model; its readers are found by the names that their weights have without adapters.
        groups: whose units are masked, in the order of the masks.

    Raises:
        ValueError: if a reader is no layer of its own, as a stack of experts.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self._masks: tuple[Tensor, ...] | None = None
        self._handles: list[RemovableHandle] = []
        self._recomputed: list[nn.Module] = []
        self._readers: list[tuple[str, int, str | None]] = []
        for number, group in enumerate(self.groups):
            _check_readers(group)
            for idx, member in enumerate(group.readers):
                unit_I = columns_of_units(group, reader_of(model, member)[1].shape[member.dim])[idx]
                is_plain = torch.equal(unit_I, torch.arange(group.num_units))
                column = None if is_plain else f"unit_{number}_{idx}"
                if column is not None:
                    self.register_buffer(column, unit_I, persistent=False)
                self._readers.append((member.name.rpartition(".")[0], number, column))

    def attach(self, model: nn.Module) -> None:
        """Hook the readers; outside of `passing` they compute what they always did."""
        for name, number, column in self._readers:
            reader = model.get_submodule(name)
            self._handles.append(reader.register_forward_pre_hook(_Masking(self, name, number, column)))
        self._recomputed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for block in self._recomputed:
            recompute = block.__dict__.get(_RECOMPUTE)
            if isinstance(recompute, _Passing):
                setattr(block, _RECOMPUTE, recompute.recompute)
        self._recomputed = []

    @contextmanager
    def passing(self, masks: Sequence[Tensor] | None) -> Iterator[None]:
        """Mask the calls inside: one mask per group, (B, U), or None for none."""
        before, self._masks = self._masks, None if masks is None else tuple(masks)
        try:
            yield
        finally:
            self._masks = before

    def pass_through_checkpoints(self) -> None:
        """Let blocks that are computed again be given the masks of their first computation, with their gradient."""
        for block in self._recomputed:
            recompute = block.__dict__.get(_RECOMPUTE)
            if recompute is not None and not isinstance(recompute, _Passing):
                setattr(block, _RECOMPUTE, _Passing(self, recompute))

    @property
    def masks(self) -> tuple[Tensor, ...] | None:
        """Return the masks of the call that is running."""
        return self._masks

    def masked(self, inputs: Tensor, number: int, column: str | None, name: str) -> Tensor:
        """Return what a reader reads, masked.

        Args:
            inputs: (B, ..., I), or (B * T, I) with the samples one after the other.
            number: of the group.
            column: name of the buffer with the unit of each input; None where they are the units in order.
            name: of the reader, for messages.

        Raises:
            RuntimeError: if it is computed again without its masks, or its rows are not those of the samples.
        """
        if self._masks is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    f"{name} is computed again in the backward pass, by other means than the model's own gradient "
                    "checkpointing, so its masks cannot be given again; use gradient_checkpointing_enable()"
                )
            return inputs
        mask_BU = self._masks[number]
        if column is not None:
            with_one = torch.cat((mask_BU, mask_BU.new_ones(len(mask_BU), 1)), dim=-1)
            mask_BU = with_one.index_select(-1, getattr(self, column))
        rows, num = inputs.numel() // inputs.shape[-1], len(mask_BU)
        if rows % num:
            raise RuntimeError(
                f"{name} reads {rows} rows for {num} samples, so they cannot be told apart; packed or padding-free "
                "batches cannot be conditioned: give one sample per row"
            )
        by_sample = inputs.reshape(num, rows // num, inputs.shape[-1])
        return (by_sample * mask_BU.to(inputs.dtype).unsqueeze(1)).reshape(inputs.shape)


class _Masking:
    """The hook of one reader."""

    def __init__(self, masks: UnitMasks, name: str, number: int, column: str | None) -> None:
        self.masks, self.name, self.number, self.column = masks, name, number, column

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.masks.masked(args[0], self.number, self.column, self.name), *args[1:])


class _Passing:
    """Computes a block now, and again in the backward pass, under the masks of the call that is running."""

    def __init__(self, masks: UnitMasks, recompute: Callable[..., Any]) -> None:
        self.masks, self.recompute = masks, recompute

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        masks = self.masks.masks
        if masks is None:
            return self.recompute(block, *args)

        def compute(*given: Any) -> Any:
            with self.masks.passing(given[: len(masks)]):
                return block(*given[len(masks) :])

        return self.recompute(compute, *masks, *args)


def _check_readers(group: Group) -> None:
    if any(member.expert is not None for member in group.readers):
        raise ValueError(
            f"the units of {group.key} lie in a stack of experts, where tokens of all samples meet and no mask of a "
            "sample can be told; condition a model without experts, or cut whole experts by structured/width"
        )
    if not group.readers:
        raise ValueError(f"no layer reads the units of {group.key}, so they cannot be masked by what is read")
