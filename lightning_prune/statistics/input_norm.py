"""The L2 norm of every input feature of a layer, over all tokens seen.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695. The sum is
    not divided by the number of tokens: a constant factor does not change a ranking.
Cost: one float64 vector of length I per target.

Shapes: T tokens, I input features.
"""

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic

__all__ = ["InputNorm"]


class InputNorm(Statistic):
    """Sum the squares of every input feature; ranks are merged by adding."""

    source = "input"
    sum_of_squares: Tensor
    num_tokens: Tensor

    def __init__(self, weight: Tensor, num_inputs: int) -> None:
        super().__init__()
        self.add_state("sum_of_squares", torch.zeros(num_inputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.to(weight.device)

    def update(self, input_TI: Tensor) -> None:
        """Add the tokens of one forward pass, in any float dtype."""
        self.sum_of_squares += input_TI.float().square().sum(0, dtype=torch.float64)
        self.num_tokens += input_TI.shape[0]

    def compute(self) -> Tensor:
        """Return norm_I, float32."""
        return self.sum_of_squares.sqrt().float()
