"""Activations: the same number for a whole column, whatever its weights."""

import pytest
import torch

from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.activation import Activation, activation_score


def test_by_hand() -> None:
    weight = torch.tensor([[9.0, -2.0, 0.0], [0.0, 1.0, -7.0]])
    score = activation_score(weight, torch.tensor([0.5, 3.0, 2.0]))
    assert score.tolist() == [[0.5, 3.0, 2.0], [0.5, 3.0, 2.0]]


@pytest.mark.parametrize(
    ("scorer", "statistic"), [(Activation(), "activation"), (Activation(aggregate="l2"), "input_norm")]
)
def test_the_aggregate_names_the_statistic(scorer: Activation, statistic: str) -> None:
    assert scorer.needs == {statistic: {}}
    target = Target(name="w", weight_OI=torch.ones(2, 2).bfloat16(), row_start=0, num_rows=2)
    score = scorer.score(target, Stats({statistic: torch.tensor([1.001, 2.0])}, 0, 0))
    assert torch.equal(score, torch.tensor([[1.001, 2.0], [1.001, 2.0]]))


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="weight has 3 input features, activation_I has 4; collect the activations"):
        activation_score(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="aggregate must be minitron or l2, got 'mean'"):
        Activation(aggregate="mean")  # type: ignore[arg-type]
