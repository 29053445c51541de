"""Write a pruned model as a folder that loads without this package, whatever shapes its blocks have.

Where the stock class can have the shapes, by one value for all blocks or by Transformers' own `per_layer_config`, the
folder is a stock one. Else it carries one modelling file and a model type of its own: `from_pretrained` opens it with
`trust_remote_code=True` and stops without, since nothing else knows the type.

`lightning_prune.json` beside the weights says which of these it is, and records the plan, the units that were kept
and the parent.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.export.folder import new_folder, write_plan_note
from lightning_prune.export.huggingface import check_huggingface
from lightning_prune.export.plan_note import num_parameters
from lightning_prune.integrations.per_layer.per_layer_build import build_per_layer
from lightning_prune.integrations.per_layer.per_layer_source import stock_class_of
from lightning_prune.structured.build import build_smaller
from lightning_prune.structured.cutting import without_orphans
from lightning_prune.structured.depth.share import normalise_updates
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.structure import Structure

__all__ = ["export_per_layer"]

_NOTE_FORMAT = 1


def export_per_layer(
    model: nn.Module,
    plan: Plan,
    out_dir: str | PathLike[str],
    *,
    structure: Structure | None = None,
    tokenizer: Any = None,
    inputs: Mapping[str, Tensor] | None = None,
    batches: Sequence[Mapping[str, Tensor]] = (),
    consume: bool = False,
) -> Path:
    """Write what a plan keeps of a model, with the tokenizer and the plan, into a new folder.

    Args:
        model: of a class of Transformers, or with per-layer shapes already; unchanged unless it is consumed.
        plan: what stays.
        out_dir: a folder that does not exist yet or is empty.
        structure: what `discover` found in the model; found now if it is not given.
        tokenizer: anything with `save_pretrained`, or None.
        inputs: a small batch of keyword arguments of its forward; made up for models that read tokens or pixels.
        batches: calibration data, on which what blocks with shared matrices add is normalised; without any it is not.
        consume: whether to empty the parent's tensors one by one as they are cut, to save memory.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder is not empty, the plan does not fit, or the model cannot have these shapes.
        RuntimeError: if the smaller model computes something else than the masked one.
    """
    check_huggingface(model, out_dir)
    inputs = probe_inputs(model) if inputs is None else inputs
    structure = discover(model, inputs) if structure is None else structure
    note: dict[str, Any] = {"format": _NOTE_FORMAT, "parent": _parent(model)}
    small, note["form"], note["reason"] = _smaller(model, structure, plan, inputs, consume=consume)
    if plan.share and batches:
        normalise_updates(small, model, plan.share, batches)
    note["plan"] = plan.as_dict()
    note["kept"] = {key: list(cut.keep) for key, cut in without_orphans(structure.groups, plan.cuts).items()}
    note["num_parameters"] = num_parameters(small)
    with new_folder(out_dir) as folder:
        saved: Any = small
        saved.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_plan_note(folder, note)
    return Path(out_dir).expanduser()


def _smaller(
    model: nn.Module, structure: Structure, plan: Plan, inputs: Mapping[str, Tensor], *, consume: bool
) -> tuple[nn.Module, str, str]:
    """Return the smaller model, its form (stock, per_layer_config or own class), and why it is not a simpler one."""
    reason = "the plan removes parts of single blocks"
    if not plan.skip and stock_class_of(type(model)) is type(model):
        try:
            return shrink(model, plan, structure=structure, inputs=inputs, consume=consume), "stock", ""
        except ValueError as error:
            reason = str(error)
    small = build_per_layer(model, structure, plan, inputs=inputs, consume=consume)
    if stock_class_of(type(small)) is type(small):
        return small, "per_layer_config", reason
    stock = _stock(small, inputs)
    return (small, "own class", reason) if stock is None else (stock, "stock", "")


def _stock(small: Any, inputs: Mapping[str, Tensor]) -> nn.Module | None:
    """Return a model with equal blocks as its stock class; None if they differ, or the class refuses their sizes."""
    if small.config.layer_overrides:
        return None
    stock: Any = small.stock_class
    own = {
        "model_type",
        "auto_map",
        "architectures",
        "block_lists",
        "skip_parts",
        "per_layer_index",
        "per_layer_config",
    }
    values = {name: value for name, value in small.config.to_dict().items() if name not in own}
    try:
        config = stock.config_class.from_dict(values)
        config._attn_implementation = small.config._attn_implementation
        with torch.device("meta"):
            skeleton = stock(config)
        stock_model = build_smaller(small, Structure({}), Plan(), blueprint=Blueprint(skeleton))
    except ValueError:
        return None
    return stock_model if torch.equal(outputs(stock_model, inputs), outputs(small, inputs)) else None


def _parent(model: Any) -> dict[str, Any]:
    """Return what is recorded of the model that is cut."""
    values = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return {
        "name": model.config.name_or_path,
        "class": type(model).__name__,
        "config_sha256": hashlib.sha256(values.encode()).hexdigest(),
        "num_parameters": num_parameters(model),
    }
