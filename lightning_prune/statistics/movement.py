"""How far every weight has moved away from zero: minus the sum of weight * gradient.

Source: Sanh et al., Movement Pruning, arXiv 2005.07683, eq. 4 (the straight-through gradient of the scores).
Cost: one float32 number per weight while training.
"""

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic

__all__ = ["Movement"]


class Movement(Statistic):
    """Sum -weight * gradient over optimizer steps; the weight is the one after the step."""

    source = "step"
    total: Tensor
    num_steps: Tensor

    def __init__(self, weight: Tensor, num_inputs: int) -> None:
        super().__init__(sync_on_compute=False)
        zero = torch.zeros((), dtype=torch.float32)
        self.add_state("total", zero.expand(weight.shape), dist_reduce_fx=None)  # the kept default takes one number
        self.total = zero.expand(weight.shape).clone()
        self.add_state("num_steps", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)
        self.to(weight.device)

    def update(self, weight: Tensor, grad: Tensor) -> None:
        """Take in one optimizer step."""
        self.total.sub_(weight.float() * grad.float())
        self.num_steps += 1

    def compute(self) -> Tensor:
        """Return the sum, shaped like the weight."""
        return self.total
