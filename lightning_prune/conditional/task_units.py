"""Give each named task FFN units of its own, chosen from the task's texts; nothing is trained.

The cheap sibling of `Instruction`: no predictor reads an instruction, so a task is chosen by its name.

Source: Sun et al., Wanda, arXiv 2306.11695, per unit, and a mask for each task in place of one for all.
Cost: one forward pass over the texts of each task.
Limits: no units of experts; inputs of no known task are not served.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_prune.conditional.instruction import Instruction, InstructionCondition, Predictor
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.structured.structure import Stack

__all__ = ["TaskUnits"]


@dataclass(frozen=True, kw_only=True)
class TaskUnits(ConditionMethod):
    """Options of units per task.

    Args:
        budget: how many units compute; with `keep_from`, a share of that range can be chosen when a task is served.
    """

    is_exported: ClassVar[bool] = True
    is_trained: ClassVar[bool] = False

    budget: Budget

    def insert(self, model: nn.Module, stack: Stack) -> InstructionCondition:
        """Put masks on the model's units; the predictor beside them is as small as can be, and never trained."""
        options = Instruction(
            budget=self.budget, predictor=Predictor(hidden=1), choice=SoftTopK(hard=True), start=None, guard=None
        )
        return options.insert(model, stack)
