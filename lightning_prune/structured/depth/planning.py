"""What all methods that choose blocks and sub-blocks share: binding a search to its model, and making the plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.base import distributed
from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.depth.bypass import SubBlock, merge_parts
from lightning_prune.structured.depth.criteria import Criterion, model_logits
from lightning_prune.structured.depth.search import (
    Candidate,
    Removal,
    Stop,
    fingerprint_batches,
    fingerprint_model,
    greedy_search,
)
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.method import Batch, StateFile
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.undo import undone_on_error
from lightning_prune.targets.targets import find_blocks

__all__ = ["check_no_state_file", "check_number", "describe", "make_plan", "removable", "run_search", "unprotected"]


def describe(value: object) -> Any:
    """Return options as plain values: a dataclass becomes its class name and its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **{f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    return [describe(item) for item in value] if isinstance(value, list | tuple) else value


def make_plan(
    method: object,
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Batch],
    *,
    layers: Sequence[int] = (),
    parts: Sequence[SubBlock] = (),
    cuts: Sequence[Cut] = (),
    found: Mapping[str, object],
) -> Plan:
    """Put together the plan that removes these blocks, sub-blocks and units.

    A block all of whose parts are removed is removed whole, if that gives the same logits.

    Args:
        method: the options, a dataclass.
        model: the intact model.
        structure: what can be cut from it.
        batches: the calibration data; its hash is stored.
        layers: blocks to remove.
        parts: sub-blocks to remove.
        cuts: units to keep.
        found: what led to the choice, for the record.

    Raises:
        ValueError: if no block would be left.
    """
    whole: tuple[int, ...] = ()
    rest: tuple[SubBlock, ...] = ()
    if parts:
        groups = list(structure.groups.values())
        with evaluating(model):
            whole, rest = merge_parts(model, groups, parts, lambda: model_logits(model, batches[0])[0])
    gone = {*layers, *whole}
    total = len(find_blocks(model))
    if len(gone) >= total:
        raise ValueError(f"all {total} blocks would be removed; remove fewer")
    options = {key: value for key, value in describe(method).items() if key != "class"}
    device = next(model.parameters()).device
    num_batches = int(distributed.sum_everywhere(torch.tensor(len(batches), device=device)))
    calibration = {"fingerprint": fingerprint_batches(batches, device), "num_batches": num_batches}
    return Plan(
        cuts=tuple(cuts),
        layers=tuple(layer for layer in range(total) if layer not in gone) if gone else None,
        skip=tuple((part.layer, part.part) for part in rest),
        method={"name": type(method).__name__, "options": options, "calibration": calibration, **found},
    )


def run_search(
    criterion: Criterion,
    model: nn.Module,
    batches: Sequence[Batch],
    candidates: Sequence[Candidate],
    stop: Stop,
    *,
    already: Sequence[Candidate] = (),
    detail: str = "",
    state_file: StateFile = None,
    progress: bool = True,
) -> Removal:
    """Search greedily on a model; the state file is bound to its weights, the batches, the criterion and `detail`."""
    device = next(model.parameters()).device
    prints = (fingerprint_model(model), fingerprint_batches(batches, device)) if state_file is not None else ()
    with undone_on_error(model):
        return greedy_search(
            criterion.prepare(model, batches),
            candidates,
            stop,
            already=already,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            state_file=state_file,
            fingerprint=" ".join((*prints, repr(criterion), detail)).strip(),
            device=device,
            progress=progress,
        )


def check_no_state_file(method: object, state_file: StateFile) -> None:
    """Check that no state file is given to a method that does not search.

    Raises:
        ValueError: if there is one.
    """
    if state_file is not None:
        name = type(method).__name__
        raise ValueError(f"{name} does not search, so there is no state to keep; leave out {state_file}")


def unprotected(model: nn.Module, first: int, last: int) -> range:
    """Return the indices of the blocks but the first and the last so many.

    Raises:
        ValueError: if that leaves none.
    """
    total = len(find_blocks(model))
    if first < 0 or last < 0 or first + last >= total:
        raise ValueError(f"protect_first={first} and protect_last={last} leave none of {total} blocks; protect fewer")
    return range(first, total - last)


def removable(structure: Structure, layers: Iterable[int]) -> list[int]:
    """Return those of some blocks that the class of the model can do without.

    Raises:
        ValueError: if there are none.
    """
    kept_always = {} if structure.stack is None else structure.stack.kept_always
    found = [layer for layer in layers if layer not in kept_always]
    if not found:
        raise ValueError(f"no block can be removed: {'; '.join(dict.fromkeys(kept_always.values()))}")
    return found


def check_number(model: nn.Module, num_blocks: int) -> None:
    """Check that so many blocks can go.

    Raises:
        ValueError: if none or all would.
    """
    total = len(find_blocks(model))
    if not 1 <= num_blocks < total:
        raise ValueError(f"num_blocks must be between 1 and {total - 1} for {total} blocks, got {num_blocks}")
