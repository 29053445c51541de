"""Fluctuation: squared weight times input variance, by hand and against the released form of the formula."""

import numpy as np
import pytest
import torch

from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.fluctuation import Fluctuation, fluctuation_score


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.0, 1.0, -1.0]])
    variance = torch.tensor([4.0, 3.0, 0.5])
    score = fluctuation_score(weight, variance)
    assert score.tolist() == [[4.0, 12.0, 4.5], [0.0, 3.0, 0.5]]
    target = Target(name="w", weight_OI=weight, row_start=0, num_rows=2)
    assert torch.equal(Fluctuation().score(target, Stats({"input_moments": variance}, 0, 0)), score)
    assert Fluctuation().needs == {"input_moments": {}}


def test_columns_add_up_to_the_published_score() -> None:
    # CASIA-IVA-Lab/FLAP: fluctuation * sum over rows of the squared weights
    generator = np.random.default_rng(0)
    weight, inputs = generator.normal(size=(6, 8)), generator.normal(size=(50, 8))
    published = inputs.var(0) * (weight**2).sum(0)
    ours = fluctuation_score(torch.from_numpy(weight), torch.from_numpy(inputs.var(0))).sum(0)
    np.testing.assert_allclose(ours.numpy(), published, rtol=1e-5)


def test_a_constant_input_scores_zero_however_large_its_weights() -> None:
    assert fluctuation_score(torch.full((2, 1), 1e6), torch.zeros(1)).tolist() == [[0.0], [0.0]]


def test_arithmetic_is_float32() -> None:
    score = fluctuation_score(torch.full((1, 1), 300.0, dtype=torch.float16), torch.ones(1))
    assert score.item() == 90000.0  # above the largest float16


def test_variances_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="weight has 3 input features, variance_I has 4; collect the variances"):
        fluctuation_score(torch.ones(2, 3), torch.ones(4))
