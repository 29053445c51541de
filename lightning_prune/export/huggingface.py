"""Write a model as a Hugging Face folder that stock `from_pretrained` loads, zeros included."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.base.types import Report
from lightning_prune.export.folder import check_free, new_folder, write_note, write_plan_note

__all__ = ["check_form", "check_huggingface", "export_huggingface"]


def check_huggingface(
    model: nn.Module, out_dir: str | PathLike[str], *, merges: bool = False, overwrite: bool = False
) -> None:
    """Check, before any work is done, that `export_huggingface` can write this model there.

    Args:
        model: a model with `save_pretrained`.
        out_dir: a folder that does not exist yet or is empty.
        merges: whether the tensors to write are those of the model without its adapters.
        overwrite: see `check_free`.

    Raises:
        ValueError: if the folder is not empty, or the model cannot be written in this form.
    """
    check_free(out_dir, overwrite=overwrite)
    check_form(model, merges=merges)


def check_form(model: nn.Module, *, merges: bool = False) -> None:
    """Check that a model can be written in this form at all.

    Args:
        model: a model with `save_pretrained`.
        merges: whether the tensors to write are those of the model without its adapters.

    Raises:
        ValueError: if it cannot.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise ValueError(
            f"export format huggingface needs save_pretrained, which {type(model).__name__} lacks; use format dense"
        )
    if getattr(model, "peft_config", None) and not merges:
        raise ValueError(
            "export format huggingface would write the adapters and not the pruned weights below them; "
            "use format dense, a recipe with recover.lora, or remove the adapters first"
        )


def export_huggingface(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    tokenizer: Any = None,
    state_dict: Mapping[str, Tensor] | None = None,
    report: Report | None = None,
    recipe: Mapping[str, object] | None = None,
    plan_note: Mapping[str, object] | None = None,
    merges: bool = False,
    overwrite: bool = False,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write model, tokenizer, `sparsity.json` and `lightning_prune.json` into a new folder.

    Args:
        model: a model with `save_pretrained`.
        out_dir: a folder that does not exist yet or is empty.
        tokenizer: anything with `save_pretrained`, or None.
        state_dict: whole tensors to write in place of the model's own, for a sharded model.
        report: what was pruned, for `sparsity.json`.
        recipe: the recipe as plain values, for `sparsity.json`.
        plan_note: what was cut, for `lightning_prune.json`; None if nothing was.
        merges: whether `state_dict` is that of the model without its adapters, merged or left out.
        overwrite: see `check_free`.
        beside: writes more into the folder.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder is not empty, or the model cannot be written in this form.
    """
    check_huggingface(model, out_dir, merges=merges, overwrite=overwrite)
    save: Any = model.save_pretrained
    with new_folder(out_dir, overwrite=overwrite) as folder:
        save(folder) if state_dict is None else save(folder, state_dict=dict(state_dict))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_note(folder, report=report, recipe=recipe)
        if plan_note is not None:
            write_plan_note(folder, plan_note)
        if beside is not None:
            beside(folder)
    return Path(out_dir).expanduser()
