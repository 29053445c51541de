"""Zero the removed units of a group, and compute and write the columns that make up for them.

Source: see solvers/least_squares.py.

Shapes: O output features, I input features, K kept inputs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.solvers.least_squares import default_damping, least_squares, least_squares_with_bias, mean_bias
from lightning_prune.structured.groups import Group
from lightning_prune.structured.undo import Undo
from lightning_prune.structured.width.options import WidthOptions
from lightning_prune.targets.targets import Binding

__all__ = ["refit", "write_columns_", "zero_units_"]


@torch.no_grad()
def zero_units_(tensors: Mapping[str, Tensor], group: Group, units: Sequence[int], undo: Undo) -> None:
    """Set the slices of some units to zero in all members of a group.

    Args:
        tensors: parameters and buffers by name; changed in place.
        group: whose units they are.
        units: which.
        undo: notes them before.
    """
    for member in group.members:
        data = tensors[member.name].data
        dim = member.dim
        if member.expert is not None:
            data, dim = data[member.expert], dim - 1
        positions = member.positions(units).to(data.device)
        undo.keep(data, dim, positions)
        data.index_fill_(dim, positions, 0)


def refit(
    binding: Binding, readings: Mapping[str, Tensor], keep: Sequence[int], options: WidthOptions
) -> tuple[Tensor, Tensor | None]:
    """Return the kept columns of an output projection and its bias, so that the output stays what it was.

    Args:
        binding: the projection, as it was before anything was zeroed.
        readings: its `gram`, or the `mean` of its inputs.
        keep: the columns that stay.
        options: how to compensate, and with which damping.

    Returns:
        (weight_OK, bias_O or None if there is none), float64.

    Raises:
        ValueError: if there are too few calibration tokens.
    """
    weight_OI = binding.target(whole=True).weight_OI.double()
    bias_O = getattr(binding.module, "bias", None)
    if options.compensate == "bias":
        assert bias_O is not None
        keep_K = torch.as_tensor(keep, device=weight_OI.device)
        return weight_OI[:, keep_K], mean_bias(weight_OI, bias_O, readings["mean"], keep_K)
    gram_JJ = readings["gram"]
    rule = default_damping(int(gram_JJ[-1, -1]), len(keep), binding.name)
    damping = rule if options.damping is None else options.damping
    if bias_O is None:
        return least_squares(weight_OI, gram_JJ[:-1, :-1], keep, damping), None
    return least_squares_with_bias(weight_OI, bias_O, gram_JJ, keep, damping)


@torch.no_grad()
def write_columns_(binding: Binding, keep: Sequence[int], weight_OK: Tensor, bias_O: Tensor | None, undo: Undo) -> None:
    """Write columns and bias into a projection, in its own dtype; the other columns become zero."""
    undo.keep(binding.parameter)
    weight_OI = torch.zeros(binding.shape_OI, dtype=weight_OK.dtype, device=weight_OK.device)
    weight_OI[:, torch.as_tensor(keep, device=weight_OK.device)] = weight_OK
    binding.parameter.data.copy_(binding.from_matrix(weight_OI))
    if bias_O is not None:
        assert isinstance(binding.module.bias, Tensor)
        undo.keep(binding.module.bias)
        binding.module.bias.data.copy_(bias_O)
