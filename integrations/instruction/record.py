"""What a conditioned training has shown of its masks, kept for its report and for a resume, as plain values.

Shapes: B instructions, T tokens, U units of a group.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.names import shorten
from lightning_prune.conditional.instruction import NAME, InstructionCondition
from lightning_prune.conditional.method import Condition
from lightning_prune.integrations.instruction.first_token import first_token
from lightning_prune.predictors.collapse import Conditioning, overlaps
from lightning_prune.structured.groups import Group

__all__ = ["ConditionRecord", "joined", "num_activated"]

logger = logging.getLogger(__name__)
_NUM_CHARACTERS = 100  # of an instruction that the report names
_PLAIN = ("measurements", "instructions", "between", "usage", "first_token")


class ConditionRecord:
    """The measurements of one training by step, and what the last of them chose."""

    def __init__(self) -> None:
        self.measurements: list[dict[str, Any]] = []
        self.instructions: list[str] = []
        self.between: list[list[float]] = []
        self.usage: list[dict[str, int]] = []  # of each group: units in every choice, and in any
        self.first_token: dict[str, Any] = {}

    @property
    def last_step(self) -> int:
        """Return the step of the last measurement; -1 before the first."""
        return int(self.measurements[-1]["step"]) if self.measurements else -1

    def add(self, step: int, found: Conditioning, texts: Sequence[str]) -> None:
        """Take in a measurement, in place of those of this step and later ones.

        Args:
            step: optimizer steps taken.
            found: what was measured.
            texts: the instructions, in the order of its choices.
        """
        entry: dict[str, Any] = {"step": step, **found.metrics(), "by_group": list(found.by_group)}
        if "own_loss" in entry and "swap_cost" in entry:
            entry["swapped_loss"] = entry["own_loss"] + entry["swap_cost"]
        self.measurements = [*(one for one in self.measurements if one["step"] < step), entry]
        self.instructions = [shorten(" ".join(text.split()), _NUM_CHARACTERS) for text in texts]
        self.between = overlaps(found.choices)
        self.usage = [
            {"always": int(chosen_BU.all(0).sum()), "ever": int(chosen_BU.any(0).sum())} for chosen_BU in found.choices
        ]

    def serve(self, condition: InstructionCondition, ids_1T: Tensor) -> None:
        """Serve one prompt as a user would, and keep what it took; where that cannot be done, keep why."""
        try:
            self.first_token = first_token(condition, ids_1T)
        except (ValueError, RuntimeError) as error:
            self.first_token = {"note": str(error).partition("\n")[0]}
            distributed.log(logger, logging.WARNING, "serving was not timed: %s", error)
            return
        parts = [1e3 * self.first_token[part] for part in ("predicting", "gathering", "prefill", "whole_prefill")]
        said = "served: first token after %.3g ms (predicting %.3g, gathering %.3g, prefill %.3g); all units %.3g ms"
        distributed.log(logger, logging.INFO, said, sum(parts[:3]), *parts)

    def as_dict(self, condition: Condition) -> dict[str, Any]:
        """Return what the report shows of a condition."""
        added = sum(p.numel() for one in condition.added().values() for p in one.parameters())
        found: dict[str, Any] = {"num_added": added, "measurements": self.measurements}
        if not isinstance(condition, InstructionCondition):
            return found
        groups, keep = condition.predictor.units.groups, condition.predictor.keep
        usage = self.usage or [{}] * len(groups)
        found["groups"] = [
            {"name": group.name, "num_units": group.num_units, "keep": k, **used}
            for group, k, used in zip(groups, keep, usage, strict=True)
        ]
        found["num_parameters"] = num_activated(condition.model, groups, [group.num_units for group in groups])
        found["num_activated"] = num_activated(condition.model, groups, keep)
        found |= {"instructions": self.instructions, "between": self.between}
        return found | ({"first_token": self.first_token} if self.first_token else {})

    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        return {name: getattr(self, name) for name in _PLAIN}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        for name in _PLAIN:
            setattr(self, name, state[name])


def num_activated(model: nn.Module, groups: Sequence[Group], keep: Sequence[int]) -> int:
    """Return how many parameters of a model compute where each group keeps so many units; the predictor's do not count.

    Args:
        model: the parent.
        groups: of units.
        keep: how many of each group stay.
    """
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if not name.startswith(f"{NAME}.")}
    for group, k in zip(groups, keep, strict=True):
        for member in group.members:
            if member.name in shapes:
                shapes[member.name][member.dim] -= (group.num_units - k) * sum(size for _, size in member.runs)
    return sum(math.prod(shape) for shape in shapes.values())


def joined(batches: list[dict[str, Tensor]], num_sequences: int) -> dict[str, Tensor]:
    """Return rows of several batches as one, padded on the right to one length with what is left out."""
    names = ("input_ids", "attention_mask", "labels")
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    length = max(batch["input_ids"].shape[1] for batch in batches)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches:
        given = {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"], **batch}
        for name in names:
            more = length - given[name].shape[1]
            parts[name].append(nn.functional.pad(given[name], (0, more), value=filling[name]))
    every = max(1, sum(len(part) for part in parts["input_ids"]) // num_sequences)
    return {name: torch.cat(part)[::every][:num_sequences] for name, part in parts.items()}
