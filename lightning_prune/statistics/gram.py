"""The second moments of a layer's inputs: sums of x x^T, of x, and the number of tokens.

Source: the Hessian of a linear layer's squared output error, as in Hassibi and Stork, Optimal Brain Surgeon, and
    Frantar and Alistarh, SparseGPT, arXiv 2301.00774, section 3.1, here not divided by the number of tokens.
Cost: one float64 matrix of I x I per target; T * I^2 multiplications per pass.
Limits: 1.6 GB for an input of width 14336; collect one layer at a time.

Shapes: T tokens, I input features, J = I + 1.
"""

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic

__all__ = ["Gram"]


class Gram(Statistic):
    """Sum the outer products of the inputs; ranks are merged by adding."""

    source = "input"
    sum_of_products: Tensor
    sum_of_inputs: Tensor
    num_tokens: Tensor

    def __init__(self, weight: Tensor, num_inputs: int) -> None:
        super().__init__()
        zeros = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self.add_state("sum_of_products", zeros, dist_reduce_fx="sum")
        self.add_state("sum_of_inputs", torch.zeros(num_inputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.to(weight.device)

    def update(self, input_TI: Tensor) -> None:
        """Add the tokens of one forward pass, in any float dtype."""
        input_TI = input_TI.double()
        self.sum_of_products.addmm_(input_TI.T, input_TI)
        self.sum_of_inputs += input_TI.sum(0)
        self.num_tokens += input_TI.shape[0]

    def compute(self) -> Tensor:
        """Return gram_JJ, float64: the Gram matrix of the inputs with a constant 1 appended.

        So `gram_JJ[:-1, :-1]` is the Gram matrix of the inputs, `gram_JJ[:-1, -1]` their sum, and the last entry the
        number of tokens.
        """
        sum_of_ones = self.num_tokens.double().reshape(1)
        last = torch.cat([self.sum_of_inputs, sum_of_ones])
        return torch.cat([torch.cat([self.sum_of_products, self.sum_of_inputs[:, None]], 1), last[None]], 0)
