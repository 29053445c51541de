"""Write the small model of one instruction or task as a plain model folder, for `lightning-prune select`."""

from os import PathLike
from pathlib import Path
from typing import Any

from lightning_prune.export.folder import check_free
from lightning_prune.export.huggingface import export_huggingface
from lightning_prune.export.plan_note import num_parameters, plan_note
from lightning_prune.integrations.instruction.folder import is_conditional
from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.integrations.instruction.tasks import model_of_tasks
from lightning_prune.integrations.models.hf_open import load_model
from lightning_prune.integrations.text.text_documents import read_documents
from lightning_prune.predictors.budget import Budget

__all__ = ["export_selected"]

_CHARACTERS = 1 << 20  # of the texts that are read


def export_selected(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    instruction: str | None = None,
    task: str | None = None,
    texts: str | None = None,
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
        texts: or, for a model without a predictor, a file or folder with calibration texts of the task.
        keep: share of the units, within the range that the model was trained over; needed with texts.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Raises:
        ValueError: if not exactly one of instruction, task and texts is given, it cannot be served, or the folder is
            taken.
    """
    if sum(value is not None for value in (instruction, task, texts)) != 1:
        raise ValueError("select takes either --instruction or --task or --texts; give one of them")
    check_free(out)
    opening: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    if texts is not None:
        served = _from_texts(str(model), texts, keep, **opening)
        selection = served.selection(task=texts)
    else:
        served = InstructionModel.from_pretrained(model, cache_bytes=0, **opening)
        selection = served.selection(instruction, task=task, keep=keep)
    small: Any = served.sub_models.gather(selection)
    added = num_parameters(served.condition.predictor)
    asked = {"instruction": instruction, "task": task, "texts": texts, "keep": keep}
    method = {"class_path": "Instruction", **{name: value for name, value in asked.items() if value is not None}}
    note = plan_note(
        selection.plan(served.sub_models.groups, **method),
        parent=served.model,
        repaired=True,  # the masks' numbers lie in the weights
        metrics={"parameters": {"before": num_parameters(served.model) - added, "after": num_parameters(small)}},
    )
    return export_huggingface(small, out, tokenizer=served.tokenizer, plan_note=note)


def _from_texts(model: str, texts: str, keep: float | None, **opening: Any) -> InstructionModel:
    """Return a model that serves one task, which is named like its texts, without any training."""
    if is_conditional(model):
        raise ValueError(f"{model} has a predictor; choose with --instruction, or by --texts from a model without one")
    if keep is None:
        raise ValueError("--texts needs --keep, the share of the FFN units that stays, in (0, 1]")
    documents = [document.text for document in read_documents(texts, max_characters=_CHARACTERS)]
    parent, tokenizer = load_model(model, **opening)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer to read {texts} with")
    return model_of_tasks(parent, tokenizer, {texts: documents}, budget=Budget(keep=keep), cache_bytes=0)
