"""Choose the calibration text of a one-shot run, and hold some of it out to measure the loss before and after.

Shapes: N sequences, T tokens of each.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lightning_prune.calibration.walk import evaluating
from lightning_prune.integrations.models.hf_open import predicts_next_token
from lightning_prune.integrations.text.hf_calibration import text_batches
from lightning_prune.integrations.text.self_text import own_text
from lightning_prune.integrations.text.text_documents import Document, read_documents
from lightning_prune.structured.depth.criteria import model_logits, next_token_targets, sequence_losses, token_mean

__all__ = ["Passages", "Text", "calibration_windows", "longest_sequence", "text_loss"]

logger = logging.getLogger(__name__)

_LONGEST = 2048  # tokens; the length used by the papers that prune from calibration text
_NUM_HELD_OUT = 16  # sequences
_MEASURED_LENGTH = 256  # tokens, where the model writes text to measure its loss and for nothing else
_SHORTEST = 16  # tokens that are held out at least
_AT_A_TIME = 128  # sequences that a small model writes together
_SMALL = 2**28  # parameters times sequences up to which more than a batch is written together
_CHARACTERS = 16  # read for each token from a data set without an end

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Passages:
    """Text in batches: what the choice is made from, and what the loss is measured on.

    `held_out` names the text of the loss, or says why none is measured.
    """

    calibration: Batches
    held_out: Batches
    about: str

    def loss(self, model: nn.Module, *, title: str) -> float | None:
        """Return the next-token loss on the held-out text, in nats; None where it is not measured."""
        return text_loss(model, self.held_out, title=title)

    def tell(self, before: float | None, after: float | None) -> None:
        """Say the loss before and after, or why it is not known."""
        if before is None or after is None:
            logger.info("loss before and after: not measured, %s", self.about)
            return
        ratios = [math.exp(min(loss, 700.0)) for loss in (before, after)]
        logger.info("loss on %s: %.4f before, %.4f after (perplexity %.4g, %.4g)", self.about, before, after, *ratios)


@dataclass(frozen=True, kw_only=True)
class Text:
    """The calibration text: where it is, and how much of it is used.

    Args:
        data: a file or a folder (texts, or chats in the field `messages`); `DATASET[:CONFIG[:SPLIT]]` of the hub;
            `self`, text that the model writes; `python`, the sources of Python's standard library. Left out, `self`,
            or `python` for models that write no text.
        num_sequences: how many sequences.
        sequence_length: tokens per sequence; the longest the model reads, 2048 at most, if left out.
        batch_size: sequences that go through the model together.
        seed: of the text that the model writes.

    Raises:
        ValueError: if a number is below 1.
    """

    data: str | None = None
    num_sequences: int = 128
    sequence_length: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_sequences", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}")

    def read(self) -> list[Document] | None:
        """Return the documents of `data`; None where the model is to write the text, or nothing is named.

        Raises:
            ValueError: if there is no text.
        """
        if self.data in (None, "self"):
            return None
        if self.data == "python":
            return read_documents()
        wanted = (self.num_sequences + _NUM_HELD_OUT) * (self.sequence_length or _LONGEST)
        return read_documents(self.data, max_characters=wanted * _CHARACTERS)

    def passages(
        self, model: PreTrainedModel, tokenizer: Any, documents: list[Document] | None = None, *, needed: bool = True
    ) -> Passages:
        """Return the text in batches.

        Args:
            model: which reads the text, and may write it.
            tokenizer: of the model, or None.
            documents: what `read` returned.
            needed: whether the run looks at text; otherwise it is held out whole, and may be missing.

        Raises:
            ValueError: if there is no tokenizer or too little text, or the model fails to write it.
        """
        length = self.sequence_length or longest_sequence(model)
        if not needed and not predicts_next_token(model):
            return Passages([], [], f"{type(model).__name__} predicts no next token")
        if documents is None and self.data is None and not predicts_next_token(model):
            logger.info(
                "calibration text: sources of Python's standard library, as %s writes no text; --data names another",
                type(model).__name__,
            )
            documents = read_documents()
        if documents is None:
            return self._own(model, length if needed else min(length, _MEASURED_LENGTH), needed)
        return self._given(model, tokenizer, documents, length, needed)

    def _own(self, model: PreTrainedModel, length: int, needed: bool) -> Passages:
        number = self.num_sequences if needed else 0
        logger.info(
            "%s: written by the model itself, %d sequences of %d tokens, seed %d; --data names another text",
            "calibration text" if needed else "text to measure the loss on",
            number + _NUM_HELD_OUT,
            length,
            self.seed,
        )
        try:
            ids_NT = own_text(
                model,
                num_sequences=number + _NUM_HELD_OUT,
                sequence_length=length,
                batch_size=min(_AT_A_TIME, max(self.batch_size, _SMALL // _num_parameters(model))),
                seed=self.seed,
            )
        except ValueError as error:
            if needed or self.data is not None:
                raise
            return Passages([], [], str(error))
        return self._split(model, ids_NT, number, "that the model wrote")

    def _given(
        self, model: PreTrainedModel, tokenizer: Any, documents: Sequence[Document], length: int, needed: bool
    ) -> Passages:
        number = self.num_sequences if needed else 0
        ids = _tokens(tokenizer, documents, (number + _NUM_HELD_OUT) * length)
        if len(ids) < number * length:
            raise ValueError(_too_little(len(ids), number, length))
        ids_NT = _windows(ids, length)
        tail_T = torch.tensor(ids[len(ids_NT) * length :])
        if len(ids_NT) == number and len(tail_T) >= _SHORTEST:
            calibration = text_batches(model, ids_NT, batch_size=self.batch_size) if number else []
            return self._measurable(model, calibration, tail_T[None])
        return self._split(model, ids_NT, number, "")

    def _split(self, model: PreTrainedModel, ids_NT: Tensor, number: int, origin: str) -> Passages:
        calibration = text_batches(model, ids_NT[:number], batch_size=self.batch_size) if number else []
        return self._measurable(model, calibration, ids_NT[number:], origin)

    def _measurable(self, model: PreTrainedModel, calibration: Batches, held_NT: Tensor, origin: str = "") -> Passages:
        if not predicts_next_token(model):
            return Passages(calibration, [], f"{type(model).__name__} predicts no next token")
        if not len(held_NT):
            about = "the calibration text itself, which is too short to hold some out"
            return Passages(calibration, calibration, about)
        about = f"{len(held_NT)} held-out sequences of {held_NT.shape[1]} tokens"
        return Passages(
            calibration, text_batches(model, held_NT, batch_size=self.batch_size), f"{about} {origin}".rstrip()
        )


def calibration_windows(
    tokenizer: Any, documents: Sequence[Document], *, num_sequences: int, sequence_length: int
) -> Tensor:
    """Tokenise documents one after the other and cut the tokens into windows.

    Returns:
        ids_NT.

    Raises:
        ValueError: if there is no tokenizer or the text is too short.
    """
    ids = _tokens(tokenizer, documents, num_sequences * sequence_length)
    if len(ids) < num_sequences * sequence_length:
        raise ValueError(_too_little(len(ids), num_sequences, sequence_length))
    return _windows(ids, sequence_length)


def longest_sequence(model: PreTrainedModel) -> int:
    """Return how many tokens a calibration sequence has at most: what the model reads, 2048 at most."""
    config: Any = model.config.get_text_config()
    return min(_LONGEST, int(getattr(config, "max_position_embeddings", None) or _LONGEST))


@torch.no_grad()
def text_loss(model: nn.Module, batches: Sequence[dict[str, Tensor]], *, title: str) -> float | None:
    """Return the mean negative log likelihood per token, in nats; None without batches."""
    total = torch.zeros(2, dtype=torch.float64)
    with evaluating(model):
        for batch in tqdm(batches, desc=title, disable=not batches):
            logits_BTV, inputs = model_logits(model, batch)
            targets_BT, chosen_BT = next_token_targets(inputs)
            total += token_mean(*sequence_losses(logits_BTV[:, :-1], targets_BT, chosen_BT)).cpu()
    return float(total[0] / total[1]) if batches else None


def _num_parameters(model: nn.Module) -> int:
    return max(1, sum(parameter.numel() for parameter in model.parameters()))


def _tokens(tokenizer: Any, documents: Sequence[Document], wanted: int) -> list[int]:
    """Return the tokens of documents one after the other, as many as are wanted or as there are."""
    if tokenizer is None:
        raise ValueError("calibration needs a tokenizer, and the model has none; save one into its folder")
    ids: list[int] = []
    is_chat = bool(getattr(tokenizer, "chat_template", None))
    if not is_chat and any(document.messages for document in documents):
        logger.warning("the tokenizer has no chat template, so messages are read as plain text, one after the other")
    for document in documents:
        if len(ids) >= wanted:
            break
        if document.messages and is_chat:
            text = tokenizer.apply_chat_template([dict(one) for one in document.messages], tokenize=False)
            ids.extend(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
        else:
            ids.extend(tokenizer(document.text, verbose=False)["input_ids"])
    return ids[:wanted]


def _windows(ids: Sequence[int], length: int) -> Tensor:
    number = len(ids) // length
    return torch.tensor(ids[: number * length], dtype=torch.int64).reshape(number, length)


def _too_little(found: int, num_sequences: int, length: int) -> str:
    fitting = found // length
    hint = f"--num_sequences {fitting}, or " if fitting else ""
    return (
        f"the calibration text gives {found} tokens, {num_sequences} sequences of {length} need "
        f"{num_sequences * length}; give more text, or {hint}a shorter --sequence_length"
    )
