"""Which tokens of a batch are the instruction that the predictor reads.

    prefix   what the labels leave out at the start of each row: the prompt of instruction tuning
    chunk    the first tokens of each row of plain text, which then count no more towards the loss: the pair form of
             continued pre-training, mask from one chunk, loss on the next

Without labels, in evaluation, all tokens of the call are the prompt, as in the first call of `generate`.

Source: Hou et al., Instruction-Following Pruning, arXiv 2501.02086, section 3.3. Dropping the beginning of an
    instruction is our own: a predictor that sees whole instructions alone does harm where one is worded anew.

Shapes: B rows, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.base.bounds import at_least

__all__ = ["Prompt", "Reads"]

IGNORED = -100  # the label of a token that the loss leaves out


@dataclass(frozen=True)
class Prompt:
    """The tokens that the predictor reads, (B, T), and which of them are there; labels in place of the batch's."""

    ids: Tensor
    attention: Tensor
    labels: Tensor | None = None

    def marks(self, length: int) -> Tensor:
        """Return which of so many tokens of each row are read, (B, length) of int64."""
        return torch.nn.functional.pad(self.attention.long(), (0, length - self.attention.shape[1]))


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Where the instruction stands in a batch.

    Args:
        source: `prefix` or `chunk`, see the module text.
        chunk: tokens of the chunk.
        max_tokens: of an instruction, from its start; what is longer is not read to its end.
        dropout: probability with which, in training, the beginning of an instruction is not read: up to its half.
    """

    source: Literal["prefix", "chunk"] = "prefix"
    chunk: int | None = None
    max_tokens: int = 512
    dropout: float = 0.2

    def __post_init__(self) -> None:
        at_least(1, chunk=self.chunk, max_tokens=self.max_tokens)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if (self.source == "chunk") != (self.chunk is not None):
            raise ValueError(f"chunk, in tokens, goes with source: chunk; got source {self.source}, chunk {self.chunk}")

    def find(self, batch: Mapping[str, Any], *, is_training: bool) -> Prompt:
        """Find the instruction in the arguments of a call.

        Args:
            batch: `input_ids`, and `attention_mask`, `labels`, `instruction_mask` (B, T) where there are any.
            is_training: whether labels must tell it.

        Raises:
            ValueError: if there is no instruction in it.
        """
        ids_BT, attention_BT, labels_BT = (batch.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if not isinstance(ids_BT, Tensor):
            raise ValueError(
                "the predictor reads tokens, and this call of the model has no input_ids; call it with input_ids, not "
                "with embeddings"
            )
        there_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        if isinstance(attention_BT, Tensor) and attention_BT.shape == ids_BT.shape:
            there_BT = attention_BT.bool()
        given_BT = batch.get("instruction_mask")
        if isinstance(given_BT, Tensor):
            read_BT = there_BT & given_BT.bool()
        elif self.chunk is not None and (is_training or isinstance(labels_BT, Tensor)):
            read_BT = there_BT & (there_BT.long().cumsum(-1) <= self.chunk)
            labels_BT = None if labels_BT is None else self._behind(labels_BT, read_BT)
        elif isinstance(labels_BT, Tensor):
            read_BT = there_BT & ((labels_BT != IGNORED).long().cumsum(-1) == 0)
        elif is_training:
            raise ValueError(
                "the model is trained without labels in its call, so nothing says which tokens are the instruction; "
                "pass labels that are -100 over it, or instruction_mask"
            )
        else:
            read_BT = there_BT
        return self._checked(ids_BT, read_BT, labels_BT)

    def _behind(self, labels_BT: Tensor, read_BT: Tensor) -> Tensor:
        """Return the labels without those of the chunk.

        Raises:
            ValueError: if no row is longer than the chunk.
        """
        left_BT = labels_BT.masked_fill(read_BT, IGNORED)
        if not torch.compiler.is_compiling() and not bool((left_BT[:, 1:] != IGNORED).any()):
            raise ValueError(
                f"no row of this batch has a token to learn behind its chunk of {self.chunk} tokens: rows have "
                f"{labels_BT.shape[1]}; take longer rows, or a smaller reads.chunk"
            )
        return left_BT

    def _checked(self, ids_BT: Tensor, read_BT: Tensor, labels_BT: Tensor | None) -> Prompt:
        read_BT = read_BT & (read_BT.long().cumsum(-1) <= self.max_tokens)
        if torch.compiler.is_compiling():  # a compiled step cannot ask what is in a tensor
            return Prompt(ids_BT, read_BT, labels_BT)
        if not bool(read_BT.any(-1).all()):
            row = int((~read_BT.any(-1)).nonzero()[0])
            raise ValueError(
                f"row {row} of this batch has no instruction: its labels leave out no token at its start. Train on "
                "completions alone (prompt and completion columns, completion_only_loss), drop empty prompts, or take "
                "source: chunk for plain text"
            )
        last = int(read_BT.any(0).nonzero()[-1]) + 1
        return Prompt(ids_BT[:, :last], read_BT[:, :last], labels_BT)

    def dropped(self, prompt: Prompt, step: Tensor, seed: int) -> Prompt:
        """Return the prompt with the beginnings of some instructions left out.

        Which ones follows from the tokens, the step and the seed, not from the place of a row in a batch or on a rank.
        """
        if not self.dropout:
            return prompt
        place_BT = (prompt.attention.long().cumsum(-1) - 1).clamp(min=0)
        code_B = ((prompt.ids + 1) * (2 * place_BT + 3) * prompt.attention).sum(-1)
        code_B = _mixed(code_B + _mixed(step.to(code_B.device) + (seed << 20)))
        is_cut_B = (code_B & 0xFFFF) < int(self.dropout * 0x10000)
        half_B = (prompt.attention.sum(-1) // 2).clamp(min=1)
        cut_B = torch.where(is_cut_B, (code_B >> 16) % half_B + 1, 0)
        cut_B = torch.minimum(cut_B, prompt.attention.sum(-1) - 1)
        return Prompt(prompt.ids, prompt.attention & (place_BT >= cut_B.unsqueeze(-1)), prompt.labels)


def _mixed(code: Tensor) -> Tensor:
    """Return whole numbers in which every bit hangs on every bit, 0 to 2^47."""
    for factor in (0x9E3779B1, 0x85EBCA77):
        code = code * factor
        code = code ^ ((code >> 29) & 0x7FFFFFFFF)
    return code & 0x7FFFFFFFFFFF
