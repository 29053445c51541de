"""Tiny models with routers in them, in the state that some training leaves."""

import copy
import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.conditional.conditional_adapter import ConditionalAdapter
from lightning_prune.conditional.expert_choice import ExpertChoice
from lightning_prune.conditional.heavy_light import HeavyLight
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.conditional.token_router import RoutedTokens, TokenRouter
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.stack import candidate_stacks
from lightning_prune.structured.structure import Stack
from tests.tiny_models import tiny_family, token_windows

METHODS: dict[str, ConditionMethod] = {
    "conditional_adapter": ConditionalAdapter(adapter_width=4, ramp=0, reduction=2.5),
    "heavy_light": HeavyLight(share=0.4, ramp=0),
    "expert_choice": ExpertChoice(num_experts=3, capacity=1.2, ramp=0),
}


def stack_of(model: PreTrainedModel) -> Stack:
    """Return the blocks of a model; of an encoder-decoder those of the encoder."""
    return next(s for s in candidate_stacks(model, Blueprint(model)) if s.containers != ("decoder.block",))


def inserted(family: str, method: ConditionMethod) -> tuple[PreTrainedModel, RoutedTokens]:
    """Return a tiny model with a method in it, in evaluation mode."""
    model = tiny_family(family).eval()
    condition = method.insert(model, stack_of(model))
    assert isinstance(condition, RoutedTokens)
    return model, condition


def narrowed(family: str, method: ConditionMethod, num_steps: int = 3) -> tuple[PreTrainedModel, RoutedTokens]:
    """Return the same after some optimizer steps without a ramp: fewer tokens are chosen, and adapters are not zero."""
    model, condition = inserted(family, method)
    condition.begin(total_steps=num_steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(num_steps):
        ids = token_windows(4, 12, seed=seed)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    return model.eval(), condition


@functools.cache
def _trained(family: str, method: ConditionMethod) -> PreTrainedModel:
    return narrowed(family, method)[0]


def trained(family: str, method: ConditionMethod) -> PreTrainedModel:
    """Return a copy of the model that `narrowed` gives, made once."""
    return copy.deepcopy(_trained(family, method))


def routers_of(model: torch.nn.Module) -> list[TokenRouter]:
    """Return the routers of a model in order."""
    return [module for module in model.modules() if isinstance(module, TokenRouter)]


def logits(model: PreTrainedModel, ids_NT: Tensor, **arguments: object) -> Tensor:
    """Return what a model gives without gradients."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_NT, **arguments).logits
    return found
