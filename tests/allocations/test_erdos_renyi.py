"""ErdosRenyi: densities by the formula, dense targets, and a mean that is exact."""

import pytest
import torch

from lightning_prune.allocations.erdos_renyi import ErdosRenyi, erdos_renyi_densities
from tests.allocations.rankings import ranking, weighted_mean


def test_by_hand() -> None:
    # 4x4 has (4 + 4) / 16 = 1/2, 8x8 has 16 / 64 = 1/4; keep 20 of 80: eps * (8 + 16) = 20
    densities = erdos_renyi_densities({"a": (4, 4), "b": (8, 8)}, 0.25)
    assert densities["a"] == pytest.approx(20 / 24 / 2)
    assert densities["b"] == pytest.approx(20 / 24 / 4)


def test_what_would_be_above_one_is_dense_and_the_rest_is_solved_again() -> None:
    # keep 60 of 80: eps = 2.5 asks 1.25 of a; so a keeps 16 and b 44 of 64
    assert erdos_renyi_densities({"a": (4, 4), "b": (8, 8)}, 0.75) == {"a": 1.0, "b": pytest.approx(44 / 64)}


def test_equal_shapes_share_evenly() -> None:
    assert erdos_renyi_densities(dict.fromkeys("abc", (6, 7)), 0.3) == pytest.approx(dict.fromkeys("abc", 0.3))


def test_nothing_pruned_is_all_dense() -> None:
    assert erdos_renyi_densities({"a": (4, 4), "b": (8, 8)}, 1.0) == pytest.approx({"a": 1.0, "b": 1.0})


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_the_weighted_mean_is_the_sparsity(sparsity: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(2, 60, (12, 2), generator=generator).tolist()
    scores = {f"w{index}": torch.rand(rows, cols) for index, (rows, cols) in enumerate(sizes)}
    found = ErdosRenyi().split(sparsity, ranking(scores, ErdosRenyi()))
    assert weighted_mean(found, scores) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= value < 1 for value in found.values())
    # the rule itself, among those that are not dense: density * O * I / (O + I) is one number
    free = {name: score for name, score in scores.items() if found[name] > 1e-9}
    scales = [(1 - found[name]) * score.numel() / sum(score.shape) for name, score in free.items()]
    assert scales == pytest.approx([scales[0]] * len(scales))
