"""See how routers choose experts: how many for a token, in which groups, and which.

Nothing goes by the names of classes: what a router calls `topk` on, while the module that holds the experts runs, says
it. Fields of the configuration are looked up only to name them, and where a router chooses in a way of its own.

Shapes: E experts, G groups of experts, K chosen ones.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.structured.discovery.blueprint import Path
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.groups import Group

__all__ = ["Pick", "watching_picks", "with_routing"]

_CHOOSING = ("per_tok", "top_k", "topk", "selected_experts")


@dataclass(frozen=True)
class Pick:
    """One call of `topk`: of a tensor of this shape along its last dimension, the indices that were chosen."""

    shape: tuple[int, ...]
    number: int
    indices: Tensor


class _Watching(TorchFunctionMode):
    """Hands every choice along the last dimension to whoever listens."""

    def __init__(self, listen: Callable[[Pick], None]) -> None:
        super().__init__()
        self.listen = listen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute, and tell what was chosen."""
        output = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            given, indices = args[0], output[1]
            if indices.shape[:-1] == given.shape[:-1]:
                self.listen(Pick(tuple(given.shape), indices.shape[-1], indices.detach()))
        return output


@contextmanager
def watching_picks(model: nn.Module, groups: Sequence[Group]) -> Iterator[dict[str, list[Pick]]]:
    """Collect what is chosen while the modules of expert groups run: `Group.key` -> the choices in order."""
    found: dict[str, list[Pick]] = {group.key: [] for group in groups}
    running: list[str] = []
    handles = []

    def leave(module: nn.Module, args: object, output: object) -> None:
        running.pop()

    def enter(key: str) -> Callable[[nn.Module, object], None]:
        return lambda module, args: running.append(key)

    try:
        for group in groups:
            module = model.get_submodule(group.name)
            handles.append(module.register_forward_pre_hook(enter(group.key)))
            handles.append(module.register_forward_hook(leave))
        with _Watching(lambda pick: found[running[-1]].append(pick) if running else None):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def with_routing(
    model: nn.Module, groups: Sequence[Group], inputs: Mapping[str, Tensor], fields: Mapping[Path, Any]
) -> list[Group]:
    """Return groups of experts that know how few of them the router can choose from.

    Args:
        model: in any mode; unchanged.
        groups: of whole experts.
        inputs: a small batch of keyword arguments of its forward.
        fields: of the configuration, to name what asks for so many.
    """
    with watching_picks(model, groups) as picks:
        outputs(model, inputs)
    return [_limited(group, picks[group.key], fields) for group in groups]


def _limited(group: Group, picks: Sequence[Pick], fields: Mapping[Path, Any]) -> Group:
    """Return a group with the number of its experts that must stay, and the parts that must stay equal."""
    total = group.num_units
    number = max((p.number for p in picks if p.shape[-1] == total), default=0) or _declared(group, fields)
    reason = f"its router sends every token to {number} of them ({_named(group, fields, number, in_groups=False)})"
    inner = [p for p in picks if len(p.shape) > 2 and p.shape[-2] * p.shape[-1] == total]
    outer = [p for p in picks if p not in inner and 1 < p.shape[-1] < total and total % p.shape[-1] == 0]
    if not outer:
        return dataclasses.replace(group, min_units=number, min_reason=reason)
    num_parts, num_chosen = outer[0].shape[-1], outer[0].number
    per_part = max([-(-number // num_chosen), *(p.number for p in inner if p.shape[-2] == num_parts)])
    names = (_named(group, fields, size, in_groups=True) for size in (num_parts, num_chosen))
    reason += f" from {num_chosen} of {num_parts} equal groups ({', '.join(names)}), so each needs {per_part}"
    return dataclasses.replace(group, num_parts=num_parts, min_units=per_part * num_parts, min_reason=reason)


def _declared(group: Group, fields: Mapping[Path, Any]) -> int:
    """Return the largest number that fields beside the one that counts the experts give for the chosen ones."""
    values = [value for path, value in fields.items() if _is_choice(path[-1]) and _is_count(value, group)]
    return max(values, default=1)


def _named(group: Group, fields: Mapping[Path, Any], number: int, *, in_groups: bool) -> str:
    """Return the field that says so many, with its value; a description if there is none."""
    for path, value in fields.items():
        is_meant = "group" in path[-1] if in_groups else _is_choice(path[-1])
        if is_meant and value == number and _is_count(value, group):
            return f"{'.'.join(path)}={value}"
    return f"{number} of them" if in_groups else "a number of the class itself"


def _is_choice(field: str) -> bool:
    return any(word in field for word in _CHOOSING) and "group" not in field


def _is_count(value: object, group: Group) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= group.num_units
