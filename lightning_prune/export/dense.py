"""Write a model as one file of dense tensors, zeros included.

`model.safetensors` when safetensors is installed, `model.pt` otherwise; both hold a plain state dict that the model's
own class loads with `load_state_dict`, and neither holds code.
"""

import importlib.util
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prune.base.types import Report
from lightning_prune.export.folder import new_folder, write_note

__all__ = ["export_dense"]


def export_dense(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    report: Report | None = None,
    recipe: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the weights of a model into a new folder.

    Args:
        model: the model whose state dict is written.
        out_dir: a folder that does not exist yet or is empty.
        state_dict: whole tensors to write in place of the model's own, for a sharded model.
        report: what was pruned, for `sparsity.json`.
        recipe: the recipe as plain values, for `sparsity.json`.
        overwrite: see `check_free`.

    Returns:
        The file with the weights.

    Raises:
        ValueError: if the folder is not empty.
    """
    tensors = _whole_tensors(model.state_dict() if state_dict is None else state_dict)
    with new_folder(out_dir, overwrite=overwrite) as folder:
        if importlib.util.find_spec("safetensors") is None:
            name = "model.pt"
            torch.save(tensors, folder / name)
        else:
            from safetensors.torch import save_file

            name = "model.safetensors"
            save_file(tensors, str(folder / name))
        write_note(folder, report=report, recipe=recipe)
    return Path(out_dir).expanduser() / name


def _whole_tensors(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors; a tensor that several names share is copied, so that every name loads."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            continue
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors
