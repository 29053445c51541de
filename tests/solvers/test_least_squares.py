"""Refits: by hand, against numpy's least squares, and what damping does at both ends."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.solvers.least_squares import (
    default_damping,
    factorize,
    least_squares,
    least_squares_with_bias,
    mean_bias,
)
from lightning_prune.statistics.gram import Gram


def draw(num_tokens: int = 60, num_inputs: int = 6, num_outputs: int = 4) -> tuple[Tensor, Tensor]:
    """Return correlated inputs with a mean, and weights."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(num_inputs, num_inputs, generator=generator)
    inputs = torch.randn(num_tokens, num_inputs, generator=generator) @ mix + 2 * torch.arange(num_inputs)
    return inputs.double(), torch.randn(num_outputs, num_inputs, generator=generator).double()


def test_by_hand() -> None:
    # the second input is always twice the first, the third lives alone: 1 * x0 + 5 * x1 + 3 * x2 = 11 * x0 + 3 * x2
    inputs = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[1.0, 5.0, 3.0]])
    assert torch.allclose(least_squares(weight, inputs.T @ inputs, [0, 2], 0.0), torch.tensor([[11.0, 3.0]]).double())


@pytest.mark.parametrize("keep", [[0, 1, 4], [5], [1, 2, 3, 4, 5], [4, 0]])
def test_without_damping_it_is_numpys_answer(keep: list[int]) -> None:
    inputs, weight = draw()
    expected = np.linalg.lstsq(inputs[:, keep].numpy(), (inputs @ weight.T).numpy())[0].T
    ours = least_squares(weight.float(), inputs.T @ inputs, keep, 0.0)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_with_a_bias_it_is_numpys_answer_to_the_inputs_with_a_one() -> None:
    inputs, weight = draw()
    bias = torch.arange(4.0)
    keep = [0, 3]
    gram = Gram(weight, 6)
    gram.update(inputs)
    extended = np.concatenate([inputs[:, keep].numpy(), np.ones((60, 1))], 1)
    expected = np.linalg.lstsq(extended, (inputs @ weight.T + bias).numpy())[0].T
    new_weight, new_bias = least_squares_with_bias(weight, bias, gram.compute(), keep, 0.0)
    np.testing.assert_allclose(new_weight.numpy(), expected[:, :-1], rtol=1e-8)
    np.testing.assert_allclose(new_bias.numpy(), expected[:, -1], rtol=1e-8)


def test_damping_is_a_ridge_on_the_change() -> None:
    # the same as asking, with weight sqrt(ridge), that the change of every kept weight be zero
    inputs, weight = draw()
    keep, removed = [0, 2, 3], [1, 4, 5]
    gram = inputs.T @ inputs
    ridge = 0.05 * float(gram.diagonal().mean())
    rows = np.concatenate([inputs[:, keep].numpy(), np.sqrt(ridge) * np.eye(3)])
    wanted = np.concatenate([(inputs[:, removed] @ weight[:, removed].T).numpy(), np.zeros((3, 4))])
    expected = weight[:, keep].numpy() + np.linalg.lstsq(rows, wanted)[0].T
    np.testing.assert_allclose(least_squares(weight, gram, keep, 0.05).numpy(), expected, rtol=1e-8)


def test_strong_damping_is_plain_removal_and_keeping_all_changes_nothing() -> None:
    inputs, weight = draw()
    gram = inputs.T @ inputs
    torch.testing.assert_close(least_squares(weight, gram, [1, 2], 1e12), weight[:, [1, 2]], rtol=1e-6, atol=1e-6)
    assert torch.equal(least_squares(weight, gram, list(range(6)), 0.1), weight)


def test_the_scale_of_the_gram_matrix_does_not_matter() -> None:
    inputs, weight = draw()
    gram = inputs.T @ inputs
    torch.testing.assert_close(
        least_squares(weight, gram, [1, 2], 1e-3), least_squares(weight, gram / 60, [1, 2], 1e-3), rtol=1e-9, atol=0.0
    )


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    inputs, weight = draw()
    inputs[:, 3] = 0
    refit = least_squares(weight, inputs.T @ inputs, [0, 3], 0.0)
    assert torch.equal(refit[:, 1], weight[:, 3])


def test_a_constant_input_is_replaced_exactly_by_its_mean() -> None:
    inputs, weight = draw()
    inputs[:, 2] = 7.5
    keep = [0, 1, 3, 4, 5]
    bias = mean_bias(weight, torch.zeros(4), inputs.mean(0), keep)
    torch.testing.assert_close(inputs[:, keep] @ weight[:, keep].T + bias, inputs @ weight.T)


def test_the_mean_bias_is_the_refit_under_infinite_damping() -> None:
    inputs, weight = draw()
    gram = Gram(weight, 6)
    gram.update(inputs)
    _, bias = least_squares_with_bias(weight, torch.ones(4), gram.compute(), [0, 5], 1e15)
    torch.testing.assert_close(bias, mean_bias(weight, torch.ones(4), inputs.mean(0), [0, 5]), rtol=1e-6, atol=1e-6)


def test_a_singular_matrix_gets_the_least_jitter_that_works() -> None:
    ones = torch.ones(3, 3, dtype=torch.float64)
    factor = factorize(ones)
    torch.testing.assert_close(factor @ factor.T, ones, rtol=0.0, atol=1e-9)
    with pytest.raises(ValueError, match="not positive definite even with damping; check the model"):
        factorize(torch.full((2, 2), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize(("num_tokens", "expected"), [(200, 0.3), (1599, 0.3), (1600, 1e-2), (10**6, 1e-2)])
def test_damping_follows_the_tokens_per_kept_input(num_tokens: int, expected: float) -> None:
    assert default_damping(num_tokens, 100) == expected


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="fc2 keeps 100 inputs and saw 199 calibration tokens; least squares needs at"):
        default_damping(199, 100, "fc2")
    with pytest.raises(ValueError, match="weight has 3 input features, the Gram matrix is 4 x 4; collect it"):
        least_squares(torch.ones(2, 3), torch.eye(4), [0], 0.0)
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        least_squares(torch.ones(2, 3), torch.eye(3), [0], -1)
    with pytest.raises(ValueError, match="no input is kept"):
        least_squares(torch.ones(2, 3), torch.eye(3), [], 0.0)
