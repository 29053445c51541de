"""Say what will be pruned before anything is changed: how much, when, and what is left out."""

import logging
from collections import Counter
from collections.abc import Iterator

from torch import nn

from lightning_prune.base import distributed
from lightning_prune.base.types import Schedule
from lightning_prune.schedules import Existing
from lightning_prune.targets.choice import adapted
from lightning_prune.targets.targets import Selection

__all__ = ["announce", "start_line", "summary"]

logger = logging.getLogger(__name__)


def start_line(model: nn.Module, selection: Selection, schedule: Schedule, total_steps: int | None = None) -> str:
    """Return one sentence on what will be pruned.

    Args:
        model: what holds the targets, for their share of it.
        selection: the targets, and what is left out.
        schedule: says how far, and when.
        total_steps: optimizer steps of the training; None if all is pruned at once.
    """
    return f"{_what(schedule, total_steps, selection)} {summary(model, selection)}"


def summary(model: nn.Module, selection: Selection) -> str:
    """Return how much the targets are, and how much of each kind is left out, as the end of a sentence."""
    num_pruned = sum(binding.parameter.numel() for binding in selection.targets)
    total = sum(parameter.numel() for parameter in model.parameters())
    size = f"{len(selection.targets)} weights of {_count(num_pruned)} parameters, {num_pruned / total:.1%} of the model"
    left_out = Counter(one.reason for one in selection.left_out)
    first = {one.reason: one.name for one in reversed(selection.left_out)}
    rest = ", ".join(f"{number} x {reason} ({first[reason]})" for reason, number in left_out.items())
    remarks = "".join(f"; {remark}" for remark in _remarks(model, selection))
    return f"{size}{remarks}" + (f"; left out: {rest}" if rest else "")


def _remarks(model: nn.Module, selection: Selection) -> Iterator[str]:
    covered = adapted(model)
    frozen = [
        binding.name
        for binding in selection.targets
        if not binding.parameter.requires_grad and not any(id(module) in covered for module in binding.modules)
    ]
    if frozen and len(frozen) < len(selection.targets):
        yield f"{len(frozen)} of them are frozen ({frozen[0]})"
    elif frozen:
        yield "all of them are frozen"
    growing = [b.name for b in selection.targets if b.source is not None and b.source.gain is None]
    if growing:
        yield f"kept weights grow under the spectral norm of {len(growing)} of them ({growing[0]})"


def _what(schedule: Schedule, total_steps: int | None, selection: Selection) -> str:
    if isinstance(schedule, Existing):
        weights = (distributed.local(binding.parameter.detach()) for binding in selection.targets)
        is_sparse = any(bool((weight == 0).any()) for weight in weights)
        return "holding the zeros of" if is_sparse else "pruning nothing, and no zeros to hold, in"
    if total_steps is None:
        return f"pruning {schedule.sparsity:.4g} at once of"
    start, end, interval = schedule.resolve(total_steps)
    when = f"at step {start}" if start == end else f"from step {start} to step {end}, every {interval},"
    return f"pruning {schedule.sparsity:.4g} {when} of {total_steps} of"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def announce(sentence: str) -> None:
    """Log a sentence on the first rank; write it to the terminal if nobody has set up logging for this library."""
    distributed.log(logger, logging.INFO, "%s", sentence)
    is_set_up = logging.getLogger("lightning_prune").level != logging.NOTSET
    is_shown = logger.hasHandlers() and logger.isEnabledFor(logging.INFO)
    if distributed.is_first_rank() and not is_set_up and not is_shown:
        record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, sentence, (), None)
        logging.StreamHandler().handle(record)
