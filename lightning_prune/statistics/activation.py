"""How active every input feature of a layer is: the mean of |x| over a sequence, the L2 norm of that over sequences.

Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation (Minitron), arXiv
    2407.14679, section 2.2, the pair (batch = L2, seq = mean), which is the best of its table.
Cost: one float64 vector of length I per target.

Shapes: T tokens of one sequence, I input features.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic

__all__ = ["Activation"]


class Activation(Statistic):
    """Sum the squared means of |x| of all sequences; ranks are merged by adding, before the root."""

    source = "input"
    is_by_sequence: ClassVar[bool] = True
    sum_of_squared_means: Tensor
    num_sequences: Tensor

    def __init__(self, weight: Tensor, num_inputs: int) -> None:
        super().__init__()
        self.add_state("sum_of_squared_means", torch.zeros(num_inputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_sequences", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.to(weight.device)

    def update(self, input_TI: Tensor) -> None:
        """Add one sequence, in any float dtype."""
        self.sum_of_squared_means += input_TI.abs().mean(0, dtype=torch.float64).square()
        self.num_sequences += 1

    def compute(self) -> Tensor:
        """Return activation_I, float32, >= 0."""
        return self.sum_of_squared_means.sqrt().float()
