"""Magnitude: absolute values, in float32 whatever the weights are."""

import numpy as np
import pytest
import torch

from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.magnitude import Magnitude, magnitude_score


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, -0.0], [-3.0, 0.0, 4.0, -0.25]])
    score = magnitude_score(weight)
    assert score.tolist() == [[1.0, 2.0, 0.5, 0.0], [3.0, 0.0, 4.0, 0.25]]
    target = Target(name="w", weight_OI=weight, row_start=0, num_rows=2)
    assert torch.equal(Magnitude().score(target, Stats({}, 0, 0)), score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_against_numpy_in_other_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    score = magnitude_score(weight)
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), np.abs(weight.double().numpy()).astype(np.float32))


def test_it_needs_nothing_and_ranks_tensors_by_default() -> None:
    assert Magnitude().needs == {}
    assert Magnitude().scope == "tensor"
    assert not Magnitude().dense_grad
