"""Write the small model of one instruction or task as a plain model folder, for `lightning-prune select`."""

from os import PathLike
from pathlib import Path
from typing import Any

from lightning_prune.export.folder import check_free
from lightning_prune.export.huggingface import export_huggingface
from lightning_prune.export.plan_note import num_parameters, plan_note
from lightning_prune.integrations.instruction.serving import InstructionModel

__all__ = ["export_selected"]


def export_selected(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    instruction: str | None = None,
    task: str | None = None,
    keep: float | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write the small model of an instruction, with the tokenizer, and return its folder.

    Stock `from_pretrained` loads it without this library; `lightning_prune.json` in it says which units stayed.

    Args:
        model: a folder with a model and its predictor.
        out: a folder that does not exist yet or is empty.
        instruction: the text that chooses.
        task: the name of a task that is stored in the folder instead.
        keep: share of the units, within the range that the model was trained over.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Raises:
        ValueError: if there is neither or both of instruction and task, they cannot be served, or the folder is taken.
    """
    if (instruction is None) == (task is None):
        raise ValueError("select takes either --instruction or --task; give one of them")
    check_free(out)
    served = InstructionModel.from_pretrained(model, device=device, cache_bytes=0, trust_remote_code=trust_remote_code)
    selection = served.selection(instruction, task=task, keep=keep)
    small: Any = served.sub_models.gather(selection)
    added = num_parameters(served.condition.predictor)
    asked = {"instruction": instruction, "task": task, "keep": keep}
    method = {"class_path": "Instruction", **{name: value for name, value in asked.items() if value is not None}}
    note = plan_note(
        selection.plan(served.sub_models.groups, **method),
        parent=served.model,
        repaired=True,  # the masks' numbers lie in the weights
        metrics={"parameters": {"before": num_parameters(served.model) - added, "after": num_parameters(small)}},
    )
    return export_huggingface(small, out, tokenizer=served.tokenizer, plan_note=note)
