"""The contract of the room `statistics/`.

It stands apart from the other contracts in `types.py` because torchmetrics takes seconds to import.
"""

from typing import ClassVar, Literal

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
