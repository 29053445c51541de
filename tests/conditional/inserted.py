"""Insert a method into a tiny model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.stack import candidate_stacks
from tests.structured.families import build, randomised

__all__ = ["decoded", "insert", "model_of", "tokens"]


def model_of(name: str) -> Any:
    """Return a tiny model of three layers with every parameter random, in evaluation mode."""
    if name == "gpt2":
        return randomised(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=64)))
    return randomised(build(name))


def insert(method: ConditionMethod, model: nn.Module) -> Any:
    return method.insert(model, next(candidate_stacks(model, Blueprint(model))))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None, *, ends: tuple[int, ...]) -> Tensor:
    """Return the logits of a text that is read in pieces with a cache; the pieces end where told."""
    cache, found, start = None, [], 0
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    for end in ends:
        piece = {"input_ids": ids_BT[:, start:end], "attention_mask": mask_BT[:, :end]}
        output = model(**piece, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, end
        found.append(output.logits)
    return torch.cat(found, 1)
