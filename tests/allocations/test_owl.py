"""OWL: the paper's formula by hand, its band, and a mean that is exact."""

import pytest
import torch

from lightning_prune.allocations.owl import OWL, block_of, owl_densities
from tests.allocations.rankings import ranking, weighted_mean


def test_the_paper_formula_by_hand() -> None:
    # u = 2 * 0.08 * (D - min) / (max - min); density = u - mean(u) + (1 - s)
    densities = owl_densities([0.01, 0.02, 0.05], [10, 10, 10], 0.3, 0.08)
    assert densities == pytest.approx([0.3 - 0.2 / 3, 0.3 + 0.04 - 0.2 / 3, 0.3 + 0.16 - 0.2 / 3])


def test_blocks_of_different_sizes_weigh_by_their_size() -> None:
    # u = 0, 0.2; mean = 0.2 * 30 / 40
    assert owl_densities([0.0, 1.0], [10, 30], 0.5, 0.1) == pytest.approx([0.35, 0.55])


def test_equal_ratios_share_evenly() -> None:
    assert owl_densities([0.02, 0.02], [10, 30], 0.4, 0.1) == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize(("density", "low", "high"), [(0.95, 0.9, 1.0), (0.05, 0.0005, 0.0995), (0.5, 0.3, 0.7)])
def test_the_band_is_narrowed_where_it_would_leave_zero_to_one(density: float, low: float, high: float) -> None:
    assert owl_densities([0.0, 1.0], [10, 10], density, 0.2) == pytest.approx([low, high])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.12"),
        ("h.0.attn.c_attn.weight", "h.0"),
        ("0.weight", "0"),
        ("layers.3.mlp.experts.7.up_proj.weight", "layers.3"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.block.1"),
        ("lm_head.weight", "lm_head.weight"),
        ("conv1.weight", "conv1.weight"),
    ],
)
def test_blocks_are_named_up_to_their_number(name: str, block: str) -> None:
    assert block_of(name) == block


def test_outliers_are_counted_per_block() -> None:
    # Block 0: mean (6 * 1 + 2 * 17) / 8 = 5, above 3 * 5: two of eight. Block 1: none.
    scores = {
        "layers.0.q": torch.tensor([[1.0, 1.0, 1.0, 17.0]]),
        "layers.0.k": torch.tensor([[1.0, 1.0, 1.0, 17.0]]),
        "layers.1.q": torch.full((2, 4), 7.0),
    }
    allocation = OWL(m=3.0, lamda=0.1)
    found = allocation.split(0.7, ranking(scores, allocation))
    assert found == pytest.approx({"layers.0.q": 0.6, "layers.0.k": 0.6, "layers.1.q": 0.8})


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.95])
def test_the_weighted_mean_is_the_sparsity_within_the_band(sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        f"layers.{block}.{part}": torch.rand(4 + 3 * block, 16, generator=generator) ** (2 + 3 * block)
        for block in range(5)
        for part in ("up", "down")
    }
    allocation = OWL(m=3.0, lamda=0.08)
    found = allocation.split(sparsity, ranking(scores, allocation))
    assert weighted_mean(found, scores) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= value < 1 and abs(value - sparsity) <= 0.16 for value in found.values())
    assert len({round(value, 9) for value in found.values()}) > 1
    assert all(found[f"layers.{block}.up"] == found[f"layers.{block}.down"] for block in range(5))


@pytest.mark.parametrize("options", [{"m": 0.0}, {"m": -1.0}, {"lamda": 0.0}, {"lamda": 0.5}])
def test_options_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"OWL needs m > 0 and lamda in \(0, 0\.5\), got m="):
        OWL(**options)
