"""The mean and the variance of every input feature of a layer, over all tokens seen.

Source: An et al., Fluctuation-based Adaptive Structured Pruning (FLAP), arXiv 2312.11983, section 3.2. Difference: the
    released code updates the mean in place before it enters the variance and loses the first batch's variance; here
    plain sums in float64 are kept, which merge exactly.
Cost: two float64 vectors of length I per target.
Limits: a variance below 1e-15 of the squared mean reads as noise of that size.

Shapes: T tokens, I input features.
"""

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic

__all__ = ["InputMoments"]


class InputMoments(Statistic):
    """Sum the inputs and their squares in float64; ranks are merged by adding."""

    source = "input"
    sum_of_inputs: Tensor
    sum_of_squares: Tensor
    num_tokens: Tensor

    def __init__(self, weight: Tensor, num_inputs: int) -> None:
        super().__init__()
        for name in ("sum_of_inputs", "sum_of_squares"):
            self.add_state(name, torch.zeros(num_inputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.to(weight.device)

    def update(self, input_TI: Tensor) -> None:
        """Add the tokens of one forward pass, in any float dtype."""
        input_TI = input_TI.double()
        self.sum_of_inputs += input_TI.sum(0)
        self.sum_of_squares += input_TI.square().sum(0)
        self.num_tokens += input_TI.shape[0]

    def compute(self) -> Tensor:
        """Return variance_I, float32: the mean squared difference from the mean."""
        mean = self.sum_of_inputs / self.num_tokens
        return (self.sum_of_squares / self.num_tokens - mean.square()).clamp(min=0).float()

    def mean(self) -> Tensor:
        """Return mean_I, float32, merged over the ranks; every rank must call it."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return (self.sum_of_inputs / self.num_tokens).float()
