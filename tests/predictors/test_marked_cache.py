"""Masks follow the rows of a key/value cache, whoever moves them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conditional.test_instruction import batch, conditioned
from tests.tiny_models import tiny_llama

MOVES: dict[str, tuple[Callable[[Any], object], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("is_copy", [False, True])
@torch.no_grad()
def test_masks_follow_the_rows_of_a_cache(name: str, is_copy: bool) -> None:
    model = tiny_llama().eval()
    conditioned(model)
    ids = batch(3)["input_ids"]
    first = model(ids, use_cache=True)
    cache = copy.deepcopy(first.past_key_values) if is_copy else first.past_key_values
    move, rows = MOVES[name]
    last = ids[:, -1:]
    expected = model(last, past_key_values=copy.deepcopy(cache)).logits
    move(cache)
    found = model(last[rows], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-6)


@torch.no_grad()
def test_rows_that_nothing_tells_of_are_refused() -> None:
    model = tiny_llama().eval()
    conditioned(model)
    ids = batch(3)["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers if hasattr(cache, "layers") else ():
        layer.keys, layer.values = layer.keys[:2], layer.values[:2]
    with pytest.raises(ValueError, match="that 3 rows filled is read by 2"):
        model(ids[:2, -1:], past_key_values=cache)
