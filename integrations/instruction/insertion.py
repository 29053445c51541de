"""Put a conditional method into a model of a training: new, or going on with the predictor that is there."""

import copy
import importlib
import logging
from typing import Any

import torch
from torch import nn

from lightning_prune.base import distributed
from lightning_prune.conditional.instruction import NAME as PREDICTOR
from lightning_prune.conditional.instruction import Instruction, InstructionCondition
from lightning_prune.conditional.method import Condition, ConditionMethod
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.stack import candidate_stacks
from lightning_prune.structured.structure import Stack

__all__ = ["base_model", "insert"]

logger = logging.getLogger(__name__)


def insert(method: ConditionMethod, model: nn.Module, *, is_below_adapters: bool) -> Condition:
    """Insert the method; below adapters, what it needs to know of the model is found in a copy without them."""
    there = getattr(model, PREDICTOR, None)
    if there is not None:
        if not isinstance(method, Instruction) or there.condition is None or not there.is_trained:
            raise ValueError(
                f"this {type(model).__name__} has a {PREDICTOR} already, of another Trainer that has not trained "
                "it yet, or of another method; hand that callback to this Trainer, or take it off first: "
                f"model.{PREDICTOR}.condition.remove()"
            )
        taken = method.take_over(there.condition)
        _say_trained(taken, "the model")
        return taken
    plain = _without_adapters(model) if is_below_adapters else model
    if not isinstance(method, Instruction):
        return method.insert(model, _stack(plain))
    condition = method.insert(model, _stack(plain), plain=plain)
    folder = str(getattr(model, "name_or_path", ""))
    if folder and _saving().is_conditional(folder):
        left_out = _saving().take_predictor(folder, condition)
        if left_out is None:
            _say_trained(condition, folder)
        else:
            said = "the predictor in %s %s: this training starts with a new one"
            distributed.log(logger, logging.WARNING, said, folder, left_out)
    return condition


def _say_trained(condition: InstructionCondition, where: str) -> None:
    said = "going on with the predictor of %s, trained for %d steps: no start from importance, and no ramp"
    distributed.log(logger, logging.INFO, said, where, condition.step)


def _saving() -> Any:
    return importlib.import_module("lightning_prune.integrations.instruction.folder")


def base_model(model: nn.Module) -> nn.Module:
    """Return the model below adapters, or the model itself."""
    below = getattr(model, "get_base_model", None)
    return below() if callable(below) and getattr(model, "peft_config", None) else model


def _without_adapters(model: nn.Module) -> nn.Module:
    """Return a model of the same class and configuration with random weights, on the processor."""
    build: Any = type(model)
    with torch.random.fork_rng():
        plain: nn.Module = build(copy.deepcopy(model.config))
    return plain.eval()


def _stack(model: nn.Module) -> Stack:
    try:
        found = next(candidate_stacks(model, Blueprint(model)), None)
    except ValueError as error:
        raise ValueError(f"the blocks of {type(model).__name__} were not found: {error}") from error
    if found is None:
        raise ValueError(f"{type(model).__name__} has no list of blocks that its configuration counts")
    return found
