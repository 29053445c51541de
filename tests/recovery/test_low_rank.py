"""Compare the low-rank updates of sparse weights with the formulas written out."""

import pytest
import torch
from torch import Tensor

from lightning_prune.recovery.low_rank import LowRankForm, effective_weight, low_rank_linear, start_low_rank

FORMS: tuple[LowRankForm, ...] = ("masked", "scaled")


def factors(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight_OI, mask_OI, down_RI, up_OR with O 6, I 5, R 2."""
    generator = torch.Generator().manual_seed(seed)
    mask_OI = torch.rand(6, 5, generator=generator) > 0.5
    weight_OI = torch.where(mask_OI, torch.randn(6, 5, generator=generator, dtype=dtype), 0.0)
    down_RI = torch.randn(2, 5, generator=generator, dtype=dtype)
    return weight_OI, mask_OI, down_RI, torch.randn(6, 2, generator=generator, dtype=dtype)


def written_out(weight_OI: Tensor, mask_OI: Tensor, down_RI: Tensor, up_OR: Tensor, form: str, scale: float) -> Tensor:
    """Return W + s (M * BA), or W * BA."""
    product_OI = up_OR @ down_RI
    return weight_OI * product_OI if form == "scaled" else weight_OI + scale * (mask_OI * product_OI)


def test_masked_by_hand() -> None:
    weight_OI = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    down_RI, up_OR = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0]])  # BA = [[3, 6], [-1, -2]]
    mask_OI = weight_OI != 0
    masked = effective_weight(weight_OI, mask_OI, down_RI, up_OR, form="masked", scale=0.5)
    scaled = effective_weight(weight_OI, mask_OI, down_RI, up_OR, form="scaled", scale=0.5)
    assert masked.tolist() == [[2.5, 0.0], [0.0, 3.0]]
    assert scaled.tolist() == [[3.0, 0.0], [0.0, -8.0]]


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_positive_zeros(form: LowRankForm) -> None:
    weight_OI, mask_OI, down_RI, up_OR = factors(dtype=torch.float32)
    merged_OI = effective_weight(weight_OI, mask_OI, down_RI, up_OR, form=form, scale=2.0)
    assert torch.equal(merged_OI != 0, mask_OI)
    assert not torch.signbit(merged_OI[~mask_OI]).any()


@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_those_of_the_formula(form: LowRankForm) -> None:
    weight_OI, mask_OI, *update = factors()
    leaves = [tensor.requires_grad_() for tensor in (weight_OI, *update)]
    input = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = input @ written_out(weight_OI, mask_OI, *update, form, 1.5).T
    expected = torch.autograd.grad(wanted, [input, *leaves], upstream)
    output = low_rank_linear(input, weight_OI, mask_OI, *update, form=form, scale=1.5)
    found = torch.autograd.grad(output, [input, *leaves], upstream)
    torch.testing.assert_close(output, wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_weight_gets_no_gradient() -> None:
    weight_OI, mask_OI, down_RI, up_OR = factors()
    output = low_rank_linear(
        torch.ones(1, 5, dtype=torch.float64),
        weight_OI,
        mask_OI,
        down_RI.requires_grad_(),
        up_OR.requires_grad_(),
        form="masked",
        scale=1.0,
    )
    output.sum().backward()
    assert weight_OI.grad is None
    torch.testing.assert_close(down_RI.grad, up_OR.detach().T @ mask_OI.double())  # of inputs that are all one


@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_weight_itself(form: LowRankForm) -> None:
    weight_OI, mask_OI, down_RI, up_OR = factors(dtype=torch.float32)
    start_low_rank(down_RI, up_OR, form=form)
    assert torch.equal(effective_weight(weight_OI, mask_OI, down_RI, up_OR, form=form, scale=3.0), weight_OI)


def rank_after_a_step(down_RI: Tensor, up_OR: Tensor) -> int:
    """Return the numerical rank of BA after one step of gradient descent on a random loss."""
    weight_OI = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    leaves = [down_RI.requires_grad_(), up_OR.requires_grad_()]
    grads = torch.autograd.grad((weight_OI * (up_OR @ down_RI)).square().sum(), leaves)
    with torch.no_grad():
        return int(torch.linalg.matrix_rank((up_OR - 0.1 * grads[1]) @ (down_RI - 0.1 * grads[0]), atol=1e-4))


def test_a_constant_start_of_scaled_would_stay_of_rank_one() -> None:
    constant = 1 / 2**0.5
    assert rank_after_a_step(torch.full((2, 5), constant), torch.full((6, 2), constant)) == 1
    down_RI, up_OR = torch.empty(2, 5), torch.empty(6, 2)
    torch.manual_seed(0)
    start_low_rank(down_RI, up_OR, form="scaled")
    assert rank_after_a_step(down_RI, up_OR) == 2


@pytest.mark.parametrize("form", FORMS)
def test_autocast_rounds_the_effective_weight_once(form: LowRankForm) -> None:
    weight_OI, mask_OI, down_RI, up_OR = factors(dtype=torch.float32)
    input = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    whole_OI = written_out(weight_OI, mask_OI, down_RI, up_OR, form, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        output = low_rank_linear(input, weight_OI, mask_OI, down_RI, up_OR, form=form, scale=1.0)
    assert torch.equal(output, input.bfloat16() @ whole_OI.bfloat16().T)
