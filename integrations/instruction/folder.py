"""The folder of a model that chooses its sub-network from the instruction: write it whole, and open it again.

    config.json, *.safetensors, tokenizer   the parent, which stock `from_pretrained` loads without this library
    instruction/predictor.safetensors       the predictor
    instruction/tasks.safetensors           scores of the units for tasks that have a name, if there are any
    instruction/instruction.json            the options, what was masked, and the digests of all files of weights

The parent's weights and the predictor belong together: a predictor beside other weights would choose units by what
they no longer compute, so the digests are checked when a folder is opened.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_prune.base.plain_values import plain, read
from lightning_prune.conditional.instruction import NAME, Instruction, InstructionCondition
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.export.huggingface import export_huggingface
from lightning_prune.integrations.models.hf_open import load_model
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import check_seal, sealed
from lightning_prune.structured.structure import Stack

__all__ = ["is_conditional", "open_any", "open_conditional", "read_tasks", "save_conditional", "take_predictor"]

FORMAT = 1
ROOM = "instruction"  # the folder inside the folder
_ABOUT, _PREDICTOR, _TASKS = "instruction.json", "predictor.safetensors", "tasks.safetensors"
_CHUNK = 1 << 24  # bytes read at a time


def save_conditional(
    condition: InstructionCondition,
    folder: str | PathLike[str],
    *,
    tokenizer: Any = None,
    state: Mapping[str, Tensor] | None = None,
    tasks: Mapping[str, Sequence[Tensor]] | None = None,
    recipe: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model and its predictor into a new folder; written aside and renamed.

    Args:
        condition: at work in the model.
        folder: one that does not exist yet or is empty.
        tokenizer: anything with `save_pretrained`, or None.
        state: whole tensors in place of the model's own, the predictor's among them, for a sharded model; of a model
            below adapters with these merged.
        tasks: name -> scores of the units of each group, (U,), for sub-models that are chosen by name.
        recipe: as plain values, for `sparsity.json`.
        overwrite: whether an earlier export of this library may be replaced.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder is not empty, or the model cannot be written.
    """
    predictor, parent = _split(condition.model.state_dict() if state is None else state)

    def beside(partial: Path) -> None:
        room = partial / ROOM
        room.mkdir()
        _write(room / _PREDICTOR, predictor)
        if tasks:
            _write(room / _TASKS, {f"{task}/{idx}": one for task in tasks for idx, one in enumerate(tasks[task])})
        about = _about(condition) | {"files": _digests(partial, sorted(partial.rglob("*.safetensors")))}
        (room / _ABOUT).write_text(json.dumps(sealed(about), indent=2) + "\n", encoding="utf-8")

    return export_huggingface(
        condition.model,
        folder,
        tokenizer=tokenizer,
        state_dict=parent,
        merges=bool(getattr(condition.model, "peft_config", None)),
        recipe=recipe,
        overwrite=overwrite,
        beside=beside,
    )


def is_conditional(folder: str | PathLike[str]) -> bool:
    """Return whether a folder is one that `save_conditional` wrote."""
    return (Path(folder).expanduser() / ROOM / _ABOUT).is_file()


def open_conditional(
    folder: str | PathLike[str], *, device: str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, InstructionCondition, Any]:
    """Open a folder that `save_conditional` wrote.

    Args:
        folder: the folder.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Returns:
        The model in evaluation mode, the condition at work in it, and the tokenizer, None where there is none.

    Raises:
        ValueError: if it is no such folder, of another version, damaged, or its files do not belong together.
    """
    path = Path(folder).expanduser()
    about = _read_about(path)
    _check_files(path, about["files"])
    options: Instruction = read(ConditionMethod, about["options"], "options")
    model, tokenizer = load_model(str(path), device=device, trust_remote_code=trust_remote_code)
    structure = discover(model, kinds=list(options.kinds))
    condition = options.insert(model, structure.stack or Stack((), "", (), 0), structure)
    found = {group.key: group.num_units for group in condition.predictor.units.groups}
    if found != about["groups"]:
        raise ValueError(
            f"{path} masks {len(about['groups'])} groups of units, and in the model other ones are found now "
            f"({len(found)}): open it with the versions of this library and of Transformers that wrote it"
        )
    condition.load(load_file(path / ROOM / _PREDICTOR))
    condition.predictor.encoder.use_tokenizer(tokenizer)
    model.eval()
    return model, condition, tokenizer


def take_predictor(folder: str | PathLike[str], condition: InstructionCondition) -> str | None:
    """Give a condition, new in the model of a folder, the predictor of this folder.

    Returns:
        None, or why it is another one than the condition's, in words; then nothing was changed.

    Raises:
        ValueError: if the folder is damaged.
    """
    path = Path(folder).expanduser()
    about = _read_about(path)
    found = condition.options.differences(read(ConditionMethod, about["options"], "options"))
    if found is None:
        _check_files(path, about["files"])
        condition.load(load_file(path / ROOM / _PREDICTOR))
    return found


def open_any(name: str, *, device: str = "auto", trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """Open a model and its tokenizer; with its predictor at work, if there is one in the folder.

    Raises:
        ValueError: if it cannot be opened, or the predictor was not trained.
    """
    if is_conditional(name):
        model, condition, tokenizer = open_conditional(name, device=device, trust_remote_code=trust_remote_code)
        if not condition.predictor.is_trained:
            raise ValueError(
                f"the predictor in {name} was not trained, so its masks would be drawn by chance; write the small "
                "model of a named task with lightning-prune select, and open that"
            )
        return model, tokenizer
    return load_model(name, device=device, trust_remote_code=trust_remote_code)


def read_tasks(folder: str | PathLike[str]) -> dict[str, list[Tensor]]:
    """Return the scores of the units for each named task of a folder, (U,) for each group."""
    path = Path(folder).expanduser()
    file = path / ROOM / _TASKS
    _check_files(path, {name: one for name, one in _read_about(path)["files"].items() if path / name == file})
    tasks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in load_file(file).items() if file.is_file() else ():
        task, _, idx = name.rpartition("/")
        tasks.setdefault(task, {})[int(idx)] = tensor
    return {task: [scores[idx] for idx in sorted(scores)] for task, scores in tasks.items()}


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the predictor's tensors under their names in it, and all others."""
    prefix = f"{NAME}."
    predictor = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not predictor:
        raise ValueError(f"the tensors to save hold no {NAME}, so the model would be saved without its predictor")
    return predictor, {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def _about(condition: InstructionCondition) -> dict[str, Any]:
    groups = condition.predictor.units.groups
    return {
        "format": FORMAT,
        "options": plain(condition.options),
        "groups": {group.key: group.num_units for group in groups},
        "keep": {group.key: keep for group, keep in zip(groups, condition.predictor.keep, strict=True)},
    }


def _read_about(path: Path) -> dict[str, Any]:
    """Return what stands in a folder's `instruction.json`.

    Raises:
        ValueError: if the file is not there, of another version or damaged.
    """
    file = path / ROOM / _ABOUT
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} holds no {ROOM}/{_ABOUT}, so no predictor belongs to this model; train one with a recipe's "
            "section condition, or open the folder with from_pretrained"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is no JSON ({error}); copy the folder again") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise ValueError(f"{file} has format {found!r}, and this version reads {FORMAT}; use the version that wrote it")
    check_seal(about, what=str(file), cure="copy the folder again")
    return about


def _check_files(path: Path, digests: Mapping[str, str]) -> None:
    """Check that files of weights are those that were written.

    Raises:
        ValueError: naming the first that is not.
    """
    found = _digests(path, [path / name for name in digests if (path / name).is_file()])
    for name in sorted(digests):
        if found.get(name) != digests[name]:
            what = "is missing" if name not in found else "is not the file that was written"
            raise ValueError(
                f"{path / name} {what}: the predictor was trained with other weights, or a copy is damaged; copy the "
                "folder again, or train the predictor with these weights"
            )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _digests(path: Path, files: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their names in a folder."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_digest, files))
    return {file.relative_to(path).as_posix(): one for file, one in zip(files, found, strict=True)}


def _digest(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(_CHUNK):
            sha.update(part)
    return sha.hexdigest()
