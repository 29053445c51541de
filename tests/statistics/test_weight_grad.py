"""The average of |weight * gradient|: its recursion and the correction of its start."""

import numpy as np
import pytest
import torch

from lightning_prune.statistics.weight_grad import WeightGrad


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_average_is_a_weighted_mean_of_all_steps(beta: float) -> None:
    generator = np.random.default_rng(0)
    weights, grads = generator.normal(size=(6, 3, 4)), generator.normal(size=(6, 3, 4))
    statistic = WeightGrad(torch.ones(3, 4), 4, beta=beta)
    for weight, grad in zip(weights, grads, strict=True):
        statistic.update(torch.from_numpy(weight).float(), torch.from_numpy(grad).float())
    share = beta ** np.arange(5, -1, -1) if beta else np.eye(6)[5]
    expected = np.tensordot(share / share.sum(), np.abs(weights * grads), 1)
    np.testing.assert_allclose(statistic.compute().numpy(), expected, rtol=1e-5)


def test_low_precision_is_multiplied_in_float32() -> None:
    statistic = WeightGrad(torch.ones(1, 1, dtype=torch.float16), 1, beta=0.0)
    small = torch.full((1, 1), 2e-4, dtype=torch.float16)
    statistic.update(small, small)  # the product is below the smallest float16
    assert statistic.compute().item() == pytest.approx(float(small) ** 2, rel=1e-5)
    assert statistic.compute().dtype == torch.float32


def test_it_is_fed_by_steps_and_lies_with_its_weight() -> None:
    statistic = WeightGrad(torch.ones(2, 3), 3, beta=0.9)
    assert statistic.source == "step"
    assert statistic.average.shape == (2, 3)
    assert not statistic.update_called
