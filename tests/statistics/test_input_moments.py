"""Mean and variance of inputs: by hand, in parts, against a large mean, merged by adding."""

import numpy as np
import pytest
import torch

from lightning_prune.statistics.input_moments import InputMoments


def test_by_hand() -> None:
    moments = InputMoments(torch.ones(1, 3), 3)
    moments.update(torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 0.0]]))
    moments.update(torch.tensor([[5.0, 5.0, 3.0]]))
    torch.testing.assert_close(moments.compute(), torch.tensor([8 / 3, 0.0, 2.0]))
    torch.testing.assert_close(moments.mean(), torch.tensor([3.0, 5.0, 1.0]))
    assert moments.compute().dtype == moments.mean().dtype == torch.float32
    assert moments.source == "input"


def test_the_mean_can_be_read_between_updates() -> None:
    moments = InputMoments(torch.ones(1, 1), 1)
    moments.update(torch.tensor([[1.0]]))
    assert float(moments.mean()) == 1.0
    moments.update(torch.tensor([[3.0]]))
    assert float(moments.mean()) == 2.0


def test_parts_of_any_size_give_the_variance_of_the_whole() -> None:
    inputs = torch.randn(41, 6, generator=torch.Generator().manual_seed(0)) * 3 + 2
    moments = InputMoments(torch.ones(1, 6), 6)
    for part in inputs.split(7):
        moments.update(part)
    np.testing.assert_allclose(moments.compute().numpy(), inputs.double().numpy().var(0), rtol=1e-6)
    np.testing.assert_allclose(moments.mean().numpy(), inputs.double().numpy().mean(0), rtol=1e-6)


@pytest.mark.parametrize("level", [1e3, 1e5])
def test_a_small_variance_on_a_large_mean_is_seen(level: float) -> None:
    moments = InputMoments(torch.ones(1, 1), 1)
    moments.update(torch.tensor([[level - 1], [level + 1]]))  # in float32 the squares would cancel
    assert float(moments.compute()) == pytest.approx(1.0, rel=1e-4)


def test_a_constant_has_no_variance() -> None:
    moments = InputMoments(torch.ones(1, 1), 1)
    moments.update(torch.full((1000, 1), 0.1, dtype=torch.bfloat16))
    assert 0 <= float(moments.compute()) < 1e-15


def test_ranks_are_merged_by_adding() -> None:
    moments = InputMoments(torch.ones(1, 2), 2)
    assert set(moments._reductions) == {"sum_of_inputs", "sum_of_squares", "num_tokens"}
    parts = torch.stack([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    assert all(reduce(parts).tolist() == [4.0, 6.0] for reduce in moments._reductions.values())
