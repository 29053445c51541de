"""GlobalRank: what a common sort keeps of each target, above a floor."""

import math

import pytest
import torch

from lightning_prune.allocations.global_rank import GlobalRank
from tests.allocations.rankings import ranking, weighted_mean


def kept(scores: dict[str, torch.Tensor], sparsity: float, **options: float) -> dict[str, int]:
    allocation = GlobalRank(**options)
    sparsities = allocation.split(sparsity, ranking(scores, allocation))
    return {name: round((1 - sparsities[name]) * score.numel()) for name, score in scores.items()}


def test_by_hand() -> None:
    scores = {"a": torch.tensor([[9.0, 8.0, 7.0, 1.0]]), "b": torch.tensor([[6.0, 5.0, 2.0, 1.0]])}
    assert kept(scores, 0.5) == {"a": 3, "b": 1}


def test_counts_are_those_of_a_common_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(20, 10, generator=generator) * scale for name, scale in zip("abc", (1, 2, 3), strict=True)
    }
    cut = torch.cat([score.reshape(-1) for score in scores.values()]).sort(descending=True).values[299]
    expected = {name: int((score >= cut).sum()) for name, score in scores.items()}
    assert kept(scores, 0.5) == expected
    allocation = GlobalRank()
    assert weighted_mean(allocation.split(0.5, ranking(scores, allocation)), scores) == pytest.approx(0.5, abs=1e-9)


def test_no_target_falls_below_the_floor_and_the_sum_is_kept() -> None:
    scores = {"weak": torch.full((10, 10), 1e-6), "strong": torch.rand(10, 10) + 1, "middle": torch.rand(10, 10) + 0.5}
    without = kept(scores, 0.8, min_density=0.0)
    assert without["weak"] == 0
    found = kept(scores, 0.8, min_density=0.05)
    assert found["weak"] == 5
    assert sum(found.values()) == sum(without.values()) == 60
    assert kept(scores, 0.8)["weak"] == math.ceil(0.005 * 100)


def test_a_floor_that_starves_another_target_is_filled_up_too() -> None:
    # b just reaches its floor until a takes its share of the budget
    scores = {"a": torch.full((1, 10), 1.0), "b": torch.full((1, 10), 2.0), "c": torch.full((1, 10), 3.0)}
    found = kept(scores, 0.6, min_density=0.2)
    assert found == {"a": 2, "b": 2, "c": 8}


def test_ties_go_to_the_first_target() -> None:
    scores = {"a": torch.ones(1, 4), "b": torch.ones(1, 4)}
    assert kept(scores, 0.5, min_density=0.0) == {"a": 4, "b": 0}
    assert kept(scores, 0.5) == {"a": 3, "b": 1}


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_floors_outside_zero_to_one_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"min_density must be in \[0, 1\), got {value}"):
        GlobalRank(min_density=value)


def test_a_floor_above_the_budget_is_refused() -> None:
    scores = {"a": torch.rand(4, 4)}
    allocation = GlobalRank(min_density=0.3)
    with pytest.raises(ValueError, match=r"min_density 0\.3 is above the density 0\.2 of the schedule"):
        allocation.split(0.8, ranking(scores, allocation))
