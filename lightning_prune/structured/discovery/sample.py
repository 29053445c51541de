"""Stand-ins for a model that prove the same at less cost: the model with short windows, and a few of its blocks."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_prune.structured.build import build_smaller
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.precision import precise
from lightning_prune.structured.discovery.probe import (
    WeightsChangeError,
    difference,
    first_row,
    guarded_outputs,
    outputs,
    skipping,
    tolerance,
)
from lightning_prune.structured.discovery.probe_inputs import probes, spans
from lightning_prune.structured.discovery.stack import blocks_of, representatives
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["sample_of", "twin_of"]

_SHORT_SPAN = 16  # tokens, to which wider windows are narrowed


def twin_of(model: nn.Module, blueprint: Blueprint) -> tuple[nn.Module, Blueprint]:
    """Return the model as its class builds it around the same tensors, with short windows.

    What is proven at a window of a few tokens holds for a wide one, which the same code reads as a number, and costs
    no forward passes over thousands of tokens.

    Raises:
        WeightsChangeError: if the model changes its weights while it runs.
    """
    edits = {path: min(value, _SHORT_SPAN) for path, value in spans(blueprint.config).items()}
    narrow = blueprint.with_values(edits) or blueprint
    for candidate in dict.fromkeys((narrow, blueprint)):
        twin = build_smaller(model, Structure({}), Plan(), share=True, blueprint=candidate)
        try:
            for batch in probes(twin):
                guarded_outputs(twin, batch)
        except WeightsChangeError:
            raise
        except Exception:  # noqa: BLE001 - a class that takes no such window, or inputs that are to be given
            continue
        return twin, candidate
    return twin, blueprint


def sample_of(
    model: nn.Module, blueprint: Blueprint, stack: Stack, inputs: Mapping[str, Tensor]
) -> tuple[nn.Module, Stack, dict[int, int]]:
    """Return a model of a few blocks that stand for all, its stack, and block -> the sample's block for it."""
    chosen, standing = representatives(blueprint, model, stack)
    if len(chosen) < stack.num_layers:
        others = [block for layer in standing if layer not in chosen for block in blocks_of(model, stack, layer)]
        try:
            small = build_smaller(
                model, Structure({}, stack), Plan(layers=tuple(chosen)), share=True, blueprint=blueprint
            )
            one = first_row(inputs)
            with skipping(others):
                expected = outputs(model, one)
            if difference(outputs(small, one), expected) <= tolerance(expected):
                position = {layer: index for index, layer in enumerate(chosen)}
                short = dataclasses.replace(stack, num_layers=len(chosen))
                sample = precise(small, Blueprint(small))
                return sample, short, {layer: position[other] for layer, other in standing.items()}
        except Exception:  # noqa: BLE001 - blocks that depend on their place: the whole model is its own sample
            pass
    return precise(model, blueprint), stack, {layer: layer for layer in standing}
