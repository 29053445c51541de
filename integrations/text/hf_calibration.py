"""What calibration text is to a model: which of its inputs it fills, and what cannot be learned from it.

Shapes: N sequences, T tokens of each.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.base.types import Scorer
from lightning_prune.calibration.observation import Observation
from lightning_prune.integrations.models.hf_open import predicts_next_token
from lightning_prune.structured.discovery.probe import reached
from lightning_prune.structured.structure import Structure
from lightning_prune.targets.targets import find_blocks

__all__ = ["check_text_fits", "read_by_text", "text_batches", "text_part_alone"]

logger = logging.getLogger(__name__)


def check_text_fits(model: PreTrainedModel, method: object) -> None:
    """Check that a model reads text, and that what a method asks of it, text alone gives for this model.

    Gradients and next-token losses need labels; text holds those of language models alone.

    Args:
        model: the model to prune.
        method: a scorer, a structured method, or the name of another user of text.

    Raises:
        ValueError: if the model reads something else, or predicts something that plain text does not hold.
    """
    name = method if isinstance(method, str) else type(method).__name__
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{name} looks at calibration text, but {type(model).__name__} reads {model.main_input_name}; use a method "
            "that looks at weights alone (a Magnitude scorer), or call the library with batches of your own"
        )
    scorer = getattr(method, "scorer", method)
    takes_gradients = isinstance(scorer, Scorer) and Observation(scorer, []).has_steps
    compares_logits = hasattr(method, "criterion")
    is_two_sided = bool(getattr(model.config, "is_encoder_decoder", False)) and model.can_generate()
    has_labels = predicts_next_token(model) or (is_two_sided and not compares_logits)
    if (takes_gradients or compares_logits) and not has_labels:
        what = "a loss" if takes_gradients else "the prediction of the next token"
        raise ValueError(
            f"{name} needs {what}, and for {type(model).__name__} plain text gives none; use a method that looks at "
            "weights or at inputs of layers (Magnitude, Wanda), or call the library with labelled batches"
        )


def text_batches(model: PreTrainedModel, ids_NT: Tensor, *, batch_size: int) -> list[dict[str, Tensor]]:
    """Return batches for `model(**batch)`: with labels where text gives them, and decoder inputs where they are read.

    A model that answers once per row, and has no padding token to find the end of each, gets one row at a time.
    """
    config: Any = model.config
    is_two_sided = bool(getattr(config, "is_encoder_decoder", False))
    has_labels = predicts_next_token(model) or (is_two_sided and model.can_generate())
    if not has_labels and getattr(config.get_text_config(), "pad_token_id", None) is None:
        batch_size = 1
    batches = []
    for ids in ids_NT.to(model.device).split(batch_size):
        batch = {"input_ids": ids}
        shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if is_two_sided:
            has_start = callable(shift) and getattr(config, "decoder_start_token_id", None) is not None
            batch["decoder_input_ids"] = shift(labels=ids) if has_start else ids
        if has_labels:
            batch["labels"] = ids
        batches.append(batch)
    return batches


def read_by_text(structure: Structure, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> Structure:
    """Return what can be cut in the part of a model that reads text; no text says what counts in a tower for images."""
    away = _unread(model, batches)
    if not away:
        return structure
    logger.info("left as they are, since text does not reach them: %s", ", ".join(away))
    groups = {
        key: group for key, group in structure.groups.items() if not group.name.startswith(tuple(f"{n}." for n in away))
    }
    return dataclasses.replace(structure, groups=groups)


@contextmanager
def text_part_alone(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
    """Take the towers that text does not reach out of a model, so that its blocks are those of the text part."""
    towers = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in _unread(model, batches)
    ]
    taken = [(parent, dict(parent._modules)) for parent, _ in towers]
    try:
        for parent, leaf in towers:
            del parent._modules[leaf]
        yield
    finally:
        for parent, modules in reversed(taken):
            parent._modules.clear()
            parent._modules.update(modules)


def _unread(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Return the outermost modules with blocks of their own of which text calls nothing."""
    called = reached(model, [{name: value[:1] for name, value in batch.items()} for batch in batches[:1]])
    found: list[str] = []
    for name, module in model.named_modules() if called else ():
        is_called = any(f"{other}.".startswith(f"{name}.") for other in called) if name else True
        is_inside = name.startswith(tuple(f"{outer}." for outer in found)) if found else False
        if not is_called and not is_inside and hasattr(module, "config") and find_blocks(module):
            found.append(name)
    return found
