"""Shrink a model step by step while it trains, so that the training itself gets cheaper.

At every milestone of a schedule the units that matter least are cut out of the tensors, see `in_place`. The sparsity of
the schedule counts the units of the model that the training started from; the configuration remembers their number in
`cut_from`, so that a checkpoint of a smaller model goes on where it stopped.

Source: shrinking along the data stream is EfficientLLM's idea, arXiv 2502.06663; pruning whole feed-forward
    units by smoothed sensitivity under one learning-rate curve is that of IDEA Prune, arXiv 2503.05920. Ours: the
    average is the root of the mean square that Adam keeps of each gradient, so that it costs no memory and comes back
    with the optimizer.
Cost: per milestone one discovery and, for a moment, a second copy of the smaller model.
Limits: see `in_place`.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.types import Schedule
from lightning_prune.calibration import hooks
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Group, Kind, Plan
from lightning_prune.structured.in_place import cut_in_place
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.undo import undone_on_error
from lightning_prune.structured.width.budgets import chosen, step_of, uniform
from lightning_prune.structured.width.unit_scores import Reduction, scored_members, unit_scores

__all__ = ["GradualShrink", "fit_to_shapes"]

logger = logging.getLogger(__name__)

Score = Literal["magnitude", "sensitivity"]


@dataclass(frozen=True, kw_only=True)
class GradualShrink:
    """Options.

    Args:
        schedule: when units go, and what share of the first model's units is gone then.
        kind: which units.
        multiple_of: the number that stays is a multiple of it.
        score: what is added up over all weights of a unit: `magnitude`, or `sensitivity`, the magnitude times the root
            of the mean square that the optimizer keeps of the gradient (Adam and its relatives).

    Raises:
        ValueError: if the score is unknown.
    """

    schedule: Schedule
    kind: Kind = "ffn"
    multiple_of: int = 1
    score: Score = "magnitude"

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}")

    def check(self, model: nn.Module, *, total_steps: int) -> None:
        """Check, before any training time is spent, that the model can be shrunk so.

        Raises:
            ValueError: if the schedule does not fit the training, or these units cannot be cut or not so far.
        """
        self.schedule.resolve(total_steps)
        groups = discover(model).of_kind(self.kind)
        _counted(groups)
        left = [uniform(group, self.schedule.sparsity, self.multiple_of) for group in groups]
        if all(number == group.num_units for number, group in zip(left, groups, strict=True)):
            step = step_of(groups[0], self.multiple_of)
            raise ValueError(
                f"sparsity {self.schedule.sparsity} of {self.kind} removes nothing: the {groups[0].num_units} units of "
                f"{groups[0].key} go in steps of {step}; give at least {step / groups[0].num_units:.4g}"
            )

    def after_step(
        self,
        model: nn.Module,
        optimizers: Iterable[object],
        *,
        step: int,
        total_steps: int,
        wrapper: nn.Module | None = None,
    ) -> bool:
        """Cut the model if the schedule says so after `step` optimizer steps; return whether it did.

        Under several processes every rank calls it.

        Raises:
            ValueError: if the model or the optimizers' state cannot be cut, or no optimizer keeps what the score needs;
                the latter is known after the first step.
        """
        stepped = list(optimizers)
        inner = [hooks.unwrap_optimizer(optimizer) for optimizer in stepped]
        # before the first step, or where a scaler skipped it, there is no state
        if self.score == "sensitivity" and step == 1 and any(one.state for one in inner):
            self._scores(model, discover(model).of_kind(self.kind), inner)
        if not self.schedule.is_due(step, total_steps):
            return False
        sparsity = self.schedule.sparsity_at(step, total_steps)
        structure = discover(model)
        plan = self._plan(model, structure, sparsity, inner)
        if plan is None:
            return False
        config: Any = model.config
        first = _counted(structure.of_kind(self.kind)) | dict(getattr(config, "cut_from", None) or {})
        with undone_on_error(model if wrapper is None else wrapper, inner):
            cut_in_place(model, plan, stepped, wrapper=wrapper, structure=structure)
            config = model.config
            config.cut_from = first
        distributed.log(logger, logging.INFO, "step %d: cut %s, %.4g of %s are gone", step, self.kind, sparsity, first)
        return True

    @torch.no_grad()
    def _plan(
        self, model: nn.Module, structure: Structure, sparsity: float, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Plan | None:
        first: Mapping[str, int] = getattr(model.config, "cut_from", None) or {}
        due = []
        for group in structure.of_kind(self.kind):
            keep = self._num_keep(group, first, sparsity)
            due += [(group, keep)] if keep < group.num_units else []
        scores = self._scores(model, [group for group, _ in due], optimizers)
        cuts = []
        for group, keep in due:
            score_U = unit_scores(group, scores, Reduction(members="all"))
            cuts.append(Cut(group.key, chosen(group, score_U, keep)))
        method = {"name": type(self).__name__, "sparsity": sparsity, "score": self.score}
        return Plan(cuts=tuple(cuts), method=method) if cuts else None

    @torch.no_grad()
    def _scores(
        self, model: nn.Module, groups: Sequence[Group], optimizers: Sequence[torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        """Return name of a parameter -> scores of its weights, for all that the units are scored by.

        Raises:
            ValueError: if no optimizer keeps the mean square of a gradient that the score needs.
        """
        tensors = model.state_dict(keep_vars=True)
        names = dict.fromkeys(member.name for group in groups for member in scored_members(group, "all"))
        if self.score == "magnitude":
            return {name: tensors[name].detach().abs() for name in names}
        squares = {id(param): state.get("exp_avg_sq") for one in optimizers for param, state in one.state.items()}
        scores = {}
        for name in names:
            square = squares.get(id(tensors[name]))
            if square is None or square.shape != tensors[name].shape:
                kinds = ", ".join(type(one).__name__ for one in optimizers) or "no optimizer"
                raise ValueError(
                    f"score 'sensitivity' reads the mean square of the gradient of {name}, which {kinds} does not keep "
                    "as exp_avg_sq in the shape of the weight; train it with AdamW, or choose score 'magnitude'"
                )
            scores[name] = tensors[name].detach().abs() * square.sqrt()
        return scores

    def _num_keep(self, group: Group, first: Mapping[str, int], sparsity: float) -> int:
        """Return how many units stay: a share of those that the first model had."""
        name, per_unit = next(iter(group.fields.items()))
        num_first = group.num_units if name not in first else first[name] // per_unit
        whole = dataclasses.replace(group, num_units=num_first)
        return min(group.num_units, uniform(whole, sparsity, self.multiple_of))


def fit_to_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], kind: Kind) -> None:
    """Cut a model to the shapes of a checkpoint, so that its weights can be loaded; which units stay does not matter.

    Args:
        model: the full-size model.
        shapes: of the checkpoint's tensors, under the model's names.
        kind: the units that were cut.

    Raises:
        ValueError: if cutting these units does not give these shapes.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    if all(shapes.get(name, shape) == shape for name, shape in own.items()):
        return
    cuts = []
    groups = discover(model).of_kind(kind)
    for group in groups:
        member = group.members[0]
        per_unit = sum(size for _, size in member.runs)
        lost = own[member.name][member.dim] - shapes[member.name][member.dim]
        size = (group.num_units - lost // per_unit) // group.num_parts
        step = group.num_units // group.num_parts
        keep = tuple(part * step + unit for part in range(group.num_parts) for unit in range(size))
        cuts.append(Cut(group.key, keep))
    with undone_on_error(model):
        cut_in_place(model, Plan(cuts=tuple(cuts)))
        config: Any = model.config
        config.cut_from = _counted(groups)
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        odd = [name for name, shape in own.items() if shapes.get(name, shape) != shape]
        if odd:
            raise ValueError(
                f"the checkpoint has {odd[0]} of shape {shapes[odd[0]]}, which cutting {kind} does not give"
            )


def _counted(groups: Sequence[Group]) -> dict[str, int]:
    """Return configuration field -> what it counts; a field may be unset, or hold a number per block.

    Raises:
        ValueError: if blocks differ, so that one number does not say what the model was cut from.
    """
    result: dict[str, int] = {}
    for group in groups:
        for name, per_unit in group.fields.items():
            if result.setdefault(name, group.num_units * per_unit) != group.num_units * per_unit:
                raise ValueError(f"{name} differs between blocks; gradual shrinking needs blocks of equal width")
    return result
