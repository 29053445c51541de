"""Try on a model whether leaving tokens out gives what computing and mixing gives, before it is relied on.

Shapes: B sequences, T tokens.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.calibration.walk import evaluating
from lightning_prune.conditional.sparse_block import SparseBlock
from lightning_prune.structured.discovery.probe import difference, tolerance
from lightning_prune.structured.discovery.probe_inputs import probe_inputs

__all__ = ["make_sparse"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def make_sparse(model: nn.Module, blocks: Sequence[SparseBlock]) -> None:
    """Let blocks leave out tokens where that is proven on a few calls: prompts, padding, decoding with a cache.

    Args:
        model: that they stand in, installed.
        blocks: of the model, in order.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    with evaluating(model), torch.autocast(next(model.parameters()).device.type, enabled=False):
        inputs = probe_inputs(model)
        for block in blocks:
            block.is_prepared = False
        model(**inputs)
        sparse = [block for block in blocks if block.is_sparse]
        reason = "its blocks hand no keys and values to a cache" if not sparse else ""
        least = blocks[0].least
        for number, block in enumerate(blocks):
            block.trial, block.least = number, 1
        for call in _calls(model, inputs) if sparse else ():
            reason = reason or _why_not(call, sparse)
    for block in blocks:
        block.is_sparse, block.trial, block.least = block.is_sparse and not reason, None, least
    if reason:
        distributed.log(
            logger,
            logging.WARNING,
            "%s computes tokens that blocks skip all the same and leaves out the result: %s",
            type(model).__name__,
            reason,
        )


def _why_not(call: Callable[[], Tensor], sparse: Sequence[SparseBlock]) -> str:
    """Return why a call does not give the same when tokens are left out; empty if it does."""
    try:
        got = call()
        for block in sparse:
            block.is_sparse = False
        expected = call()
    except Exception as error:  # noqa: BLE001 - what a class does with fewer tokens is its own
        return f"its blocks do not run with some of their tokens ({type(error).__name__})"
    finally:
        for block in sparse:
            block.is_sparse = True
    if difference(got, expected) <= tolerance(expected):
        return ""
    return "the logits differ when they are left out"


def _calls(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[Callable[[], Tensor]]:
    """Yield calls to try; each returns logits."""
    ids: Any = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    yield lambda: model(**inputs, use_cache=False).logits
    if set(inputs) == {"input_ids"}:
        yield lambda: model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        yield lambda: _decoded(model, ids, torch.ones_like(ids))
        yield lambda: _decoded(model, ids, mask)


def _decoded(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the logits of a prompt, of several tokens behind it, and of tokens one by one."""
    length = ids_BT.shape[1]
    cache, found, start = None, [], 0
    for end in (length - 3, length - 1, length):
        output = model(
            input_ids=ids_BT[:, start:end], attention_mask=mask_BT[:, :end], past_key_values=cache, use_cache=True
        )
        cache, start = output.past_key_values, end
        found.append(output.logits)
    return torch.cat(found, 1)
