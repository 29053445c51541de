"""Merge LoRA adapters into a pruned model so that every zero stays a zero, in the model or on the way to a file.

Shapes: O output features, I input features.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lightning_prune.base import distributed, masks
from lightning_prune.base.types import Report
from lightning_prune.export.folder import check_free, new_folder, write_note
from lightning_prune.integrations.lora.peft_layers import GuardedLoraLinear, MaskedLoraLinear, base_weight, keep_of
from lightning_prune.integrations.lora.peft_lora import MASKS_NAME, lora_layers
from lightning_prune.recovery.low_rank import effective_weight
from lightning_prune.report.counts import measure
from lightning_prune.targets.targets import Targets

__all__ = ["base_state", "check_merge", "export_adapter", "measure_merged", "merge", "merged_state", "write_beside"]

logger = logging.getLogger(__name__)
_IN_BASE = re.compile(r"(\.base_layer|\.original_module)+\.")


def check_merge(wrapped: PeftModel) -> None:
    """Check that merging will keep every zero, before any training time is spent.

    Raises:
        ValueError: if a plain LoRA lies over a sparse weight.
    """
    for name, layer in lora_layers(wrapped):
        weight = base_weight(layer)
        if isinstance(layer, GuardedLoraLinear) and _num_zeros(keep_of(weight, layer.mask_of)) > 0.01 * weight.numel():
            raise ValueError(
                f"merging would fill the zeros of {name}, because a plain LoRA is dense; set recover.lora.form to "
                "masked or scaled, or export.format to adapter"
            )


def merge(wrapped: PeftModel) -> nn.Module:
    """Merge the active adapter into the weights, check the zeros, and say the density before and after.

    Args:
        wrapped: changed in place; the adapter is gone afterwards.

    Returns:
        the model without PEFT.

    Raises:
        ValueError: if merging would fill zeros.
        RuntimeError: if a zero was filled, which is a mistake of this library.
    """
    check_merge(wrapped)
    kept = {
        name.removeprefix("base_model.model."): keep_of(base_weight(layer), layer.mask_of).clone()
        for name, layer in lora_layers(wrapped)
        if isinstance(layer, MaskedLoraLinear)  # over a weight that is not sparse, single zeros are chance
    }
    before = sum(int(keep.sum()) for keep in kept.values())
    model: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    after = 0
    for name, keep in kept.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        after += int(torch.count_nonzero(weight))
        if bool(weight[~keep].any()):
            raise RuntimeError(f"merging filled zeros of {name}; please report it with the model and the recipe")
    total = sum(keep.numel() for keep in kept.values())
    if total:
        shares = before / total, after / total
        distributed.log(logger, logging.INFO, "merged: density %.4f before, %.4f after", *shares)
    return model


@torch.no_grad()
def merged_state(wrapped: PeftModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the model without PEFT, adapters merged; the model itself stays as it is.

    Args:
        wrapped: the model in training.
        state: its whole state, for example of `distributed.whole_state_dict`.

    Returns:
        tensors by the names that the model has without PEFT.

    Raises:
        ValueError: if merging would fill zeros.
    """
    adapter = wrapped.active_adapter
    layers = dict(lora_layers(wrapped))
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        owner, _, leaf = key.rpartition(".")
        inner = owner.removesuffix(".base_layer")
        if ".lora_" in key or ".original_module." in key:
            continue
        name = key.replace(".base_layer.", ".").replace(f".modules_to_save.{adapter}.", ".")
        if ".modules_to_save." in name:
            continue
        if inner in layers and leaf == "weight":
            tensor = _merged_weight(inner, layers[inner], tensor, state, adapter)
        result[name.removeprefix("base_model.model.")] = tensor
    return result


def measure_merged(base: Any, state: Mapping[str, Tensor], report: Report) -> Report:
    """Return what a report says of the model in training, counted anew on the merged weights.

    Args:
        base: gives class and configuration; a Hugging Face model.
        state: of `merged_state`.
        report: of the model in training.
    """
    with torch.device("meta"):
        merged: Any = type(base)(base.config)
    merged.load_state_dict(dict(state), assign=True, strict=False)  # not there: what is tied, and buffers of no state
    merged.tie_weights()
    names = {name for name, _ in merged.named_parameters()}
    # Under Lightning, and under PEFT in it, a target's name begins with the attributes that lead to the model.
    found = {target.name: next((n for n in _endings(target.name) if n in names), None) for target in report.targets}
    bindings = Targets(include=tuple(name for name in found.values() if name is not None)).resolve(merged)
    return measure(merged, bindings, step=report.step, notes=report.notes)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def base_state(wrapped: nn.Module, state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model below its adapters, and its weights as if adapters had never been there.

    Args:
        wrapped: a `PeftModel`, or a model that PEFT has put adapters into.
        state: its whole state.
    """
    base: nn.Module = wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped
    start = next(f"{name}." if name else "" for name, module in wrapped.named_modules() if module is base)
    added = {
        f"{start}{name}"
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    result = {}
    for key, tensor in state.items():
        owner = next((owner for owner in _owners(key) if owner in added), None)
        if key.startswith(start) and (owner is None or _IN_BASE.search(key[len(owner) :])):
            result[_IN_BASE.sub(".", key.removeprefix(start))] = tensor
    return base, result


def write_beside(wrapped: Any, folder: Path, *, base_folder: str, state: Mapping[str, Tensor]) -> None:
    """Write the adapters of a model into a folder that names the model they belong to."""
    folder.mkdir()
    wrapped.save_pretrained(str(folder), state_dict=dict(state))
    for path in folder.rglob("adapter_config.json"):
        content = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_folder}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _owners(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))


def _merged_weight(name: str, layer: Any, weight: Tensor, state: Mapping[str, Tensor], adapter: str) -> Tensor:
    if adapter not in layer.lora_A:
        return weight
    down_RI, up_OR = (state[f"{name}.lora_{side}.{adapter}.weight"].to(weight.device) for side in "AB")
    is_transposed = bool(getattr(layer, "fan_in_fan_out", False))
    if not isinstance(layer, MaskedLoraLinear | GuardedLoraLinear):
        return weight + layer.get_delta_weight(adapter).to(weight.device)
    held = layer.mask_of(base_weight(layer))
    keep = weight != 0 if held is None else held.to(weight.device)
    if isinstance(layer, GuardedLoraLinear):
        if _num_zeros(keep) > 0.01 * keep.numel():
            raise ValueError(f"merging a plain LoRA would fill {_num_zeros(keep)} zeros of {name}")
        keep = torch.ones_like(keep)
    merged_OI = effective_weight(
        weight.T if is_transposed else weight,
        keep.T if is_transposed else keep,
        down_RI,
        up_OR,
        form=layer.form if isinstance(layer, MaskedLoraLinear) else "masked",
        scale=layer.scaling[adapter],
    )
    return (merged_OI.T if is_transposed else merged_OI).to(weight.dtype).contiguous()


def _num_zeros(keep: Tensor) -> int:
    return keep.numel() - int(keep.sum())


def export_adapter(
    wrapped: PeftModel,
    out_dir: str,
    *,
    state: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    recipe: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter alone into a new folder, and beside it the masks it was trained with, one bit per weight.

    Args:
        wrapped: the trained model.
        out_dir: a folder that does not exist yet or is empty.
        state: its whole state, for a model that is sharded.
        tokenizer: anything with `save_pretrained`, or None.
        recipe: the recipe as plain values, for `sparsity.json`.
        overwrite: see `check_free`.

    Returns:
        the folder.

    Raises:
        ValueError: if the folder is not empty.
    """
    check_free(out_dir, overwrite=overwrite)
    tensors = wrapped.state_dict() if state is None else state
    held = {}
    for name, layer in lora_layers(wrapped):
        if isinstance(layer, MaskedLoraLinear):
            mask = layer.mask_of(base_weight(layer))
            keep = tensors[f"{name}.base_layer.weight"] != 0 if mask is None else mask
            held[f"{name.removeprefix('base_model.model.')}.weight"] = keep
    with new_folder(out_dir, overwrite=overwrite) as folder:
        wrapped.save_pretrained(str(folder), state_dict=dict(tensors))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if held:
            packed = {name: {"bits": masks.pack(keep).cpu(), "shape": list(keep.shape)} for name, keep in held.items()}
            torch.save(packed, folder / MASKS_NAME)
        write_note(folder, report=None, recipe=recipe)
    return Path(out_dir).expanduser()
