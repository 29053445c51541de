"""Refit one target to its dense weights, write it, and say what that did to its output.

Source: solvers/masked_least_squares.py. The wanted output is a mixture of what the dense weights compute on the inputs
    that the pruned model gives and of what they compute in the dense model: the first keeps errors of the layers before
    as they are, the second makes up for them, and asks for more than the layer's inputs can give. Our measurement on a
    model of 3 million parameters, perplexity after the refit at shares 0, 0.25, 0.5, 0.75 and 1 of the second: 14.2,
    12.4, 12.1, 12.4 and 13.1 at 50 % by Wanda (27.7 before), 40.0, 26.0, 24.4, 25.4 and 28.1 at 2:4 by magnitude (663
    before). With few tokens the half is best too: 15.3, 13.1 and 12.5 at 2, 4 and 8 per kept input with 0.3 million
    parameters, where share 0 gives 16.2, 14.7 and 14.3.
Cost: see there; two products of O x J x J for the errors.

Shapes: O output features, I input features, J = I + 1 with a constant 1 appended.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.recovery.twins import Readings
from lightning_prune.solvers.masked_least_squares import bias_change, centred, damping_for, masked_least_squares
from lightning_prune.targets.targets import Binding

__all__ = ["DenseLayer", "TargetError", "bias_of", "num_kept", "refit_"]


@dataclass(frozen=True)
class DenseLayer:
    """A layer's weight and bias before pruning, in the dtype of the arithmetic."""

    weight_OI: Tensor
    bias_O: Tensor | None


@dataclass(frozen=True)
class TargetError:
    """What the refit did to one target.

    `before` and `after` are the squared difference of its output from that in the dense model (if `is_paired`; else
    from that of the dense weights on the same inputs), over the latter's square. `residual` is that of the linear
    systems, 0 where none was solved.
    """

    name: str
    before: float
    after: float
    tokens_per_input: float
    damping: float
    residual: float
    is_paired: bool


def bias_of(binding: Binding) -> nn.Parameter | None:
    """Return the bias of the layer of a target."""
    bias = getattr(binding.module, "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None


def num_kept(mask_OI: Tensor) -> int:
    """Return the most inputs that a row keeps."""
    return max(1, int(mask_OI.sum(1).max()))


@torch.no_grad()
def refit_(
    binding: Binding,
    dense: DenseLayer,
    mask_OI: Tensor,
    readings: Readings,
    *,
    towards_dense: float,
    damping: float | None,
    only_bias: bool,
) -> TargetError:
    """Refit a target in place, or the bias of its layer alone.

    Args:
        binding: the target as it is in the pruned model.
        dense: what it was.
        mask_OI: bool, True = keep.
        readings: of its inputs.
        towards_dense: share of the dense model's own output in what is wanted.
        damping: None follows the number of tokens.
        only_bias: whether the weights stay.
    """
    dtype, bias = dense.weight_OI.dtype, bias_of(binding)
    own_JJ = readings.own_JJ.to(dtype)
    wanted_JJ = ((1 - towards_dense) * readings.own_JJ + towards_dense * readings.cross_JJ).to(dtype)
    before = _output_error(binding, dense, readings)
    tokens_per_input = readings.num_tokens / num_kept(mask_OI)
    used = residual = 0.0
    if not only_bias:
        used = damping_for(tokens_per_input) if damping is None else damping
        own_II, wanted_II = (p[:-1, :-1] if bias is None else centred(p) for p in (own_JJ, wanted_JJ))
        refit = masked_least_squares(dense.weight_OI, mask_OI, own_II, used, wanted_II=wanted_II)
        binding.parameter.data.copy_(binding.from_matrix(refit.weight_OI))
        residual = refit.residual
    if bias is not None and dense.bias_O is not None:
        stored_OI = binding.to_matrix(binding.parameter.detach())
        bias.data.copy_(dense.bias_O + bias_change(dense.weight_OI, stored_OI, wanted_JJ))
    after = _output_error(binding, dense, readings)
    return TargetError(binding.name, before, after, tokens_per_input, used, residual, readings.is_paired)


def _output_error(binding: Binding, dense: DenseLayer, readings: Readings) -> float:
    """Return the squared difference of a layer's output from the dense model's, over the latter's square."""
    own_JJ, cross_JJ, dense_JJ = (
        product_JJ.to(dense.weight_OI.dtype) for product_JJ in (readings.own_JJ, readings.cross_JJ, readings.dense_JJ)
    )
    weight_OI, bias_O, bias = dense.weight_OI, dense.bias_O, bias_of(binding)
    zero_O = torch.zeros_like(weight_OI[:, 0])
    now_OI = binding.to_matrix(binding.parameter.detach()).to(weight_OI.dtype)
    now_OJ = torch.cat([now_OI, (zero_O if bias is None else bias.detach().to(zero_O.dtype))[:, None]], 1)
    dense_OJ = torch.cat([weight_OI, (zero_O if bias_O is None else bias_O)[:, None]], 1)
    # |now x - dense y|^2 = |(now - dense) x + dense (x - y)|^2, of which the parts are small where the whole is
    change_OJ = now_OJ - dense_OJ
    drift_JJ = own_JJ - cross_JJ
    lost = ((change_OJ @ own_JJ) * change_OJ).sum() + 2 * ((dense_OJ @ drift_JJ) * change_OJ).sum()
    lost += ((dense_OJ @ (drift_JJ - cross_JJ.T + dense_JJ)) * dense_OJ).sum()
    whole = ((weight_OI @ dense_JJ[:-1, :-1]) * weight_OI).sum()
    return float(lost / whole)
