"""Give what was added to a model a learning rate of its own, in the optimizer and the schedule the user has.

Parameters that the optimizer holds already move from their group into a copy of it with the rate multiplied, so that
weight decay and all else stay; parameters it does not hold join a copy of its first group. Schedules get entries for
the new groups. It must happen before a checkpoint is restored, whose optimizer has these groups.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["take_in"]

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr")  # entries of a group that are learning rates
_LISTS_OF_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")  # of a schedule, one entry per group
_LISTS = (*_LISTS_OF_RATES, "lr_lambdas", "base_momentums", "max_momentums")
_MARK = "condition_rate"  # in a group that was made here, which is not to be made again


def take_in(
    optimizers: Iterable[Optimizer], schedules: Iterable[Any], parameters: Sequence[nn.Parameter], *, rate: float
) -> None:
    """Let optimizers step parameters at a multiple of their rate; those of several stay with the one that holds them.

    Args:
        optimizers: the user's, unwrapped; changed.
        schedules: over them; changed.
        parameters: what was added.
        rate: multiplies the learning rate.

    Raises:
        ValueError: if none of several optimizers holds them.
    """
    optimizers, wanted = list(optimizers), {id(parameter) for parameter in parameters}
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [parameter for parameter in parameters if id(parameter) not in held]
    if missing and len(optimizers) != 1:
        raise ValueError(
            f"the training has {len(optimizers)} optimizers and none of them holds the {len(missing)} parameters that "
            "the condition added; hand model.parameters() to one of them, made after the callback's setup"
        )
    for optimizer in optimizers:
        sources = []
        for number, group in enumerate(list(optimizer.param_groups)):
            moved = [] if _MARK in group else [p for p in group["params"] if id(p) in wanted]
            moved += missing if number == 0 else []
            if not moved:
                continue
            group["params"] = [p for p in group["params"] if id(p) not in wanted]
            is_rate = {name: name in _RATES and value is not None for name, value in group.items()}
            rest = {name: value * rate if is_rate[name] else value for name, value in group.items()}
            optimizer.add_param_group(rest | {"params": moved, _MARK: rate})
            sources.append(number)
        for schedule in schedules:
            _extend(schedule, optimizer, sources, rate)


def _extend(schedule: Any, optimizer: Optimizer, sources: Sequence[int], rate: float) -> None:
    """Give a schedule, and the schedules inside it, entries for groups that are copies of others."""
    for inner in getattr(schedule, "_schedulers", ()):
        _extend(inner, optimizer, sources, rate)
    if getattr(schedule, "optimizer", optimizer) is not optimizer:
        return
    before = len(optimizer.param_groups) - len(sources)
    for name, values in vars(schedule).items():
        if name in _LISTS and isinstance(values, list) and len(values) == before:
            factor = rate if name in _LISTS_OF_RATES else None
            values.extend([values[number] if factor is None else values[number] * factor for number in sources])
