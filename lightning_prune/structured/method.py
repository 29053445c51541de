"""The contract of what makes a model smaller at once: a set of options with one function that makes a plan."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_prune.structured.groups import Plan
from lightning_prune.structured.structure import Structure

__all__ = ["Batch", "StateFile", "StructuredMethod"]

Batch = Mapping[str, Tensor]
StateFile = str | os.PathLike[str] | None


class StructuredMethod(ABC):
    """Options of a method that chooses what is cut from a model; a frozen dataclass.

    `needs_batches` says whether it looks at calibration data, `repairs` whether it changes weights that stay, so that
    its plan alone does not bring its result back.
    """

    @property
    def needs_batches(self) -> bool:
        """Return whether `plan` looks at the batches."""
        return True

    @property
    def repairs(self) -> bool:
        """Return whether `plan` changes weights that stay."""
        return False

    @abstractmethod
    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose what stays.

        Args:
            model: whole tensors, unwrapped; shapes stay, weights may be repaired in place.
            structure: what can be cut from it.
            batches: calibration data, each one call of the model with its entries as keyword arguments: `input_ids`,
                and `attention_mask` and `labels` where needed.
            state_file: where a search keeps its finished scores and finds those of an interrupted one.
            progress: whether to show bars.

        Raises:
            ValueError: if the options ask for more than the model has, or a state file is given to a method that
                does not search.
        """
