"""Taylor: the change of the loss to first order, against really removing a weight."""

import pytest
import torch

from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.statistics.weight_grad import WeightGrad


def scored(scorer: Taylor, weight: torch.Tensor, *grads: torch.Tensor) -> torch.Tensor:
    """Feed gradients as optimizer steps and score."""
    statistic = WeightGrad(weight, weight.shape[1], **scorer.needs["weight_grad"])
    for grad in grads:
        statistic.update(weight, grad)
    target = Target(name="w", weight_OI=weight, row_start=0, num_rows=len(weight))
    return scorer.score(target, Stats({"weight_grad": statistic.compute()}, 1, 0))


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.0], [2.0, 2.0, -1.0, 1.0]])
    grad = torch.tensor([[2.0, 1.0, -1.0, 9.0], [0.0, 1.0, 1.0, -4.0]])
    assert scored(Taylor(beta=0.0), weight, grad).tolist() == [[2.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 4.0]]
    # one step, whatever the average: the start at zero is corrected
    torch.testing.assert_close(scored(Taylor(beta=0.9), weight, grad), (weight * grad).abs())
    # two steps at 0.9: (0.09 * first + 0.1 * second) / (1 - 0.81)
    expected = (0.09 * (weight * grad).abs() + 0.1 * (weight * 2 * grad).abs()) / 0.19
    torch.testing.assert_close(scored(Taylor(beta=0.9), weight, grad, 2 * grad), expected)


def test_a_linear_loss_changes_by_the_score_when_a_weight_goes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, requires_grad=True)
    direction = torch.randn(3, 4, generator=generator)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return (values * direction).sum()

    (grad,) = torch.autograd.grad(loss(weight), weight)
    score = scored(Taylor(beta=0.0), weight.detach(), grad)
    for row in range(3):
        for col in range(4):
            without = weight.detach().clone()
            without[row, col] = 0
            change = abs(float(loss(without) - loss(weight.detach())))
            assert score[row, col].item() == pytest.approx(change, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_an_average_over_nothing_or_everything_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta must be in \[0, 1\), got {beta}; 0 uses the latest step alone"):
        Taylor(beta=beta)


def test_it_needs_gradients_and_ranks_tensors_by_default() -> None:
    assert Taylor().needs == {"weight_grad": {"beta": 0.9}}
    assert Taylor().scope == "tensor"
    assert not Taylor().dense_grad
