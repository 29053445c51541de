"""Random: the same draw for the same seed, step and name, and nothing like the weights."""

import zlib

import pytest
import torch

from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.random import Random, random_score


def scored(*, seed: int = 0, step: int = 0, name: str = "w", row_start: int = 0, num_rows: int = 2) -> torch.Tensor:
    weight = torch.zeros(num_rows, 4)
    target = Target(name=name, weight_OI=weight, row_start=row_start, num_rows=6)
    return Random().score(target, Stats({}, step, seed))


def test_by_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(b"3/7/w"))
    assert torch.equal(random_score("w", 2, 4, seed=3, step=7), 1 - torch.rand(2, 4, generator=generator))


def test_seed_step_and_name_each_change_the_draw() -> None:
    draws = [scored(), scored(seed=1), scored(step=1), scored(name="v")]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[i + 1 :])
    assert torch.equal(scored(), draws[0])


def test_rows_of_a_shard_are_those_of_the_whole() -> None:
    whole = scored(num_rows=6)
    assert torch.equal(scored(row_start=4), whole[4:])
    assert torch.equal(scored(row_start=0), whole[:2])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    scored()
    assert torch.equal(torch.rand(3), expected)


def test_draws_are_above_zero_and_even() -> None:
    draws = random_score("w", 200, 200, seed=0, step=0)
    assert draws.min() > 0
    assert draws.max() <= 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)  # standard error 0.0014


def test_it_needs_nothing() -> None:
    assert Random().needs == {}
    assert Random().scope == "tensor"
    assert not Random().dense_grad
