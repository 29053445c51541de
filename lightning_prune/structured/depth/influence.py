"""Rate blocks by how little they turn the residual stream: block influence, and its form for runs of blocks.

Source: ShortGPT, arXiv 2403.03853 (block influence); The Unreasonable Ineffectiveness of the Deeper Layers, arXiv
    2403.17887 (angular distance over a run of blocks).
Cost: one forward pass; the streams of one batch are held at a time.
Limits: blind to interaction: rating once and removing several blocks at once is worse than a greedy search, and a small
    angle is a weak sign that a block can go.

Shapes: B sequences, T positions, N tokens that are not padding, D width of the residual stream.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base import distributed
from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.depth.bypass import block_input, first_tensor
from lightning_prune.structured.depth.criteria import model_logits
from lightning_prune.targets.targets import find_blocks

__all__ = ["angular_distance", "block_influence", "block_streams", "influence", "run_distance"]

Batch = Mapping[str, Tensor]


def influence(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """Return 1 - cosine per token, in float32."""
    return 1 - functional.cosine_similarity(before_ND.float(), after_ND.float(), dim=-1)


def angular_distance(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """Return the angle between two streams per token divided by pi, in float32; exact also where it is small."""
    a_ND, b_ND = functional.normalize(before_ND.float(), dim=-1), functional.normalize(after_ND.float(), dim=-1)
    return 2 / math.pi * torch.atan2((a_ND - b_ND).norm(dim=-1), (a_ND + b_ND).norm(dim=-1))


def block_streams(model: nn.Module, batch: Batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Run a batch and return what entered and what left every block, and which tokens are not padding.

    Returns:
        inputs and outputs, one (B, T, D) tensor per block, and a boolean mask (B, T).
    """
    blocks = find_blocks(model)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def hook(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        after = first_tensor(output)
        inputs[id(block)], outputs[id(block)] = block_input(args, kwargs, after).detach().clone(), after.detach()

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        _, moved = model_logits(model, batch)
    if not blocks or len(inputs) < len(blocks):
        raise ValueError(f"the forward pass calls {len(inputs)} of {len(blocks)} blocks; their influence is unknown")
    ordered = [id(block) for block in blocks]
    mask_BT = moved.get("attention_mask", torch.ones_like(moved["input_ids"])).bool()
    return [inputs[key] for key in ordered], [outputs[key] for key in ordered], mask_BT


def block_influence(model: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """Return the block influence of every block: the mean over tokens of 1 - cos(input, output).

    Args:
        model: called once per batch, in evaluation mode.
        batches: `attention_mask` leaves out padding. Under several processes each brings its own.
    """
    totals: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs, outputs, mask_BT = block_streams(model, batch)
            sums = [influence(x[mask_BT], y[mask_BT]).double().sum() for x, y in zip(inputs, outputs, strict=True)]
            totals.append(torch.stack([*sums, mask_BT.sum().double()]))
    return _means(totals)


def run_distance(
    model: nn.Module, batches: Sequence[Batch], num_blocks: int, *, last_token_only: bool = False
) -> list[float]:
    """Return, for every run of `num_blocks` blocks, the mean angular distance between its input and its output.

    Args:
        model: called once per batch, in evaluation mode.
        batches: `attention_mask` leaves out padding.
        num_blocks: length of a run; entry i is the run that starts with block i.
        last_token_only: whether only the last token of each sequence counts, as in the paper's code.

    Raises:
        ValueError: if the model has no run of that length.
    """
    total_blocks = len(find_blocks(model))
    if not 1 <= num_blocks <= total_blocks:
        raise ValueError(f"num_blocks must be between 1 and the {total_blocks} blocks of the model, got {num_blocks}")
    totals: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs, outputs, mask_BT = block_streams(model, batch)
            chosen_BT = _last_only(mask_BT) if last_token_only else mask_BT
            sums = [
                angular_distance(inputs[start][chosen_BT], outputs[start + num_blocks - 1][chosen_BT]).double().sum()
                for start in range(total_blocks - num_blocks + 1)
            ]
            totals.append(torch.stack([*sums, chosen_BT.sum().double()]))
    return _means(totals)


def _last_only(mask_BT: Tensor) -> Tensor:
    """Keep the last true entry of every row."""
    positions_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    ranks_BT = mask_BT * positions_T
    return mask_BT & (ranks_BT == ranks_BT.max(1, keepdim=True).values)


def _means(totals: Sequence[Tensor]) -> list[float]:
    """Divide sums by the count that stands last, both added over batches and processes."""
    if not totals:
        raise ValueError("got no calibration batches; give a list with at least one")
    summed = distributed.sum_everywhere(torch.stack(list(totals)).sum(0))
    return [float(value) for value in summed[:-1] / summed[-1]]
