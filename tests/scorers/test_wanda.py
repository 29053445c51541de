"""Wanda: magnitude times input norm, by hand and against the released form of the formula."""

import numpy as np
import pytest
import torch

from lightning_prune.base.masks import keep_rows
from lightning_prune.base.types import Stats, Target
from lightning_prune.scorers.magnitude import magnitude_score
from lightning_prune.scorers.wanda import Wanda, wanda_score


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 1.0, -1.0, 2.0]])
    norm = torch.tensor([4.0, 3.0, 2.0, 0.5])
    score = wanda_score(weight, norm)
    assert score.tolist() == [[4.0, 6.0, 6.0, 2.0], [0.0, 3.0, 2.0, 1.0]]
    target = Target(name="w", weight_OI=weight, row_start=0, num_rows=2)
    assert torch.equal(Wanda().score(target, Stats({"input_norm": norm}, 0, 0)), score)
    # half of every row; in the first row 6 beats 4, which magnitude would not have kept
    assert keep_rows(score, 2).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]


def test_the_paper_orders_weights_in_the_same_way() -> None:
    # locuslab/wanda keeps sum(x^2) / n of n sequences and scores |W| * sqrt of it: a constant factor off ours.
    generator = np.random.default_rng(0)
    weight, inputs = generator.normal(size=(6, 16)), generator.normal(size=(3, 20, 16))
    scaler_row = (inputs.reshape(-1, 16) ** 2).sum(0) / 3
    theirs = np.abs(weight) * np.sqrt(scaler_row)
    norm = torch.from_numpy(np.sqrt((inputs.reshape(-1, 16) ** 2).sum(0))).float()
    ours = wanda_score(torch.from_numpy(weight).float(), norm)
    np.testing.assert_allclose(ours.numpy(), theirs * np.sqrt(3), rtol=1e-6)


def test_a_strong_input_keeps_its_small_weights() -> None:
    weight = torch.ones(4, 8)
    weight[:, 5] = 0.1
    norm = torch.ones(8)
    norm[5] = 100.0
    assert keep_rows(wanda_score(weight, norm), 4)[:, 5].all()
    assert not keep_rows(magnitude_score(weight), 4)[:, 5].any()


def test_arithmetic_is_float32() -> None:
    weight = torch.tensor([[1.0, 0.3]], dtype=torch.bfloat16)
    score = wanda_score(weight, torch.tensor([1.001, 3.0]))
    assert score.dtype == torch.float32
    assert score[0, 0].item() == pytest.approx(1.001, rel=1e-6)  # 1.0 in bfloat16


def test_it_needs_input_norms_and_ranks_rows_by_default() -> None:
    assert Wanda().needs == {"input_norm": {}}
    assert Wanda().scope == "row"
    assert not Wanda().dense_grad


def test_norms_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="weight has 3 input features, input_norm_I has 4; collect the norms from"):
        wanda_score(torch.ones(2, 3), torch.ones(4))
