"""The average absolute gradient: its recursion, and that it does not look at the weight."""

import numpy as np
import torch

from lightning_prune.statistics.grad_magnitude import GradMagnitude


def test_the_average_is_a_weighted_mean_of_all_steps() -> None:
    grads = np.random.default_rng(0).normal(size=(5, 2, 3))
    statistic = GradMagnitude(torch.zeros(2, 3), 3, beta=0.8)
    for grad in grads:
        statistic.update(torch.zeros(2, 3), torch.from_numpy(grad).float())
    share = 0.8 ** np.arange(4, -1, -1)
    expected = np.tensordot(share / share.sum(), np.abs(grads), 1)
    np.testing.assert_allclose(statistic.compute().numpy(), expected, rtol=1e-5)
    assert int(statistic.num_steps) == 5
    assert statistic.source == "step"
