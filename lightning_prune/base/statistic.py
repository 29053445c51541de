"""The contract of the room `statistics/`.

It stands apart from the other contracts in `types.py` because torchmetrics takes seconds to import.
"""

from typing import ClassVar, Literal

from torch import Tensor
from torchmetrics import Metric

__all__ = ["Statistic"]


class Statistic(Metric):
    """A running quantity of one target.

    `source` says what feeds it: `input` gets the inputs of the target's layer (input_TI, one call per forward pass,
    or per sequence where `is_by_sequence`), `step` gets weight and gradient (shaped like the parameter, this process's
    rows) after every optimizer step.
    Input statistics are summed over the ranks when read; step statistics are the same on all ranks, or hold this
    process's rows.
    """

    source: ClassVar[Literal["input", "step"]]
    is_by_sequence: ClassVar[bool] = False
    full_state_update = False
    is_old: bool = False

    def restart(self) -> None:
        """Start anew with the next `feed`; what was seen until now holds until then."""
        self.is_old = self.update_called

    def feed(self, *values: Tensor) -> None:
        """Take in what `source` says."""
        if self.is_old:
            self.reset()
            self.is_old = False
        self.update(*values)
