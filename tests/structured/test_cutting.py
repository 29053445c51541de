"""Cut tensors; values worked by hand."""

import pytest
import torch

from lightning_prune.structured.cutting import cut_shape, cut_tensor, removal_of, scale_of, without_orphans
from lightning_prune.structured.groups import Cut, Group, Member

SHAPES = {"w": (4, 3), "stacked": (2, 3, 2), "norm": (3,)}
ROWS = Group("a", "ffn", 0, 4, (Member("w", 0, ((0, 1),), "out"),))
COLUMNS = Group(
    "b", "hidden", None, 3, (Member("w", 1, ((0, 1),), "in"), Member("norm", 0, ((0, 1),), "norm", power=-1))
)


def test_cuts_along_both_dimensions_join() -> None:
    groups = {group.key: group for group in (ROWS, COLUMNS)}
    cuts = {ROWS.key: Cut(ROWS.key, (1, 2)), COLUMNS.key: Cut(COLUMNS.key, (0, 2))}
    removal = removal_of(groups, cuts, SHAPES)
    assert cut_shape("w", (4, 3), removal) == (2, 2)
    weight = torch.arange(12).reshape(4, 3)
    assert cut_tensor("w", weight, removal).tolist() == [[3, 5], [6, 8]]
    untouched = torch.zeros(3)
    assert cut_tensor("other", untouched, removal) is untouched
    # 2 of 3 channels stay: the weight of the norm grows by (3 / 2) ** 0.5
    assert scale_of(groups, cuts, SHAPES, removal) == {"norm": (pytest.approx(1.5**0.5), 0.0)}


def test_cuts_that_do_not_fit_the_groups_are_refused() -> None:
    groups = {group.key: group for group in (ROWS, COLUMNS)}
    assert without_orphans(groups, [Cut(ROWS.key, (2, 0))])[ROWS.key].keep == (0, 2)
    with pytest.raises(ValueError, match="the units 0 to 3, each at most once"):
        without_orphans(groups, [Cut(ROWS.key, (1, 4))])
    with pytest.raises(ValueError, match="the model has no group 'a:heads'; it has a:ffn"):
        without_orphans(groups, [Cut("a:heads", (1,))])


def test_experts_choose_their_own_units_but_equally_many() -> None:
    groups = {f"e{i}:ffn": Group(f"e{i}", "ffn", 0, 3, (Member("stacked", 1, ((0, 1),), "out", i),)) for i in (0, 1)}
    tensor = torch.arange(12).reshape(2, 3, 2)
    removal = removal_of(groups, {"e0:ffn": Cut("e0:ffn", (0, 1)), "e1:ffn": Cut("e1:ffn", (1, 2))}, SHAPES)
    assert cut_tensor("stacked", tensor, removal).tolist() == [[[0, 1], [2, 3]], [[8, 9], [10, 11]]]
    uneven = removal_of(groups, {"e0:ffn": Cut("e0:ffn", (0, 1))}, SHAPES)
    with pytest.raises(ValueError, match=r"experts stacked in stacked would keep \[2, 3\]"):
        cut_shape("stacked", (2, 3, 2), uneven)


def test_heads_follow_their_key_value_group() -> None:
    heads = Group("m", "heads", 0, 6, (), num_parts=3)
    groups = {"m:heads": heads, "m:kv_groups": Group("m", "kv_groups", 0, 3, ())}
    cuts = without_orphans(groups, [Cut("m:kv_groups", (0, 2))])
    assert cuts["m:heads"].keep == (0, 1, 4, 5)
    both = without_orphans(groups, [Cut("m:kv_groups", (0, 2)), Cut("m:heads", (1, 2, 4))])
    assert both["m:heads"].keep == (1, 4)
