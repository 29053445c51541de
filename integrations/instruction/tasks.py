"""One sub-network per task without any training: by Wanda, from calibration texts of each task.

The cheap sibling of a trained predictor, served in the same way: `select(task=NAME)`. It chooses by a task's name, not
by an instruction.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.bounds import at_least
from lightning_prune.conditional.instruction import Instruction, Predictor
from lightning_prune.integrations.instruction.request import padded
from lightning_prune.integrations.instruction.serving import CACHE_BYTES, InstructionModel
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.predictors.task_scores import task_scores
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.structure import Stack

__all__ = ["model_of_tasks"]


def model_of_tasks(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    budget: Budget,
    max_tokens: int = 512,
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
    options = Instruction(
        budget=budget, predictor=Predictor(hidden=1), choice=SoftTopK(hard=True), start=None, guard=None
    )
    structure = discover(model, kinds=list(options.kinds))
    condition = options.insert(model, structure.stack or Stack((), "", (), 0), structure)
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
