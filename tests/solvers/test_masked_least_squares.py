"""Refits with a support per row: by hand, against an exact solve of every row, and what damping and the bias do."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.granularity import Block
from lightning_prune.solvers.least_squares import least_squares, least_squares_with_bias
from lightning_prune.solvers.masked_least_squares import bias_change, centred, damping_for, masked_least_squares
from lightning_prune.statistics.gram import Gram


def draw(num_tokens: int = 200, num_inputs: int = 16, num_outputs: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Return correlated inputs with a mean, weights, and a mask that keeps about half."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(num_inputs, num_inputs, generator=generator)
    inputs_TI = torch.randn(num_tokens, num_inputs, generator=generator) @ mix + torch.arange(num_inputs) / 4
    weight_OI = torch.randn(num_outputs, num_inputs, generator=generator)
    mask_OI = torch.rand(num_outputs, num_inputs, generator=generator) < 0.5
    return inputs_TI.double(), weight_OI.double(), mask_OI


def exact(weight_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, damping: float) -> np.ndarray:
    """Solve the normal equations of every row on its own."""
    gram, weight, answer = gram_II.numpy(), weight_OI.numpy(), np.zeros(weight_OI.shape)
    ridge = damping * np.diagonal(gram).mean()
    for row, mask in enumerate(mask_OI.numpy()):
        inner = gram[np.ix_(mask, mask)] + ridge * np.eye(mask.sum())
        right = gram[mask] @ weight[row] + ridge * weight[row, mask]
        answer[row, mask] = np.linalg.solve(inner, right)
    return answer


def test_by_hand() -> None:
    # x1 = 2 x0, x2 alone: row one keeps x0 and gets 1 + 2 * 5; row two keeps x1 and gets 5 + 1 / 2; row three nothing
    inputs = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]).double()
    weight = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    mask = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    refit = masked_least_squares(weight, mask, inputs.T @ inputs, 0.0)
    assert torch.allclose(refit.weight_OI, torch.tensor([[11.0, 0, 3], [0, 5.5, 0], [0, 0, 0]]).double())
    assert not refit.weight_OI.signbit().any()


@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
@pytest.mark.parametrize("shape", ["unstructured", "2:4", "blocks"])
def test_it_is_the_exact_solution_of_every_row(shape: str, damping: float) -> None:
    inputs, weight, mask = draw()
    if shape == "2:4":
        mask = (weight.reshape(8, 4, 4).abs().argsort(-1).argsort(-1) >= 2).reshape(8, 16)
    elif shape == "blocks":
        mask = Block(rows=4, cols=4).expand(mask[::4, ::4], (8, 16))
    gram = inputs.T @ inputs
    refit = masked_least_squares(weight, mask, gram, damping, tolerance=1e-10)
    np.testing.assert_allclose(refit.weight_OI.numpy(), exact(weight, mask, gram, damping), rtol=1e-6, atol=1e-7)
    assert refit.residual <= 1e-10
    assert bool((refit.weight_OI[~mask].view(torch.int64) == 0).all())  # bits of +0.0


def test_where_all_rows_share_a_support_it_is_the_refit_of_columns() -> None:
    inputs, weight, mask = draw()
    keep = [0, 3, 4, 8, 9, 13]
    mask = torch.zeros_like(mask)
    mask[:, keep] = True
    gram = inputs.T @ inputs
    ours = masked_least_squares(weight, mask, gram, 0.01, tolerance=1e-10).weight_OI
    assert torch.allclose(ours[:, keep], least_squares(weight, gram, keep, 0.01), rtol=1e-6)


def test_float32_is_as_good_on_the_output() -> None:
    inputs, weight, mask = draw()
    gram = inputs.T @ inputs / len(inputs)
    refit = masked_least_squares(weight.float(), mask, gram.float(), 1e-2)
    assert refit.weight_OI.dtype == torch.float32
    best_OI = torch.from_numpy(exact(weight, mask, gram, 1e-2))
    error, best = (float((inputs @ (found - weight).T).square().sum()) for found in (refit.weight_OI.double(), best_OI))
    assert error == pytest.approx(best, rel=1e-4)


def test_a_singular_gram_matrix_needs_no_damping() -> None:
    # four tokens and sixteen inputs: every row that keeps four inputs or more gives the output exactly
    inputs, weight, _ = draw(num_tokens=4)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, ::2] = True
    refit = masked_least_squares(weight, mask, inputs.T @ inputs, 0.0, tolerance=1e-9)
    assert torch.allclose(inputs @ refit.weight_OI.T, inputs @ weight.T, atol=1e-5)


def test_the_wanted_output_may_come_from_other_inputs() -> None:
    inputs, weight, mask = draw()
    others = inputs + draw(num_inputs=16)[0].flip(0) / 3
    refit = masked_least_squares(weight, mask, inputs.T @ inputs, 0.0, wanted_II=others.T @ inputs, tolerance=1e-10)
    for row, keep in enumerate(mask):
        expected = np.linalg.lstsq(inputs[:, keep].numpy(), (others @ weight[row]).numpy())[0]
        np.testing.assert_allclose(refit.weight_OI[row, keep].numpy(), expected, rtol=1e-6, atol=1e-8)


def test_nothing_pruned_nothing_changed() -> None:
    inputs, weight, mask = draw()
    refit = masked_least_squares(weight, torch.ones_like(mask), inputs.T @ inputs, 0.01)
    assert torch.equal(refit.weight_OI, weight)
    assert refit.num_steps == 0


def test_strong_damping_is_plain_pruning() -> None:
    inputs, weight, mask = draw()
    refit = masked_least_squares(weight, mask, inputs.T @ inputs, 1e9)
    assert torch.allclose(refit.weight_OI, weight * mask, atol=1e-6)


def test_steps_can_be_limited_and_the_residual_says_so() -> None:
    inputs, weight, mask = draw()
    refit = masked_least_squares(weight, mask, inputs.T @ inputs, 0.0, max_steps=1)
    assert refit.num_steps == 1
    assert refit.residual > 1e-3


def test_with_a_bias_it_is_the_refit_to_inputs_with_a_one() -> None:
    inputs, weight, mask = draw()
    keep = [1, 2, 7, 12]
    mask = torch.zeros_like(mask)
    mask[:, keep] = True
    gram = Gram(weight, 16)
    gram.update(inputs)
    gram_JJ = gram.compute()
    bias = torch.arange(8.0).double()
    refit = masked_least_squares(weight, mask, centred(gram_JJ), 0.01, tolerance=1e-10)
    expected_weight, expected_bias = least_squares_with_bias(weight, bias, gram_JJ, keep, 0.01)
    assert torch.allclose(refit.weight_OI[:, keep], expected_weight, rtol=1e-6)
    assert torch.allclose(bias + bias_change(weight, refit.weight_OI, gram_JJ), expected_bias, rtol=1e-6)


def test_the_bias_keeps_the_mean_of_the_output() -> None:
    inputs, weight, mask = draw()
    gram = Gram(weight, 16)
    gram.update(inputs)
    change = bias_change(weight, weight * mask, gram.compute())
    assert torch.allclose((inputs @ (weight * mask).T + change).mean(0), (inputs @ weight.T).mean(0))


@pytest.mark.parametrize(("tokens", "damping"), [(2.0, 1.5), (30.0, 0.1), (100.0, 0.03), (1e6, 0.03)])
def test_damping_falls_with_the_number_of_tokens(tokens: float, damping: float) -> None:
    assert damping_for(tokens) == pytest.approx(damping)


def test_what_does_not_fit_is_refused() -> None:
    inputs, weight, mask = draw()
    gram = inputs.T @ inputs
    with pytest.raises(ValueError, match="weight has 16 input features, the Gram matrix is 15 x 15"):
        masked_least_squares(weight, mask, gram[1:, 1:], 0.0)
    with pytest.raises(ValueError, match="mask must be bool and shaped like the weight"):
        masked_least_squares(weight, mask.float(), gram, 0.0)
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.bfloat16"):
        masked_least_squares(weight, mask, gram.bfloat16(), 0.0)
    with pytest.raises(ValueError, match=r"damping must be >= 0, got -1"):
        masked_least_squares(weight, mask, gram, -1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        masked_least_squares(weight, mask, gram * float("nan"), 0.0)
