"""How many units of each group stay, and which.

`uniform` takes the same share of every group, so that the smaller model is of a stock shape; `by_rank` ranks the units
of all groups together; `chosen` picks the best units of one group. All keep equally many units in every part of a
group (query heads per key/value group) and whole multiples where asked for.

Source: the global ranking of standardized scores is FLAP's AL-AM, arXiv 2312.11983, section 3.3, within one kind of
    unit. Difference: every group keeps at least one step.

Shapes: U units.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.granularity import num_kept
from lightning_prune.structured.groups import Group

__all__ = ["by_rank", "chosen", "nearest", "step_of", "uniform"]


def step_of(group: Group, multiple_of: int) -> int:
    """Return the number of units that stay or go together: a multiple of the group's own step and of `multiple_of`.

    Raises:
        ValueError: if the group does not have as many.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}; kernels like 8, 16 or 64")
    step = math.lcm(group.step, multiple_of)
    if step > group.num_units:
        raise ValueError(
            f"{group.key} has {group.num_units} units in {group.num_parts} parts, so no multiple of {multiple_of} can "
            f"stay; choose multiple_of at most {group.num_units // group.num_parts}"
        )
    return step


def uniform(group: Group, sparsity: float, multiple_of: int = 1) -> int:
    """Return how many units of a group stay at a sparsity: the nearest multiple that leaves something.

    With `multiple_of=1`, floor(sparsity * units of a part) go from every part. A group that is not a whole number of
    multiples wide may stay whole.

    Raises:
        ValueError: if the sparsity would leave nothing or fewer units than the model needs, or the multiple does not
            fit the group.
    """
    number = nearest(group, sparsity, multiple_of)
    group.check_number(number)
    return number


def nearest(group: Group, sparsity: float, multiple_of: int = 1) -> int:
    """Return the same where the model need not run with so few units.

    Raises:
        ValueError: if the sparsity would leave nothing, or the multiple does not fit the group.
    """
    _check_sparsity(group.key, sparsity)
    step = step_of(group, multiple_of)
    if step == group.num_parts:
        return num_kept(sparsity, group.num_units // group.num_parts) * group.num_parts
    wanted = group.num_units * (1 - sparsity)
    counts = {*range(step, group.num_units + 1, step)} | ({group.num_units} if sparsity == 0 else set())
    return min(counts, key=lambda count: (abs(count - wanted), -count))


def by_rank(
    groups: Sequence[Group], scores: Mapping[str, Tensor], sparsity: float, multiple_of: int = 1
) -> dict[str, int]:
    """Return how many units of each group stay when all are ranked together.

    Units compete in steps: as many as make a multiple and keep the parts equal, scored by their mean; every group
    keeps its best step.

    Args:
        groups: of one kind.
        scores: `Group.key` -> score_U, made comparable over groups (see `unit_scores.standardize`).
        sparsity: share of all units that go, in [0, 1).
        multiple_of: each group keeps a multiple of it.

    Raises:
        ValueError: if the sparsity would empty a group.
    """
    _check_sparsity(", ".join(group.key for group in groups), sparsity)
    steps = {group.key: step_of(group, multiple_of) for group in groups}
    kept = {group.key: _lowest(group, steps[group.key]) for group in groups}
    total = num_kept(sparsity, sum(group.num_units for group in groups))
    spare = total - sum(kept.values())
    if spare < 0:
        fullest = max(groups, key=lambda group: kept[group.key])
        raise ValueError(
            f"sparsity {sparsity} over {len(groups)} groups keeps {total} units, fewer than the one step that each "
            f"group needs ({kept[fullest.key]} of {fullest.key}); "
            "lower the sparsity or multiple_of, or remove whole blocks"
        )
    rungs = [
        (-score, index, place, group.key)
        for index, group in enumerate(groups)
        for place, score in enumerate(
            _ladder(group, scores[group.key], steps[group.key])[kept[group.key] // steps[group.key] :]
        )
    ]
    for _, _, _, key in sorted(rungs):
        if steps[key] <= spare:
            kept[key] += steps[key]
            spare -= steps[key]
    return kept


def _lowest(group: Group, step: int) -> int:
    """Return the fewest units that may stay, in whole steps."""
    return -(-group.at_least(step) // step) * step


def chosen(group: Group, score_U: Tensor, num_keep: int) -> tuple[int, ...]:
    """Return the units with the highest scores, equally many from every part; ties go to the lower number.

    Raises:
        ValueError: if scores are missing or not finite, or so many cannot stay.
    """
    if score_U.shape != (group.num_units,) or not bool(torch.isfinite(score_U).all()):
        raise ValueError(
            f"{group.key} needs {group.num_units} finite scores, got {tuple(score_U.shape)} with "
            f"{int((~torch.isfinite(score_U)).sum())} that are NaN or infinite; check the model and the batches"
        )
    if num_keep % group.num_parts:
        raise ValueError(f"{group.key} keeps {num_keep} units, which its {group.num_parts} parts cannot share equally")
    order_PU = score_U.reshape(group.num_parts, -1).argsort(dim=1, descending=True, stable=True)
    size = group.num_units // group.num_parts
    first = torch.arange(group.num_parts, device=score_U.device)[:, None] * size
    keep = (order_PU[:, : num_keep // group.num_parts] + first).flatten().sort().values.tolist()
    group.check_keep(keep)
    return tuple(keep)


def _ladder(group: Group, score_U: Tensor, step: int) -> list[float]:
    """Return the mean scores of the steps in which units are added, best first; a last incomplete step is left out."""
    best_first = score_U.double().reshape(group.num_parts, -1).sort(dim=1, descending=True).values
    per_part = step // group.num_parts
    num_steps = best_first.shape[1] // per_part
    steps = best_first[:, : num_steps * per_part].reshape(group.num_parts, num_steps, per_part)
    means: list[float] = steps.mean((0, 2)).tolist()
    return means


def _check_sparsity(key: str, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity must be in [0, 1), got {sparsity} for {key}; to remove all of it, skip the sub-block"
        )
