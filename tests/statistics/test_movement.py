"""The sum of -weight * gradient: signs kept, low precision summed in float32."""

import pytest
import torch

from lightning_prune.statistics.movement import Movement


def test_the_sum_keeps_signs_and_all_steps() -> None:
    statistic = Movement(torch.zeros(1, 2), 2)
    statistic.update(torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, 0.5]]))
    statistic.update(torch.tensor([[1.0, -1.0]]), torch.tensor([[-4.0, 1.0]]))
    assert statistic.compute().tolist() == [[-1.0 + 4.0, 1.5 + 1.0]]
    assert int(statistic.num_steps) == 2
    assert statistic.source == "step"


def test_small_steps_in_bfloat16_are_not_lost() -> None:
    statistic = Movement(torch.zeros(1, 1, dtype=torch.bfloat16), 1)
    one, small = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), -(2.0**-10), dtype=torch.bfloat16)
    statistic.update(one, -one)
    for _ in range(64):
        statistic.update(one, small)  # 1 + 2^-10 is 1 in bfloat16
    assert statistic.compute().item() == pytest.approx(1 + 64 * 2.0**-10)
