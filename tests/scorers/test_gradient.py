"""Gradient: the average absolute gradient, pruned weights included."""

import pytest
import torch

from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.gradient import Gradient
from lightning_prune.statistics.grad_magnitude import GradMagnitude


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    first = torch.tensor([[1.0, -2.0, 0.0, 4.0], [0.5, 0.5, -0.5, 0.0]])
    scorer = Gradient(beta=0.75)
    statistic = GradMagnitude(weight, 4, **scorer.needs["grad_magnitude"])
    statistic.update(weight, first)
    statistic.update(weight, -3 * first)
    # (0.75 * 0.25 * 1 + 0.25 * 3) / (1 - 0.75^2) of the first
    expected = first.abs() * (0.1875 + 0.75) / 0.4375
    target = Target(name="w", weight_OI=weight, row_start=0, num_rows=2)
    found = scorer.score(target, Stats({"grad_magnitude": statistic.compute()}, 2, 0))
    torch.testing.assert_close(found, expected)
    assert found[0, 3] > found[0, 2]  # a pruned weight with a gradient beats a large one without


def test_it_wants_the_gradients_of_pruned_weights() -> None:
    assert Gradient().dense_grad
    assert Gradient().needs == {"grad_magnitude": {"beta": 0.9}}
    assert Gradient().scope == "tensor"


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_an_average_over_nothing_or_everything_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta must be in \[0, 1\), got {beta}; 0 uses the latest step alone"):
        Gradient(beta=beta)
