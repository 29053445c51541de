"""The contract of what lets a model decide, input by input, which of its parts compute.

    ConditionMethod   options, as a recipe's section `condition` gives them
    Condition         the method at work in one model: what it added, what it counts, how it is taken off

What a condition learns and counts is registered in the model, as parameters and buffers, so that the checkpoints of
every trainer hold it and a resume is exact. It changes `forward` of modules, not their classes, so that the model
stays what it was to everybody else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from lightning_prune.structured.structure import Stack

__all__ = ["Condition", "ConditionMethod"]


class Condition(ABC):
    """A method at work in one model."""

    @abstractmethod
    def added(self) -> Mapping[str, nn.Module]:
        """Return the modules that were added, by their names in the model; all that is learned beside the model."""

    def begin(self, *, total_steps: int) -> None:  # noqa: B027  most have no ramp
        """Take in the length of the training, in optimizer steps; called before the first step and after a resume."""

    def after_step(self) -> None:  # noqa: B027
        """Move what is ramped by one optimizer step."""

    def loss(self) -> Tensor | None:
        """Return the term that the last training call adds to the loss, or None; it is added for the caller."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return what is logged of the last training call, by short names."""
        return {}

    @abstractmethod
    def remove(self) -> None:
        """Give the model back as it was before the method was inserted, but for the weights that were trained."""


class ConditionMethod(ABC):
    """Options of one way to decide per input; a frozen dataclass.

    `rate` is what the learning rate of the user's optimizer is multiplied by for all that is added; `is_exported` says
    whether the model can be written with it, as `export.format: conditional`; `is_trained` says whether it learns in a
    training, or is made once from texts by `lightning-prune oneshot`; `is_taught` says whether `recover.distill` can
    give the loss of that training.
    """

    rate: float = 1.0
    is_exported: ClassVar[bool] = False
    is_trained: ClassVar[bool] = True
    is_taught: ClassVar[bool] = False

    @abstractmethod
    def insert(self, model: nn.Module, stack: Stack) -> Condition:
        """Insert the method into a model in place, before its optimizers are made.

        Args:
            model: a Hugging Face decoder (or encoder), unwrapped.
            stack: its blocks; `lightning_prune.structured.discovery.stack.blocks_of` gives their modules.

        Returns:
            the method at work. At first the model computes what it did before, or nearly so.

        Raises:
            ValueError: if the model cannot hold it; nothing was changed then.
        """
