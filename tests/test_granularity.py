"""Shapes of holes: pooling, expanding and counting, by hand and against plain sorting."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune import NM, Block, Once, Sparsifier, Targets, Unstructured
from lightning_prune.base import masks
from lightning_prune.base.types import Granularity, Scope
from lightning_prune.granularity import Channel, num_kept
from lightning_prune.scorers.magnitude import Magnitude
from tests.tiny_models import tiny_mlp


@pytest.mark.parametrize(
    ("sparsity", "num_units", "expected"),
    [
        (0.29, 100, 71),  # 0.29 * 100 is 28.999999999999996 in floats
        (0.57, 100, 43),
        (0.58, 100, 42),
        (0.7, 10, 3),
        (0.5, 7, 4),  # floor of 3.5 are pruned
        (0.0, 7, 7),
        (0.999, 100, 1),
        (0.1, 9, 9),
        (1 / 3, 3, 2),
    ],
)
def test_counts_are_exact(sparsity: float, num_units: int, expected: int) -> None:
    assert num_kept(sparsity, num_units) == expected
    assert Unstructured().num_keep(sparsity, num_units) == expected
    assert Block(rows=2, cols=2).num_keep(sparsity, num_units) == expected


def test_every_hundredth_of_a_hundred_is_exact() -> None:
    assert [num_kept(percent / 100, 100) for percent in range(100)] == list(range(100, 0, -1))


def test_single_weights_pass_through() -> None:
    unstructured = Unstructured()
    score = torch.rand(2, 4)
    keep = score > 0.5
    assert unstructured.pool(score) is score
    assert torch.equal(unstructured.expand(keep, (2, 4)), keep)
    assert unstructured.rows_per_unit == 1
    assert [unstructured.scope(scope) for scope in ("row", "tensor", "global")] == ["row", "tensor", "global"]
    unstructured.check("w", (3, 7))
    unstructured.check_sparsity(0.123)


def nm_mask(score_OI: Tensor, nm: NM, num_keep: int) -> Tensor:
    return nm.expand(masks.keep_rows(nm.pool(score_OI), num_keep), tuple(score_OI.shape))


def test_two_of_four_by_hand() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 0.0, 1.0, 2.0, 3.0, 4.0]])
    expected = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(nm_mask(score, NM(), 2), expected)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in range(2, 9) for n in range(1, m)])
def test_n_of_every_m_against_a_stable_sort(n: int, m: int) -> None:
    nm = NM(n=n, m=m)
    generator = torch.Generator().manual_seed(10 * n + m)
    score = torch.randint(0, 5, (6, 5 * m), generator=generator).float()
    order = np.argsort(-score.numpy().reshape(-1, m), axis=1, kind="stable")
    expected = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(expected, order[:, :n], True, axis=1)
    num_keep = nm.num_keep(1 - n / m, m)
    assert num_keep == n
    assert torch.equal(nm_mask(score, nm, num_keep), torch.from_numpy(expected.reshape(6, -1)))
    nm.check_sparsity(1 - n / m)
    nm.check("w", (3, 4 * m))


@pytest.mark.parametrize(
    ("sparsity", "expected"), [(0.0, 4), (0.12, 4), (0.125, 3), (0.3, 3), (0.375, 2), (0.5, 2), (0.62, 2), (0.99, 2)]
)
def test_n_falls_to_the_nearest_whole_number_and_never_below_the_pattern(sparsity: float, expected: int) -> None:
    assert NM(n=2, m=4).num_keep(sparsity, 4) == expected


def test_blocks_by_hand() -> None:
    block = Block(rows=2, cols=3)
    score = torch.arange(24.0).reshape(4, 6)
    # mean of rows 0-1, columns 0-2: (0 + 1 + 2 + 6 + 7 + 8) / 6
    assert block.pool(score).tolist() == [[4.0, 7.0], [16.0, 19.0]]
    mask = block.expand(torch.tensor([[True, False], [False, True]]), (4, 6))
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2
    assert block.rows_per_unit == 2
    assert [block.scope(scope) for scope in ("row", "tensor", "global")] == ["row", "tensor", "global"]
    block.check_sparsity(0.123)


def test_block_scores_equal_average_pooling() -> None:
    score = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.avg_pool2d(score[None, None], (4, 5))[0, 0]
    torch.testing.assert_close(Block(rows=4, cols=5).pool(score), expected)


def test_a_block_with_a_pruned_weight_stays_lowest() -> None:
    score = torch.ones(2, 4)
    score[:, :2] = -torch.inf
    assert Block(rows=2, cols=2).pool(score).tolist() == [[-torch.inf, 1.0]]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_more_kept_than_there_are_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=rf"0 < n < m is needed, got n={n}, m={m}; 2:4 is n=2, m=4"):
        NM(n=n, m=m)


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0), (1, 1), (-2, 2)])
def test_blocks_of_no_or_one_weight_are_refused(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match=rf"rows >= 1 and cols >= 1.*got {rows} x {cols}; for single weights use"):
        Block(rows=rows, cols=cols)


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (NM(n=2, m=4), r"2:4 needs an input dimension that 4 divides; up\.weight has 10; exclude it"),
        (Block(rows=4, cols=2), r"blocks of 4 x 2 do not tile up\.weight of shape 6 x 10; choose sizes that divide"),
        (Block(rows=3, cols=4), r"blocks of 3 x 4 do not tile up\.weight of shape 6 x 10"),
    ],
)
def test_weights_that_holes_do_not_tile_are_refused(granularity: Granularity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        granularity.check("up.weight", (6, 10))


def test_a_sparsity_that_contradicts_the_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1:4 means a final sparsity of 0\.75, the schedule says 0\.5; set"):
        NM(n=1, m=4).check_sparsity(0.5)


def test_n_of_m_cannot_rank_globally() -> None:
    assert [NM().scope("row"), NM().scope("tensor")] == ["row", "row"]
    with pytest.raises(ValueError, match=r"scope: global has no effect under N:M.*use row"):
        NM().scope("global")


def test_channels_by_hand() -> None:
    channel = Channel(width=2)
    score = torch.tensor([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 4.0, 8.0]])
    assert channel.pool(score).tolist() == [[2.0, 3.0]]
    mask = channel.expand(torch.tensor([[False, True]]), (2, 4))
    assert mask.tolist() == [[False, False, True, True]] * 2
    assert mask.is_contiguous()
    assert Channel().pool(score).tolist() == [[1.5, 2.5, 2.0, 4.0]]
    assert [channel.scope(scope) for scope in ("row", "tensor", "global")] == ["tensor", "tensor", "global"]
    assert channel.num_keep(0.29, 100) == 71
    channel.check("w", (3, 6))
    channel.check_sparsity(0.123)


def test_channels_equal_blocks_as_tall_as_the_weight() -> None:
    score = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Channel(width=3).pool(score), Block(rows=6, cols=3).pool(score))
    keep = torch.tensor([[True, False, False, True]])
    assert torch.equal(Channel(width=3).expand(keep, (6, 12)), Block(rows=6, cols=3).expand(keep, (6, 12)))


def test_a_channel_spans_rows_that_other_processes_may_hold() -> None:
    assert Channel().rows_per_unit > 1


def test_channels_that_do_not_tile_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"channels of width 4 do not tile up\.weight with its 10 input columns; choose"
    ):
        Channel(width=4).check("up.weight", (6, 10))
    with pytest.raises(ValueError, match="a channel needs width >= 1, got 0; 1 is a single"):
        Channel(width=0)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_channels_are_masked_whole_in_training(scope: Scope) -> None:
    model = tiny_mlp()
    conductor = Sparsifier(
        schedule=Once(sparsity=0.5, at=1),
        scorer=Magnitude(scope=scope),
        granularity=Channel(width=2),
        targets=Targets(include=("*",)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    conductor.attach(model, [optimizer], total_steps=3)
    for step in range(3):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            keep = {name: mask.clone() for name, mask in conductor.masks.items()}
    for name, mask in conductor.masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(mask, keep[name])
        assert torch.equal(weight.any(0), mask[0])
        assert torch.equal(mask, mask[:1].repeat_interleave(len(mask), 0))
    num_kept = [int(mask[0].reshape(-1, 2).all(1).sum()) for mask in keep.values()]  # of 4 and of 8 channels
    assert num_kept == [2, 4] if scope == "tensor" else sum(num_kept) == 6
    conductor.detach()
