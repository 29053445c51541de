"""How much of a decision followed from the place of units, by hand."""

import pytest
import torch
from torch import Tensor

from lightning_prune.targets.ties import TieCounts, Ties, count_ties, extremes

INF = float("inf")


def verdict(unit: list[list[float]], keep: list[list[int]], *, matters: list[list[int]] | None = None) -> Ties:
    """Return the verdict where every row is ranked alone."""
    keep_RC = torch.tensor(keep).bool()
    matters_RC = torch.ones_like(keep_RC) if matters is None else torch.tensor(matters).bool()
    counts = TieCounts(*count_ties(torch.tensor(unit), keep_RC, matters_RC, None).tolist())
    return counts.judge(is_split=bool(counts.num_equal_kept and counts.num_equal_pruned))


def test_scores_that_differ_are_chosen_by_nothing_else() -> None:
    assert verdict([[1.0, 2, 3, 4]], [[0, 0, 1, 1]]) == Ties(0.0, False)


def test_equal_scores_that_stay_and_go_are_chosen_by_place() -> None:
    assert verdict([[1.0, 2, 2, 2], [4, 3, 2, 1]], [[0, 1, 0, 1], [1, 1, 0, 0]]) == Ties(3 / 8, False)


def test_equal_scores_that_all_go_are_not() -> None:
    assert verdict([[2.0, 2, 3, 4]], [[0, 0, 1, 1]]) == Ties(0.0, False)


def test_a_target_whose_scores_are_all_equal_is_blind() -> None:
    assert verdict([[0.0, 0, 0, 0]] * 2, [[1, 1, 0, 0]] * 2).is_blind
    assert not verdict([[0.0, 0, 0, 0], [0, 0, 0, 1]], [[1, 1, 0, 0]] * 2).is_blind


def test_to_prune_zeros_changes_nothing_so_that_they_do_not_count() -> None:
    zeros = verdict([[0.0, 0, 0, 0]], [[1, 1, 0, 0]], matters=[[0, 0, 0, 0]])
    assert zeros == Ties(0.0, False)
    some = verdict([[0.0, 0, 0, 5]], [[1, 0, 0, 1]], matters=[[1, 0, 0, 1]])
    assert some == Ties(1 / 4, False)


def test_what_was_pruned_before_is_not_ranked() -> None:
    unit = [[-INF, -INF, 2.0, 2.0]]
    assert verdict(unit, [[0, 0, 1, 0]]) == Ties(1.0, True)
    assert verdict([[-INF, -INF, 2.0, 3.0]], [[0, 0, 0, 1]]) == Ties(0.0, False)


def test_a_target_that_loses_nothing_is_not_blind() -> None:
    assert verdict([[1.0, 1, 1, 1]], [[1, 1, 1, 1]]) == Ties(0.0, False)


@pytest.mark.parametrize(("differs", "is_blind"), [(False, True), (True, False)])
def test_with_a_cut_over_the_whole_target_the_caller_says_whether_scores_differ(differs: bool, is_blind: bool) -> None:
    unit_RC = torch.tensor([[1.0, 1.0], [1.0, 2.0]]) if differs else torch.ones(2, 2)
    keep_RC = torch.tensor([[False, True], [True, True]])
    counts = TieCounts(*count_ties(unit_RC, keep_RC, unit_RC > 0, unit_RC == 1, differs=differs).tolist())
    assert counts.judge(is_split=True) == Ties(3 / 4 if differs else 1.0, is_blind)


@pytest.mark.parametrize(
    ("unit", "wanted"),
    [([[3.0, 1.0], [2.0, -INF]], [3.0, -1.0]), ([[-INF, -INF]], [-INF, -INF])],
)
def test_extremes_are_those_of_what_is_still_ranked(unit: list[list[float]], wanted: list[float]) -> None:
    assert extremes(torch.tensor(unit)).tolist() == wanted


def test_an_empty_shard_has_no_extremes() -> None:
    nothing: Tensor = torch.zeros(0, 4)
    assert extremes(nothing).tolist() == [-INF, -INF]
