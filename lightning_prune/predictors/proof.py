"""Prove, on a model, that masking what the readers of units read equals leaving these units out."""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_prune.predictors.unit_masks import UnitMasks
from lightning_prune.structured.discovery.probe import difference, outputs, tolerance
from lightning_prune.structured.discovery.probe_inputs import probes
from lightning_prune.structured.groups import Cut, Group, zeroed

__all__ = ["check_masked_is_cut"]


@torch.no_grad()
def check_masked_is_cut(model: nn.Module, units: UnitMasks, groups: Sequence[Group]) -> None:
    """Check that masking what is read equals zeroing the units, for two samples with different masks.

    Raises:
        ValueError: if it does not.
    """
    batch = {name: value[:1].repeat(2, *[1] * (value.ndim - 1)) for name, value in probes(model)[0].items()}
    device = next(model.parameters()).device
    masks = [torch.ones(2, group.num_units, device=device) for group in groups]
    for mask, group in zip(masks, groups, strict=True):
        size = group.num_units // 2
        mask[0, :size], mask[1, size:] = 0, 0
    units.attach(model)
    try:
        with units.passing([mask.to(device) for mask in masks]):
            found = outputs(model, batch)
    finally:
        units.detach()
    for row in range(2):
        cuts = [
            Cut(group.key, tuple(mask[row].nonzero().flatten().tolist()))
            for mask, group in zip(masks, groups, strict=True)
        ]
        with zeroed(model, {group.key: group for group in groups}, cuts):
            expected = outputs(model, batch)
        if difference(found[row], expected[row]) > tolerance(expected[row]):
            raise ValueError(
                f"masking what the readers of {type(model).__name__} read does not equal leaving the units out: its "
                "rows are not in the order of the samples; this model cannot be conditioned"
            )
