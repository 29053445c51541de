"""The summed loss on logits: against a plain formula, by hand for top-k targets, and row by row."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.recovery import token_loss
from lightning_prune.recovery.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from lightning_prune.recovery.token_loss import FullTargets, TokenLoss, TopTargets

DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon()]


def logits(seed: int, *, rows: int = 6, vocab: int = 11) -> Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 6) -> Tensor:
    return torch.tensor([3, -100, 0, 10, -100, 7])[:rows]


def gradient(loss: TokenLoss, student: Tensor, targets: FullTargets | TopTargets, target: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    loss(student, targets, target)[0].backward()
    assert student.grad is not None
    return student.grad


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_kl_and_cross_entropy_match_torch(temperature: float, ce_weight: float) -> None:
    student, teacher, target = logits(0).requires_grad_(), logits(1), labels()
    loss = TokenLoss(divergence=ForwardKL(), temperature=temperature, scale=temperature**2, ce_weight=ce_weight)
    counts = target != -100
    expected_kd = functional.kl_div(
        (student[counts] / temperature).log_softmax(-1), (teacher[counts] / temperature).softmax(-1), reduction="sum"
    )
    expected_ce = functional.cross_entropy(student, target, reduction="sum")
    expected = temperature**2 * expected_kd + ce_weight * expected_ce
    (grad,) = torch.autograd.grad(expected, student)
    total, kd, ce = loss(student, FullTargets(teacher), target)
    torch.testing.assert_close((total, kd, ce), (expected, expected_kd, expected_ce), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(loss, student.detach(), FullTargets(teacher), target), grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ce_weight", [0.5, 1.0])
def test_smoothed_labels_and_their_gradient_match_torch(ce_weight: float) -> None:
    student, teacher, target = logits(0).requires_grad_(), logits(1), labels()
    loss = TokenLoss(divergence=ForwardKL(), ce_weight=ce_weight, label_smoothing=0.3)
    counts = target != -100
    expected_kd = functional.kl_div(student[counts].log_softmax(-1), teacher[counts].softmax(-1), reduction="sum")
    expected_ce = functional.cross_entropy(student, target, reduction="sum", label_smoothing=0.3)
    (grad,) = torch.autograd.grad(expected_kd + ce_weight * expected_ce, student)
    torch.testing.assert_close(loss(student, FullTargets(teacher), target)[2], expected_ce, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(loss, student.detach(), FullTargets(teacher), target), grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradient_by_differences(divergence: Divergence) -> None:
    student, teacher, target = logits(2), logits(3), labels()
    loss = TokenLoss(divergence=divergence, temperature=1.5)
    for targets in (FullTargets(teacher), TopTargets.of(teacher, k=4, temperature=1.5)):
        grad = gradient(loss, student, targets, target)
        step = torch.zeros_like(student)
        step[0, 5], step[3, 2], step[3, 10] = 0.02, -0.03, 0.01
        up, down = (loss(student + sign * step, targets, target)[0] for sign in (1, -1))
        assert ((up - down) / 2).item() == pytest.approx((grad * step).sum().item(), rel=2e-3)


def test_top_k_by_hand() -> None:
    # p = (1/2, 1/4, 1/8, 1/8), q uniform; with k = 2 the rest is 1/4 against 1/2.
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    targets = TopTargets.of(teacher, k=2, temperature=1.0)
    assert sorted(targets.ids_Nk[0].tolist()) == [0, 1]
    assert targets.log_probs_NK[0, 2].exp().item() == pytest.approx(0.25)
    student = torch.zeros(1, 4)
    loss = TokenLoss(divergence=ForwardKL())
    _, kd, _ = loss(student, targets, torch.tensor([0]))
    assert kd.item() == pytest.approx(0.5 * math.log(2) + 0 + 0.25 * math.log(0.5), abs=1e-6)
    # q - p for the two; the rest moves by q_rest - p_rest = 1/4, half of it each.
    found = gradient(loss, student, targets, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([[-0.25, 0.0, 0.125, 0.125]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_top_k_is_a_lower_bound_that_grows_with_k(divergence: Divergence) -> None:
    student, teacher, target = logits(4), logits(5), torch.zeros(6, dtype=torch.int64)
    loss = TokenLoss(divergence=divergence)
    values = [loss(student, TopTargets.of(teacher, k=k, temperature=1.0), target)[1].item() for k in range(1, 11)]
    assert values == sorted(values)
    # With k = V - 1 the rest is one token, so nothing is left out.
    assert values[-1] == pytest.approx(loss(student, FullTargets(teacher), target)[1].item(), rel=1e-5)


def test_a_rest_without_probability_stays_finite() -> None:
    teacher, student = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[0.0, 200.0, 0.0]])
    for divergence in DIVERGENCES:
        loss = TokenLoss(divergence=divergence)
        targets = TopTargets.of(teacher, k=1, temperature=1.0)
        assert loss(student, targets, torch.tensor([0]))[1].isfinite()
        assert gradient(loss, student, targets, torch.tensor([0])).isfinite().all()


def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, target = logits(6), logits(7), labels()
    loss = TokenLoss(divergence=ForwardKL(), ce_weight=0.3)
    whole = loss(student, FullTargets(teacher), target), gradient(loss, student, FullTargets(teacher), target)
    monkeypatch.setattr(token_loss, "_CHUNK_CPU", 25)  # two rows
    parts = loss(student, FullTargets(teacher), target), gradient(loss, student, FullTargets(teacher), target)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-6)


def test_rows_without_label_have_no_gradient_even_if_the_teacher_says_nan() -> None:
    student, teacher, target = logits(8), logits(9), labels()
    teacher[1], student[4] = math.nan, math.nan
    loss = TokenLoss(divergence=ForwardKL(), ce_weight=0.3)
    assert loss(student, FullTargets(teacher), target)[0].isfinite()
    grad = gradient(loss, student, FullTargets(teacher), target)
    assert (grad[target == -100] == 0).all()
    assert (grad[target != -100] != 0).all()


def test_half_precision_logits_get_a_gradient_of_their_dtype() -> None:
    student, teacher = logits(10).bfloat16(), logits(11).bfloat16()
    loss = TokenLoss(divergence=ForwardKL())
    total, _, _ = loss(student, FullTargets(teacher), labels())
    exact, _, _ = loss(student.float(), FullTargets(teacher.float()), labels())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, atol=0, rtol=0)
    assert gradient(loss, student, FullTargets(teacher), labels()).dtype == torch.bfloat16


def test_padded_heads_are_compared_over_the_tokens_they_share() -> None:
    student, teacher, target = logits(12, vocab=13), logits(13, vocab=16), labels()
    shared = TokenLoss(divergence=ForwardKL(), ce_weight=0.5)
    expected = shared(student[:, :11], FullTargets(teacher[:, :11]), target)
    loss = TokenLoss(divergence=ForwardKL(), ce_weight=0.5, num_tokens=11)
    torch.testing.assert_close(loss(student, FullTargets(teacher), target), expected)
    grad = gradient(loss, student, FullTargets(teacher), target)
    assert (grad[:, 11:] == 0).all()
    torch.testing.assert_close(grad[:, :11], gradient(shared, student[:, :11], FullTargets(teacher[:, :11]), target))


def test_a_second_backward_pass_is_refused() -> None:
    student = logits(0).requires_grad_()
    total, _, _ = TokenLoss(divergence=ForwardKL())(student, FullTargets(logits(1)), labels())
    total.backward(retain_graph=True)
    with pytest.raises(ValueError, match="can be taken once"):
        total.backward()


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher has a vocabulary of 16 tokens, the student of 11.*num_tokens"):
        TokenLoss(divergence=ForwardKL())(logits(0), FullTargets(logits(1, vocab=16)), labels())
    with pytest.raises(ValueError, match=r"at most 11.*got 12"):
        TokenLoss(divergence=ForwardKL(), num_tokens=12)(logits(0), FullTargets(logits(1)), labels())


def test_top_k_of_the_whole_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="under the vocabulary's 11 tokens, got 11"):
        TopTargets.of(logits(0), k=11, temperature=1.0)
