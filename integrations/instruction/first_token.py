"""Time how the first token of a conditioned model comes about: predicting units, gathering them, prefill.

Everything happens on the model as it stands, on one prompt; the medians of a few rounds are returned.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_prune.base import distributed
from lightning_prune.calibration.walk import evaluating
from lightning_prune.conditional.instruction import NAME, InstructionCondition
from lightning_prune.predictors.sub_model import Selection, SubModels

__all__ = ["first_token"]

_NUM_ROUNDS = 5


@torch.no_grad()
def first_token(condition: InstructionCondition, ids_1T: Tensor) -> dict[str, Any]:
    """Serve one prompt, and say how long each part takes.

    Args:
        condition: at work in the model, whose tensors are whole.
        ids_1T: the prompt, which is the instruction too.

    Returns:
        seconds of `predicting`, `gathering` and `prefill`, and of the `whole_prefill` of all units; `difference`, the
        largest between the logits of the small model and those of the masked whole; `num_tokens` and `device`.

    Raises:
        ValueError: if no small model can be gathered.
    """
    model, predictor = condition.model, condition.predictor
    if any(distributed.is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError("the model is sharded over processes, and a small model is gathered from whole tensors")
    sub_models = SubModels(model, predictor.units.groups, without=NAME)
    prompt = condition.options.reads.find({"input_ids": ids_1T}, is_training=False)

    def select() -> Selection:
        masks = predictor.masks(predictor.scores(prompt.ids, prompt.attention))
        return Selection.of(masks, predictor.keep)

    def whole() -> Any:
        with condition.whole():
            return model(input_ids=ids_1T)

    seconds: dict[str, list[float]] = {name: [] for name in ("predicting", "gathering", "prefill", "whole_prefill")}
    with evaluating(model):
        sub_models.gather(select())  # builds the class of the small model
        for _ in range(_NUM_ROUNDS):
            selection = _timed(seconds["predicting"], select, ids_1T)
            small = _timed(seconds["gathering"], partial(sub_models.gather, selection), ids_1T)
            logits = _timed(seconds["prefill"], partial(small, input_ids=ids_1T), ids_1T).logits
            _timed(seconds["whole_prefill"], whole, ids_1T)
        masked = model(input_ids=ids_1T).logits
    found: dict[str, Any] = {name: median(taken) for name, taken in seconds.items()}
    found["difference"] = float((logits - masked).abs().max())
    return found | {"num_tokens": int(ids_1T.shape[1]), "device": str(ids_1T.device)}


def _timed(seconds: list[float], work: Callable[[], Any], near: Tensor) -> Any:
    """Do a piece of work, and note what it took until the device of a tensor had finished it."""
    began = time.perf_counter()
    result = work()
    if near.device.type == "cuda":
        torch.cuda.synchronize(near.device)
    seconds.append(time.perf_counter() - began)
    return result
