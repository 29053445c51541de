"""Scores of weights become scores of units: by hand, over fused, transposed and stacked members."""

import pytest
import torch
from torch import Tensor

from lightning_prune.structured.groups import Group, Member
from lightning_prune.structured.width.unit_scores import Reduction, standardize, unit_scores

FFN = Group(
    "mlp",
    "ffn",
    0,
    2,
    (
        Member("gate", 0, ((0, 1),), "out"),
        Member("bias", 0, ((0, 1),), "vector"),
        Member("down", 1, ((0, 1),), "in"),
    ),
)
SCORES = {"gate": torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "down": torch.tensor([[1.0, 0.5], [1.0, 0.0], [0.0, 2.0]])}
# gate rows: 3 and 8; down columns: 2 and 2.5


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (Reduction(), [5.0, 10.5]),
        (Reduction(members="readers"), [2.0, 2.5]),
        (Reduction(across="mean"), [2.5, 5.25]),
        (Reduction(across="max"), [3.0, 8.0]),
        (Reduction(across="prod"), [6.0, 20.0]),
    ],
)
def test_members_by_hand(reduction: Reduction, expected: list[float]) -> None:
    score = unit_scores(FFN, SCORES, reduction)
    assert score.tolist() == expected
    assert score.dtype == torch.float32


@pytest.mark.parametrize(
    ("within", "expected"),
    [
        ("sum", [7.0, 4.0]),
        ("mean", [3.5, 2.0]),
        ("max", [4.0, 4.0]),
        ("l2", [5.0, 4.0]),
        ("transact", [3.5 + 10 / 2 * 4, 2.0 + 10 / 2 * 4]),
    ],
)
def test_indices_of_a_head_by_hand(within: str, expected: list[float]) -> None:
    heads = Group("attn", "heads", 0, 2, (Member("o", 1, ((0, 2),), "in"),))
    columns: Tensor = torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.0, 2.0]])  # column sums 3 4 | 0 4
    assert unit_scores(heads, {"o": columns}, Reduction(within=within)).tolist() == expected  # type: ignore[arg-type]


def test_a_fused_member_counts_all_its_runs() -> None:
    fused = Group("mlp", "ffn", 0, 2, (Member("gate_up", 0, ((0, 1), (2, 1)), "out"),))
    assert unit_scores(fused, {"gate_up": torch.tensor([[1.0], [2.0], [10.0], [20.0]])}, Reduction()).tolist() == [
        11.0,
        22.0,
    ]


def test_a_run_in_the_middle_of_a_dimension() -> None:
    heads = Group("attn", "heads", 0, 2, (Member("qkv", 0, ((1, 2),), "out"),))
    assert unit_scores(heads, {"qkv": torch.arange(6.0)[:, None]}, Reduction()).tolist() == [3.0, 7.0]


def test_an_expert_is_scored_by_its_own_slice() -> None:
    stacked = torch.arange(12.0).reshape(2, 2, 3)
    out = Group("experts.1", "ffn", 0, 2, (Member("up", 1, ((0, 1),), "out", expert=1),))
    into = Group("experts.1", "ffn", 0, 3, (Member("down", 2, ((0, 1),), "in", expert=1),))
    assert unit_scores(out, {"up": stacked}, Reduction()).tolist() == [6.0 + 7 + 8, 9.0 + 10 + 11]
    assert unit_scores(into, {"down": stacked}, Reduction()).tolist() == [6.0 + 9, 7.0 + 10, 8.0 + 11]


def test_standardized_scores_have_mean_zero_and_deviation_one() -> None:
    assert standardize(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]
    assert standardize(torch.tensor([4.0, 4.0])).tolist() == [0.0, 0.0]
    scaled = standardize(torch.tensor([1e-6, 3e-6, 8e-6]))
    torch.testing.assert_close(scaled, standardize(torch.tensor([1.0, 3.0, 8.0])))


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="no scores for down of mlp:ffn; got gate"):
        unit_scores(FFN, {"gate": SCORES["gate"]}, Reduction())
    with pytest.raises(ValueError, match="within must be one of sum, mean, max, l2, transact, got 'median'"):
        Reduction(within="median")  # type: ignore[arg-type]
    norm = Group("n", "hidden", None, 2, (Member("w", 0, ((0, 1),), "norm"),))
    with pytest.raises(ValueError, match=r"n:hidden has no member to score with members='all'; it has w \(norm\)"):
        unit_scores(norm, {}, Reduction())
