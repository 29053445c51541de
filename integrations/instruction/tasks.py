"""One sub-network per task without any training: by Wanda, from calibration texts of each task.

The cheap sibling of a trained predictor, served in the same way: `select(task=NAME)`. It chooses by a task's name, not
by an instruction.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.conditional.task_units import TaskUnits
from lightning_prune.export.folder import check_free
from lightning_prune.integrations.instruction.folder import is_conditional
from lightning_prune.integrations.instruction.request import padded
from lightning_prune.integrations.instruction.serving import CACHE_BYTES, InstructionModel
from lightning_prune.integrations.models.hf_open import load_model
from lightning_prune.integrations.text.text_documents import read_documents
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.collapse import overlaps
from lightning_prune.predictors.soft_top_k import kept
from lightning_prune.predictors.task_scores import task_scores
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.structure import Stack

__all__ = ["model_of_tasks", "read_task_texts", "run_tasks"]

logger = logging.getLogger(__name__)
_CHARACTERS = 1 << 20  # of each task that are read
_MAX_TOKENS = 512


def run_tasks(
    recipe: Recipe,
    *,
    model: str,
    out: str,
    data: str | None,
    num_sequences: int = 128,
    sequence_length: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write a model with the units of each named task into a new folder, and return it.

    Args:
        recipe: with a section `condition` of `TaskUnits`.
        model: a model folder or a hub id.
        out: a folder that does not exist yet or is empty.
        data: a folder, see `read_task_texts`.
        num_sequences: of each task, at most.
        sequence_length: tokens per sequence, at most; 512 if left out.
        batch_size: sequences at a time.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Raises:
        ValueError: if an input is wrong; nothing has been written then.
    """
    assert isinstance(recipe.condition, TaskUnits)
    check_free(out)
    texts = read_task_texts(data)
    if is_conditional(model):
        raise ValueError(f"{model} has a predictor already; give the model that it was made from")
    network, tokenizer = load_model(model, device=device, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer to read the texts of the tasks with")
    served = model_of_tasks(
        network,
        tokenizer,
        texts,
        budget=recipe.condition.budget,
        max_tokens=sequence_length or _MAX_TOKENS,
        max_sequences=num_sequences,
        batch_size=batch_size,
        cache_bytes=0,
    )
    _tell(served)
    return served.save_pretrained(out)


def read_task_texts(data: str | None) -> dict[str, list[str]]:
    """Return name -> texts of every task.

    Args:
        data: a folder with a file (.txt, .md, .py, .jsonl) or a folder of such files for each task, which is named
            like it; what begins with a dot is left out.

    Raises:
        ValueError: if there is no such folder, it is empty, two tasks have one name, or one has no text.
    """
    root = None if data is None else Path(data).expanduser()
    if root is None or not root.is_dir():
        raise ValueError(
            f"--data must be a folder with a file or a folder of texts for each task, got {data}; the tasks are named "
            "like these"
        )
    found: dict[str, list[str]] = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        name = entry.name if entry.is_dir() else entry.stem
        if name in found:
            raise ValueError(f"two tasks in {root} are named {name}; rename one of them")
        found[name] = [document.text for document in read_documents(str(entry), max_characters=_CHARACTERS)]
    if not found:
        raise ValueError(f"{root} is empty; put a file or a folder of texts for each task into it")
    return found


def _tell(served: InstructionModel) -> None:
    """Log what was chosen, and how much of it tasks share."""
    predictor = served.condition.predictor
    by_group = [torch.stack(scores) for scores in zip(*served.tasks.values(), strict=True)]
    shares = torch.tensor(overlaps([kept(one, k).bool() for one, k in zip(by_group, predictor.keep, strict=True)]))
    num, rows = len(shares), ", ".join(served.tasks)
    said = "%d tasks (%s), each with %d of %d FFN units of a block"
    distributed.log(logger, logging.INFO, said, num, rows, predictor.keep[0], predictor.units.groups[0].num_units)
    if num > 1:
        shared = 100 * float(shares[~torch.eye(num, dtype=torch.bool)].mean())
        distributed.log(logger, logging.INFO, "two tasks share %.0f %% of their units (mean Jaccard index)", shared)


def model_of_tasks(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    budget: Budget,
    max_tokens: int = _MAX_TOKENS,
    max_sequences: int = 128,
    batch_size: int = 8,
    cache_bytes: int = CACHE_BYTES,
) -> InstructionModel:
    """Return a model that serves each task with the units that matter most to the task's texts.

    Args:
        model: a Hugging Face decoder, put into evaluation mode; its weights stay.
        tokenizer: of the model.
        texts: name of the task -> calibration texts.
        budget: how many FFN units stay; with `keep_from`, `select` takes any share of that range.
        max_tokens: of a sequence; longer texts are cut into several.
        max_sequences: of a task, from its beginning.
        batch_size: sequences at a time.
        cache_bytes: see `InstructionModel`.

    Raises:
        ValueError: if there is no task, a task has no text, or the model's units cannot be masked.
    """
    at_least(1, max_tokens=max_tokens, max_sequences=max_sequences, batch_size=batch_size)
    if not texts:
        raise ValueError("there is no task; give the name of each with some of its texts")
    for name, documents in texts.items():
        if not name or isinstance(documents, str) or not any(text.strip() for text in documents):
            raise ValueError(f"the task {name!r} needs a name and a list of calibration texts that are not empty")
    condition = TaskUnits(budget=budget).insert(model, Stack((), "", (), 0))
    served = InstructionModel(condition, tokenizer, cache_bytes=cache_bytes)
    with condition.whole():
        for name, documents in texts.items():
            pieces = list(itertools.islice(_pieces(documents, tokenizer, max_tokens), max_sequences))
            batches = _batches(pieces, batch_size, model.device)
            served.tasks[name] = [one.cpu() for one in task_scores(model, served.sub_models.groups, batches)]
    return served


def _pieces(documents: Sequence[str], tokenizer: Any, max_tokens: int) -> Iterator[list[int]]:
    """Yield the tokens of texts, in pieces."""
    for text in documents:
        tokens = tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
        for start in range(0, len(tokens), max_tokens):
            yield tokens[start : start + max_tokens]


def _batches(pieces: Sequence[list[int]], batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield pieces of text, padded on the right; those of one length together."""
    by_length = sorted(pieces, key=len)
    for start in range(0, len(by_length), batch_size):
        ids, there = padded(by_length[start : start + batch_size], pad=0, side="right")
        yield {"input_ids": ids.to(device), "attention_mask": there.to(device)}
