"""Movement: what the released formula accumulates, and which weights gain."""

import numpy as np
import torch

from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.movement import Movement
from lightning_prune.statistics.movement import Movement as MovementStatistic


def scored(weights: list[torch.Tensor], grads: list[torch.Tensor]) -> torch.Tensor:
    statistic = MovementStatistic(weights[0], weights[0].shape[1])
    for weight, grad in zip(weights, grads, strict=True):
        statistic.update(weight, grad)
    target = Target(name="w", weight_OI=weights[-1], row_start=0, num_rows=len(weights[-1]))
    return Movement().score(target, Stats({"movement": statistic.compute()}, 2, 0))


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.0, 1.0, 1.0, 3.0]])
    grad = torch.tensor([[1.0, 1.0, -1.0, -1.0], [5.0, 0.0, 2.0, -1.0]])
    expected = [[-1.0, 1.0, 2.0, -2.0], [0.0, 0.0, -2.0, 3.0]]
    assert scored([weight], [grad]).tolist() == expected
    assert scored([weight] * 3, [grad] * 3).tolist() == (3 * torch.tensor(expected)).tolist()


def test_a_weight_that_grows_away_from_zero_gains_and_one_that_shrinks_loses() -> None:
    # descent moves weights against their gradient, so growth is weight * gradient < 0
    weight = torch.tensor([[0.5, -0.5, 0.5, -0.5]])
    grad = torch.tensor([[-1.0, 1.0, 1.0, -1.0]])
    moved = weight - 0.1 * grad
    gains = scored([moved], [grad]) > 0
    assert torch.equal(gains, moved.abs() > weight.abs())


def test_the_sum_is_minus_the_gradient_of_trainable_scores() -> None:
    # eq. 4 of the paper: with forward W * mask(S) and a straight-through mask, dL/dS = dL/dW' * W
    generator = np.random.default_rng(0)
    weights, grads = generator.normal(size=(4, 3, 5)), generator.normal(size=(4, 3, 5))
    expected = -(weights * grads).sum(0)
    found = scored([torch.from_numpy(w).float() for w in weights], [torch.from_numpy(g).float() for g in grads])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_it_needs_movement_and_ranks_tensors_by_default() -> None:
    assert Movement().needs == {"movement": {}}
    assert Movement().scope == "tensor"
    assert not Movement().dense_grad
