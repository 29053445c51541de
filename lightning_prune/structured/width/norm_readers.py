"""Find which norm over the residual stream feeds which weights, by comparing the tensors that flow.

A norm feeds a weight if the weight's module is called with the very numbers the norm gave. Nothing goes by names, so
fused projections, parallel blocks, routers and stacked experts need no table.

Cost: one forward pass over a few tokens.
Limits: what the probe does not reach is refused rather than guessed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.groups import Group

__all__ = ["norm_of_readers"]


def norm_of_readers(model: nn.Module, group: Group, inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Return reader -> the norm it reads; weights that read the stream itself are left out.

    Args:
        model: in any mode; unchanged.
        group: its residual channels.
        inputs: a small batch of keyword arguments of its forward.

    Raises:
        ValueError: if a norm feeds no weight (it lies behind a writer, inside the residual branch), a weight reads
            several norms, or the batch does not reach a weight.
    """
    norms = [member.name for member in group.members if member.role == "norm"]
    reached = _flow(model, norms, [member.name for member in group.readers], inputs)
    result: dict[str, str] = {}
    for reader in group.readers:
        if reader.name not in reached:
            raise ValueError(f"{reader.name} is not reached by the probe; pass `inputs`, a batch that reaches it")
        found = reached[reader.name]
        if len(found) > 1:
            several = " and ".join(sorted(str(norm or "something else") for norm in found))
            raise ValueError(f"{reader.name} reads {several}; it must read one norm alone")
        result.update((reader.name, norm) for norm in found if norm is not None)
    for norm in norms:
        if norm not in result.values():
            raise ValueError(
                f"{norm} feeds no weight that could take its own weight up: it lies behind a writer, inside the "
                "residual branch (as in Gemma 2 and OLMo 2), and does not commute with a rotation; select channels "
                "instead, or cut heads and FFN units"
            )
    return result


def _flow(
    model: nn.Module, norms: list[str], readers: list[str], inputs: Mapping[str, Tensor]
) -> dict[str, set[str | None]]:
    """Return reader -> the norms whose output it was called with; None stands for something else."""
    given: list[tuple[str, Tensor]] = []
    reached: dict[str, set[str | None]] = {}

    def after_norm(name: str) -> Any:
        return lambda module, args, output: given.append((name, output.detach().flatten()))

    def before_reader(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value.detach().flatten() for value in _tensors((*args, *kwargs.values()))]
            equal = (norm for norm, output in reversed(given) if any(_is_same(output, value) for value in tensors))
            reached.setdefault(name, set()).add(next(equal, None))

        return hook

    handles = [_owner(model, name).register_forward_hook(after_norm(name)) for name in norms]
    handles += [
        _owner(model, name).register_forward_pre_hook(before_reader(name), with_kwargs=True) for name in readers
    ]
    try:
        outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    yield from (value for value in values if isinstance(value, Tensor))


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
