"""What kinds of layers hold weights, told by their type, and how wide they are."""

import sys

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_prune.targets.layouts import Form, Kernel, Layout, Stored, Transposed, TransposedKernel

__all__ = ["is_convolution", "is_layer", "is_linear", "is_recurrent", "layout_of", "linear_types", "weighs", "widths"]

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def linear_types() -> tuple[type[nn.Module], ...]:
    """Return the modules that multiply their input by their weight; transformers' Conv1D only if it is loaded."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies its input by its weight when it is called.

    The output projection of torch's own attention is never called, so that nobody sees its inputs.
    """
    return isinstance(module, linear_types()) and not isinstance(module, NonDynamicallyQuantizableLinear)


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution, transposed or not."""
    return isinstance(module, _ConvNd)


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is a recurrent layer or cell."""
    return isinstance(module, _RECURRENT)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer that weighs its inputs: linear, convolution, recurrent or attention."""
    kinds = (*linear_types(), _ConvNd, *_RECURRENT, nn.MultiheadAttention)
    return isinstance(module, kinds)


def weighs(module: nn.Module, tensor: str) -> bool:
    """Return whether a tensor of a layer multiplies its inputs; biases and what else it holds do not."""
    if isinstance(module, nn.MultiheadAttention):
        return tensor in _ATTENTION
    if isinstance(module, _RECURRENT):
        return tensor.startswith("weight_")
    return is_layer(module) and tensor == "weight"


def widths(module: nn.Module) -> tuple[int, int]:
    """Return how many features a linear layer or convolution reads and writes; (0, 0) of any other."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, linear_types()):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return 0, 0


def layout_of(module: nn.Module, ndim: int) -> Layout | None:
    """Return how a layer's weight is stored; None if the type of the layer does not tell."""
    if isinstance(module, _ConvTransposeNd):
        return TransposedKernel(module.groups)
    if isinstance(module, _ConvNd):
        return Kernel(module.groups)
    if isinstance(module, nn.Bilinear):
        return Form()
    if isinstance(module, linear_types()):
        return Stored() if isinstance(module, nn.Linear) else Transposed()
    return Stored() if ndim == 2 else None
