"""Uniform: one number for all."""

import torch

from lightning_prune.allocations.uniform import Uniform
from tests.allocations.rankings import ranking


def test_every_target_gets_the_sparsity_of_the_schedule() -> None:
    scores = {"a": torch.rand(2, 2), "b": torch.rand(30, 4)}
    assert Uniform().split(0.37, ranking(scores, Uniform())) == {"a": 0.37, "b": 0.37}
    assert not Uniform().uses_scores
