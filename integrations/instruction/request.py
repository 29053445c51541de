"""What a request to a model is, as token ids: text, the messages of a chat, or the ids themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.base.names import brief

__all__ = ["padded", "tokens_of"]


def tokens_of(prompt: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the token ids of one prompt.

    Args:
        prompt: text, the messages of a chat, which the tokenizer's template turns into the beginning of an answer, or
            token ids, (T,) or (1, T).
        tokenizer: of the model; None if prompts are given as ids.

    Raises:
        ValueError: if it is empty, there are several, or a tokenizer is needed.
    """
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    is_list = isinstance(prompt, list | tuple)
    if is_list and len(prompt) == 1 and isinstance(prompt[0], list | tuple):
        prompt = prompt[0]
    if not (prompt.strip() if isinstance(prompt, str) else is_list and prompt):
        raise ValueError(
            f"the prompt is empty ({brief(prompt)}), so nothing says which sub-network it needs; give the text of the "
            "instruction, or the name of a task"
        )
    if is_list and all(isinstance(part, int) for part in prompt):
        return tuple(prompt)
    if is_list and not all(isinstance(part, Mapping) for part in prompt):
        raise ValueError(
            f"one sub-model serves one instruction, got {len(prompt)} prompts; select them one by one, or use "
            "generate, which groups prompts by their masks"
        )
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so a prompt must be given as token ids")
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    chat = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)
    return tuple(chat["input_ids"])


def padded(tokens: Sequence[Sequence[int]], *, pad: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) of rows of unequal length, and their attention mask (B, T)."""
    longest = max(map(len, tokens))
    holes = [[0] * (longest - len(row)) for row in tokens]
    rows = [(row, hole) if side == "right" else (hole, row) for row, hole in zip(tokens, holes, strict=True)]
    there = [[1] * len(row) for row in tokens]
    marks = [(row, hole) if side == "right" else (hole, row) for row, hole in zip(there, holes, strict=True)]
    attention_BT = torch.tensor([[*first, *second] for first, second in marks])
    ids_BT = torch.tensor([[*first, *second] for first, second in rows])
    return ids_BT.masked_fill(attention_BT == 0, pad), attention_BT
