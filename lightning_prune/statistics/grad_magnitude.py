"""A moving average of the absolute gradient of every weight.

Source: the growth criterion of Evci et al., Rigging the Lottery, arXiv 1911.11134, averaged over steps.
Cost: one float32 number per weight while training.
"""

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic

__all__ = ["GradMagnitude"]


class GradMagnitude(Statistic):
    """Average |gradient| over optimizer steps.

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
        value = grad.float().abs()
        if self.beta is None:
            self.average += value
        else:
            self.average.lerp_(value, 1 - self.beta)
        self.num_steps += 1

    def compute(self) -> Tensor:
        """Return the average, corrected for its start at zero, shaped like the weight."""
        total = self.num_steps if self.beta is None else 1 - self.beta ** int(self.num_steps)
        return self.average / total
