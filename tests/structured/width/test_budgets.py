"""How many units stay and which: counts by hand, equal parts, multiples, nothing emptied."""

import pytest
import torch

from lightning_prune.structured.groups import Group
from lightning_prune.structured.width.budgets import by_rank, chosen, step_of, uniform


def group(num_units: int, num_parts: int = 1, name: str = "mlp") -> Group:
    return Group(name, "ffn" if num_parts == 1 else "heads", 0, num_units, (), num_parts)


@pytest.mark.parametrize(
    ("num_units", "num_parts", "sparsity", "multiple_of", "expected"),
    [
        (512, 1, 0.25, 1, 384),
        (10, 1, 0.29, 1, 8),  # floor of 2.9 go
        (6, 2, 1 / 3, 1, 4),
        (6, 2, 0.5, 1, 4),  # floor of 1.5 go from each part of 3
        (512, 1, 0.3, 64, 384),  # 358.4 lies between 320 and 384
        (512, 1, 0.3, 8, 360),
        (100, 1, 0.05, 64, 64),  # 128 is more than there are
        (100, 1, 0.0, 64, 100),
        (128, 1, 0.9, 64, 64),
        (128, 1, 0.25, 64, 128),  # in the middle the larger stays
    ],
)
def test_uniform_counts(num_units: int, num_parts: int, sparsity: float, multiple_of: int, expected: int) -> None:
    assert uniform(group(num_units, num_parts), sparsity, multiple_of) == expected


def test_the_best_units_stay_in_order() -> None:
    assert chosen(group(5), torch.tensor([3.0, 1.0, 5.0, 1.0, 4.0]), 3) == (0, 2, 4)
    assert chosen(group(4), torch.ones(4), 2) == (0, 1)


def test_every_part_keeps_equally_many() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    assert chosen(group(6), scores, 4) == (0, 1, 2, 4)
    assert chosen(group(6, 2), scores, 4) == (0, 1, 4, 5)


def test_a_ranking_over_groups_by_hand() -> None:
    groups = [group(4, name="a"), group(4, name="b")]
    scores = {"a:ffn": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b:ffn": torch.tensor([0.5, 0.4, 9.0, 0.3])}
    assert by_rank(groups, scores, 0.5) == {"a:ffn": 3, "b:ffn": 1}
    assert by_rank(groups, scores, 0.25) == {"a:ffn": 4, "b:ffn": 2}
    # in pairs: (4, 3), (2, 1) against (9, 0.5), (0.4, 0.3)
    assert by_rank(groups, scores, 0.25, multiple_of=2) == {"a:ffn": 4, "b:ffn": 2}
    assert by_rank(groups, scores, 0.0) == {"a:ffn": 4, "b:ffn": 4}


def test_a_ranking_over_groups_keeps_parts_equal_and_nothing_empty() -> None:
    groups = [group(6, 2, "a"), group(6, 2, "b")]
    scores = {"a:heads": torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]), "b:heads": torch.full((6,), -5.0)}
    # b keeps a head per part although all of a is better: 2 + 2 given, 2 left for (8 + 0) / 2
    assert by_rank(groups, scores, 0.5) == {"a:heads": 4, "b:heads": 2}


def test_a_group_that_needs_some_units_keeps_them() -> None:
    routed = Group("moe", "experts", 0, 8, (), min_units=4, min_reason="its router sends every token to 4 of them")
    assert uniform(routed, 0.5) == 4
    with pytest.raises(ValueError, match=r"moe:experts would keep 2 of 8 units, but its router .* at most 0\.5"):
        uniform(routed, 0.75)
    other = Group("b", "experts", 0, 8, (), min_units=4)
    scores = {"moe:experts": torch.arange(8.0), "b:experts": torch.arange(8.0) + 10}
    assert by_rank([routed, other], scores, 0.25) == {"moe:experts": 4, "b:experts": 8}
    with pytest.raises(ValueError, match=r"keeps 6 units, fewer than the one step .* \(4 of moe:experts\)"):
        by_rank([routed, other], scores, 0.625)


def test_rows_of_grouped_products_are_kept_whole() -> None:
    rows = Group("expert", "ffn", 0, 40, (), multiple_of=8)
    assert (uniform(rows, 0.25), uniform(rows, 0.0), step_of(rows, 1), step_of(rows, 12)) == (32, 40, 8, 24)
    other = Group("b", "ffn", 0, 40, (), multiple_of=8)
    assert by_rank([rows, other], {"expert:ffn": torch.zeros(40), "b:ffn": torch.ones(40)}, 0.5) == {
        "expert:ffn": 8,
        "b:ffn": 32,
    }


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"sparsity must be in \[0, 1\), got 1.0 for mlp:ffn; to remove all of it, skip"
    ):
        uniform(group(4), 1.0)
    with pytest.raises(ValueError, match="mlp:ffn has 48 units in 1 parts, so no multiple of 64 can stay; choose"):
        step_of(group(48), 64)
    with pytest.raises(ValueError, match="multiple_of must be >= 1, got 0"):
        step_of(group(48), 0)
    with pytest.raises(
        ValueError, match=r"keeps 1 units, fewer than the one step that each group needs \(1 of a:ffn\)"
    ):
        by_rank([group(2, name="a"), group(2, name="b")], {}, 0.75)
    with pytest.raises(ValueError, match="mlp:ffn needs 2 finite scores, got \\(2,\\) with 1 that are NaN or infinite"):
        chosen(group(2), torch.tensor([1.0, torch.nan]), 1)
    with pytest.raises(ValueError, match="mlp:heads keeps 3 units, which its 2 parts cannot share"):
        chosen(group(4, 2), torch.ones(4), 3)
    with pytest.raises(ValueError, match="nothing of mlp:ffn would be left"):
        chosen(group(2), torch.ones(2), 0)
