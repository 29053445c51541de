"""What blocks must have in common to lend each other weights: linear layers of equal roles and shapes.

Shapes: O output features, I input features.
"""

import math

from torch import Tensor, nn

from lightning_prune.targets.targets import find_blocks, is_linear

__all__ = ["check_alike", "linear_roles", "rank_limits", "weight_of"]


def linear_roles(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a block by their path in it."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer with its output features first, sharing memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, nn.Linear) else weight.T


def rank_limits(model: nn.Module) -> dict[str, int]:
    """Return linear layer of a block -> the smaller dimension of its weight."""
    return {name: min(weight_of(module).shape) for name, module in linear_roles(find_blocks(model)[0]).items()}


def check_alike(model: nn.Module) -> None:
    """Check that the blocks of a model have linear layers of equal roles and shapes, each its own.

    Raises:
        ValueError: naming the first block or layer that differs, or that holds most of its weights elsewhere.
    """
    blocks = find_blocks(model)
    shapes = [{name: tuple(weight_of(m).shape) for name, m in linear_roles(block).items()} for block in blocks]
    for index, block in enumerate(blocks):
        if type(block) is not type(blocks[0]) or shapes[index].keys() != shapes[0].keys():
            raise ValueError(
                f"block {index} ({type(block).__name__}) has not the linear layers of block 0 "
                f"({type(blocks[0]).__name__}), so they cannot lend each other weights; use ShortGPT or SLEB"
            )
        for name, shape in shapes[index].items():
            if shape != shapes[0][name]:
                raise ValueError(
                    f"{name} is {shape} in block {index} and {shapes[0][name]} in block 0; blocks of unequal shapes "
                    "cannot lend each other weights; cut widths evenly, or use ShortGPT or SLEB"
                )
        matrices = sum(p.numel() for p in block.parameters() if p.ndim > 1)
        if 2 * sum(math.prod(shape) for shape in shapes[index].values()) < matrices:
            raise ValueError(
                f"most weights of block {index} are not in linear layers (stacked experts?), so that little of it "
                "would be taken over; use ShortGPT or SLEB"
            )
    _check_not_tied(model)


def _check_not_tied(model: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for block in find_blocks(model):
        for parameter in block.parameters():
            if len(owners[id(parameter)]) > 1:
                raise ValueError(
                    f"{' and '.join(owners[id(parameter)][:2])} are one tensor; blocks whose weights are tied already "
                    "cannot lend each other weights, since a change of one would change others too"
                )
