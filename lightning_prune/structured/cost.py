"""How far to cut for a budget: of parameters, of FLOPs, or of time measured on this machine.

Every group of the kinds to cut loses the same share of its units; the smallest share is searched that keeps the cost
within the budget.

Cost: parameters and FLOPs follow from shapes alone; time builds the smaller model and runs it, once per step of a
    bisection.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.structured.build import build_smaller
from lightning_prune.structured.cutting import cut_shape, removal_of, without_orphans
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.width.budgets import nearest

__all__ = ["Budget", "num_flops", "num_parameters", "sparsity_within"]

_NUM_RUNS = 7  # timed forward passes, of which the median counts
_GRID = 1000  # shares are searched in thousandths


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the smaller model may cost.

    Args:
        share: of the dense model's cost, in (0, 1).
        of: `parameters`, `flops` (of the matrix products for one token, attention scores left out) or `latency` (of a
            forward pass, measured).
    """

    share: float
    of: Literal["parameters", "flops", "latency"] = "parameters"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"a budget is a share of the dense model's cost in (0, 1), got {self.share}")
        if self.of not in (known := get_args(Budget.__annotations__["of"])):
            raise ValueError(f"a budget is one of {', '.join(known)}, got {self.of!r}")


def sparsity_within(
    model: nn.Module,
    structure: Structure,
    kinds: Sequence[str],
    budget: Budget,
    *,
    multiple_of: int = 1,
    inputs: Mapping[str, Tensor] | None = None,
) -> float:
    """Return the smallest sparsity, the same for all groups of these kinds, that keeps within a budget.

    Args:
        model: the dense model.
        structure: what can be cut from it.
        kinds: of the units to cut.
        budget: what the smaller model may cost.
        multiple_of: numbers of units that stay are multiples of it.
        inputs: what a timed forward pass reads; made up for models that read tokens or pixels.

    Raises:
        ValueError: if the kinds cannot be cut, or cutting them as far as possible does not keep within the budget.
    """
    groups = [group for kind in kinds for group in structure.of_kind(kind)]
    cost = _latency(model, structure, inputs) if budget.of == "latency" else _count(model, structure, budget.of)
    most = budget.share * cost(())
    low, high = 0, _GRID - 1
    last = _cuts(groups, high / _GRID, multiple_of)
    if cost(last) > most:
        raise ValueError(
            f"cutting {', '.join(kinds)} as far as possible leaves {cost(last) / cost(()):.3f} of the {budget.of}, "
            f"more than the budget of {budget.share}; cut more kinds, or remove layers"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if cost(_cuts(groups, middle / _GRID, multiple_of)) <= most:
            high = middle
        else:
            low = middle
    return high / _GRID


def num_parameters(model: nn.Module, structure: Structure, cuts: Sequence[Cut]) -> int:
    """Count the parameters of the smaller model, tied ones once."""
    shapes = _shapes_after(model, structure, cuts)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items() if _is_weight(tensor)}
    return sum(torch.Size(shapes[name]).numel() for name in names.values())


def num_flops(model: nn.Module, structure: Structure, cuts: Sequence[Cut]) -> int:
    """Count a multiplication and an addition for every weight of the smaller model's matrix products, per token.

    Of a mixture of experts all count, as if every token visited them all.
    """
    shapes = _shapes_after(model, structure, cuts)
    modules = dict(model.named_modules(remove_duplicate=False))
    return sum(
        2 * torch.Size(shapes[name]).numel()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if _is_weight(tensor) and tensor.ndim > 1 and not isinstance(modules[name.rpartition(".")[0]], nn.Embedding)
    )


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _shapes_after(model: nn.Module, structure: Structure, cuts: Sequence[Cut]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    removal = removal_of(structure.groups, without_orphans(structure.groups, cuts), shapes)
    return {name: cut_shape(name, shape, removal) for name, shape in shapes.items()}


def _cuts(groups: Sequence[Group], sparsity: float, multiple_of: int) -> tuple[Cut, ...]:
    """Return cuts of the right sizes; which units stay does not matter for the cost."""
    cuts = []
    for group in groups:
        number = max(nearest(group, sparsity, multiple_of), group.at_least(0))
        per_part = number // group.num_parts
        size = group.num_units // group.num_parts
        keep = tuple(part * size + unit for part in range(group.num_parts) for unit in range(per_part))
        cuts.append(Cut(group.key, keep))
    return tuple(cuts)


def _count(model: nn.Module, structure: Structure, of: str) -> Callable[[Sequence[Cut]], float]:
    count = num_parameters if of == "parameters" else num_flops
    return lambda cuts: float(count(model, structure, cuts))


def _latency(
    model: nn.Module, structure: Structure, inputs: Mapping[str, Tensor] | None
) -> Callable[[Sequence[Cut]], float]:
    """Return a function that times the forward pass of a smaller model; each shape is timed once."""
    inputs = probe_inputs(model) if inputs is None else inputs
    blueprint = Blueprint(model)
    known: dict[tuple[int, ...], float] = {}

    def cost(cuts: Sequence[Cut]) -> float:
        key = tuple(len(cut.keep) for cut in cuts)
        if key not in known:
            plan = Plan(cuts=tuple(cuts))
            small = build_smaller(model, structure, plan, share=True, blueprint=blueprint) if cuts else model
            known[key] = _median_seconds(small, inputs)
        return known[key]

    return cost


def _median_seconds(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    taken = []
    for _ in range(_NUM_RUNS + 1):
        start = time.perf_counter()
        outputs(model, inputs).sum().item()  # waits for an accelerator
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
