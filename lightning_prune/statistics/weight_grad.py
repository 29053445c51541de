"""A moving average of |weight * gradient|, the first-order change of the loss when a weight is removed.

Source: Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771, section 3.1, with the
    absolute value; the moving average over steps follows Zhang et al., PLATON, arXiv 2206.12562.
Cost: one float32 number per weight while training.
"""

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic

__all__ = ["WeightGrad"]


class WeightGrad(Statistic):
    """Average |weight * gradient| over optimizer steps; the weight is the one after the step.

    With `beta` None all steps count alike, in whatever order they came.
    """

    source = "step"
    average: Tensor
    num_steps: Tensor

    def __init__(self, weight: Tensor, num_inputs: int, beta: float | None) -> None:
        super().__init__(sync_on_compute=False)
        self.beta = beta
        zero = torch.zeros((), dtype=torch.float32)
        self.add_state("average", zero.expand(weight.shape), dist_reduce_fx=None)  # the kept default takes one number
        self.average = zero.expand(weight.shape).clone()
        self.add_state("num_steps", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)
        self.to(weight.device)

    def update(self, weight: Tensor, grad: Tensor) -> None:
        """Take in one optimizer step."""
        value = (weight.float() * grad.float()).abs()
        if self.beta is None:
            self.average += value
        else:
            self.average.lerp_(value, 1 - self.beta)
        self.num_steps += 1

    def compute(self) -> Tensor:
        """Return the average, corrected for its start at zero, shaped like the weight."""
        total = self.num_steps if self.beta is None else 1 - self.beta ** int(self.num_steps)
        return self.average / total
