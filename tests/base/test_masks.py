"""Masks from scores: exact counts, ties to the lowest index, bits that come back, hashes that see every bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.base import masks

SMALLEST = 2**-126  # the smallest normal float32


def by_sorting(values: Tensor, num_keep: int) -> Tensor:
    """Return the best `num_keep` of a flat tensor by a stable sort, ties to the lowest index."""
    order = np.argsort(-values.double().numpy(), kind="stable")
    keep = np.zeros(values.numel(), dtype=bool)
    keep[order[:num_keep]] = True
    return torch.from_numpy(keep)


def keep_best(scores: dict[str, Tensor], num_keep: int) -> dict[str, Tensor]:
    """Rank several targets of one process together."""
    cut = masks.find_cut(list(scores), num_keep, unit=scores.__getitem__, total=lambda name, counts: counts)
    return {name: masks.keep_above(score, cut, name, score, whole=False) for name, score in scores.items()}


def test_best_of_every_row_by_hand() -> None:
    units = torch.tensor([[0.1, 0.4, 0.3, 0.2], [4.0, 3.0, 2.0, 1.0]])
    expected = torch.tensor([[False, True, True, False], [True, True, False, False]])
    assert torch.equal(masks.keep_rows(units, 2), expected)


def test_ties_in_a_row_keep_exactly_as_many_lowest_index_first() -> None:
    # A threshold "<= the k-th smallest" would prune 7 of these 8.
    row = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    assert masks.keep_rows(row, 4).tolist() == [[False, False, False, True, True, True, False, True]]
    assert masks.keep_rows(torch.zeros(2, 5), 3).tolist() == [[True] * 3 + [False] * 2] * 2


@pytest.mark.parametrize("num_keep", [1, 2, 7, 8, 9])
def test_rows_equal_a_stable_sort(num_keep: int) -> None:
    generator = torch.Generator().manual_seed(num_keep)
    units = torch.randint(-3, 4, (50, 8), generator=generator).float()
    units[3] = -torch.inf  # what was pruned before and may not come back
    units[4, ::2] = -torch.inf
    expected = torch.stack([by_sorting(row, num_keep) for row in units])
    assert torch.equal(masks.keep_rows(units, num_keep), expected)


def test_rows_without_units_or_rows() -> None:
    assert masks.keep_rows(torch.empty(0, 4), 2).shape == (0, 4)
    assert masks.keep_rows(torch.ones(2, 3), 3).all()


@pytest.mark.parametrize("num_keep", [1, 50, 333, 599, 600])
@pytest.mark.parametrize("kind", ["normal", "ties", "one value", "tiny and huge"])
def test_one_cut_through_several_targets_equals_a_stable_sort(kind: str, num_keep: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(600, generator=generator)
    values = {
        "normal": draws,
        "ties": (draws * 2).round(),
        "one value": torch.full((600,), 0.5),
        "tiny and huge": draws * torch.where(draws > 0, SMALLEST / 16, 2.0**120),
    }[kind]
    values[7] = -torch.inf
    scores = {"b": values[:200].reshape(10, 20), "a": values[200:].reshape(40, 10)}
    kept = keep_best(scores, num_keep)
    expected = by_sorting(values, num_keep)
    assert torch.equal(torch.cat([kept["b"].reshape(-1), kept["a"].reshape(-1)]), expected)


def test_minus_zero_is_a_tie_with_zero() -> None:
    kept = keep_best({"w": torch.tensor([[-0.0, 0.0, -1.0, 1.0]])}, 2)
    assert kept["w"].tolist() == [[True, False, False, True]]


def test_scores_apart_by_one_bit_are_told_apart() -> None:
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    kept = keep_best({"w": torch.stack([low, high, low])[None]}, 1)
    assert kept["w"].tolist() == [[False, True, False]]


def test_cut_counts_what_each_target_keeps() -> None:
    scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([3.0, 2.0, 1.0])}
    cut = masks.find_cut(["a", "b"], 4, unit=scores.__getitem__, total=lambda name, counts: counts)
    assert cut.num_kept() == {"a": 2, "b": 2}  # of the two ones, that of the first target stays


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (2, 3, 7), (0, 4)])
def test_bits_come_back(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = masks.pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(bits, torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little")))
    assert torch.equal(masks.unpack(bits, shape), mask)


def test_bits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"packed mask of shape \(3, 3\) needs 2 bytes, got 1"):
        masks.unpack(torch.zeros(1, dtype=torch.uint8), (3, 3))
    with pytest.raises(ValueError, match="needs 2 bytes"):
        masks.unpack(torch.zeros(2, dtype=torch.int64), (3, 3))


@pytest.mark.parametrize("numel", [5, 64, 200])
def test_hash_sees_every_bit_and_its_place(numel: int) -> None:
    mask = torch.zeros(numel, dtype=torch.bool)
    hashes = [int(masks.content_hash(mask))]
    for position in range(numel):
        single = mask.clone()
        single[position] = True
        hashes.append(int(masks.content_hash(single)))
    assert len(set(hashes)) == numel + 1
    assert int(masks.content_hash(mask.clone())) == hashes[0]


def test_hash_tells_masks_of_equal_counts_apart() -> None:
    hashes = {
        int(masks.content_hash(torch.tensor(group).bool().repeat(64)))
        for group in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1])
    }
    assert len(hashes) == 6


def test_hash_tells_a_mask_and_its_opposite_apart() -> None:
    for numel in (64, 128):
        mask = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
        assert int(masks.content_hash(mask)) != int(masks.content_hash(~mask))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_cannot_be_ranked_are_refused(value: float) -> None:
    score = torch.ones(2, 3)
    masks.check_scores("layer.weight", score)
    score[1, 2] = value
    with pytest.raises(ValueError, match=r"scores of layer\.weight contain NaN or infinity.*check the loss"):
        masks.check_scores("layer.weight", score)
