"""Divergences against the golden values, an independent formula, and automatic differentiation."""

import pytest
import torch
from torch import Tensor

from lightning_prune.recovery.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL

TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3)
DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(), JensenShannon(beta=0.2)]


def value(divergence: Divergence, teacher: Tensor, student: Tensor) -> Tensor:
    return divergence.value_and_grad(teacher.log_softmax(-1), student.log_softmax(-1))[0]


def formula(divergence: Divergence, teacher: Tensor, student: Tensor) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    if isinstance(divergence, ForwardKL):
        return (p * (p / q).log()).sum(-1)
    if isinstance(divergence, ReverseKL):
        return (q * (q / p).log()).sum(-1)
    assert isinstance(divergence, JensenShannon)
    m = divergence.beta * p + (1 - divergence.beta) * q
    return divergence.beta * (p * (p / m).log()).sum(-1) + (1 - divergence.beta) * (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize(
    ("divergence", "temperature", "expected"),
    [(ForwardKL(), 1.0, 0.266217), (ForwardKL(), 2.0, 0.078421), (ReverseKL(), 1.0, 0.308994)],
)
def test_golden_values(divergence: Divergence, temperature: float, expected: float) -> None:
    found = value(divergence, TEACHER / temperature, STUDENT / temperature)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_jensen_shannon_by_hand() -> None:
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): (ln 4/3 + 1/2 ln 2/3 + 1/2 ln 2) / 2
    found = value(JensenShannon(), torch.tensor([[0.0, -1e9]]), torch.zeros(1, 2))
    assert found.item() == pytest.approx(0.2157616, abs=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_value_and_gradient_are_those_of_the_formula(divergence: Divergence) -> None:
    torch.manual_seed(0)
    teacher = 3 * torch.randn(5, 7, dtype=torch.float64)
    student = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    expected = formula(divergence, teacher, student)
    (grad,) = torch.autograd.grad(expected.sum(), student)
    found = divergence.value_and_grad(teacher.log_softmax(-1), student.detach().log_softmax(-1))
    torch.testing.assert_close(found[0], expected.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1], grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_equal_distributions_have_no_divergence_and_no_gradient(divergence: Divergence) -> None:
    log_p = torch.tensor([[5.0, 0.0, -120.0]]).log_softmax(-1)
    found, grad = divergence.value_and_grad(log_p.clone(), log_p.clone())
    assert found.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


def test_beta_outside_its_range_names_the_other_classes() -> None:
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\), got 1.0.*ForwardKL"):
        JensenShannon(beta=1.0)
