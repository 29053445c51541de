import pytest
from torch import nn

from lightning_prune.predictors.model_cache import ModelCache


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = ModelCache(20)
    models = [nn.Identity() for _ in range(3)]
    cache.put("a", "A", models[0], 10)
    cache.put("b", "B", models[1], 10)
    assert cache.get("a") is models[0]
    cache.put("c", "C", models[2], 10)
    assert cache.get("b") is None
    assert cache.get("a") is models[0]
    assert (len(cache), cache.num_bytes) == (2, 20)


def test_equal_models_are_held_once() -> None:
    cache = ModelCache(20)
    model = nn.Identity()
    cache.put("a", "A", model, 10)
    assert cache.get("b") is None
    assert cache.get("b", "A") is model
    assert cache.get("b") is model
    assert cache.digest("b") == "A"
    assert cache.num_bytes == 10
    cache.put("c", "C", nn.Identity(), 15)
    assert cache.get("a") is cache.get("b") is cache.get("b", "A") is None


def test_a_model_larger_than_the_budget_sends_none_away() -> None:
    cache = ModelCache(20)
    cache.put("a", "A", nn.Identity(), 10)
    cache.put("b", "B", nn.Identity(), 21)
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.clear()
    assert len(cache) == 0


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_bytes must be"):
        ModelCache(-1)
