import math

import pytest
import torch
from torch import Tensor

from lightning_prune.predictors.soft_top_k import SoftTopK, kept, soft_top_k, soft_top_k_iterative

SCORES = torch.tensor([2, 1.5, 1, 0.5, 0, -0.5, -1, -2])
# Worked in double precision from the definition, by a solver that brackets the one unknown.
GOLDEN = {
    ("entropic", 1.0): [1, 0.817943, 0.496108, 0.300904, 0.182508, 0.110697, 0.067141, 0.024700],
    ("entropic", 0.3): [1, 1, 0.811290, 0.153233, 0.028942, 0.005466, 0.001032, 0.000037],
    ("entropic", 0.03): [1, 1, 1, 0, 0, 0, 0, 0],
    ("logistic", 1.0): [0.751391, 0.647038, 0.526486, 0.402766, 0.290294, 0.198777, 0.130794, 0.052453],
    ("logistic", 0.3): [0.984656, 0.923785, 0.695986, 0.301870, 0.075503, 0.015191, 0.002905, 0.000104],
}


@pytest.mark.parametrize(("form", "epsilon"), GOLDEN)
def test_golden_values(form: str, epsilon: float) -> None:
    found = soft_top_k(SCORES, 3, epsilon=epsilon, form=form)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(GOLDEN[form, epsilon], dtype=torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["entropic", "logistic"])
@pytest.mark.parametrize("scale", [1, 8, 30])
@pytest.mark.parametrize("epsilon", [0.3, 0.1, 0.03])
def test_every_row_sums_to_k_in_float32(form: str, scale: float, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(1000, 256, generator=generator)
    behind_a_gap = torch.where(kept(scores, 32), scores, scores - 40 * epsilon)
    for rows in (scores, behind_a_gap):
        sums = soft_top_k(rows, 32, epsilon=epsilon, form=form).sum(-1)  # type: ignore[arg-type]
        torch.testing.assert_close(sums, torch.full_like(sums, 32), rtol=1e-5, atol=0)


def closed_form(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """Return the choice of one row by trying every number of saturated entries, in operations that autograd knows."""
    order = scores.argsort(descending=True)
    for num in range(k):
        shift = math.log(k - num) - (scores[order[num:]] / epsilon).logsumexp(0)
        found = (scores / epsilon + shift).exp().clamp(max=1)
        if abs(float(found.detach().sum()) - k) < 1e-9:
            return found
    raise AssertionError("no solution")


def test_gradient_is_that_of_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    for epsilon in (1.0, 0.3, 0.1):
        scores = torch.randn(40, dtype=torch.float64, generator=generator, requires_grad=True)
        weights = torch.randn(40, dtype=torch.float64, generator=generator)
        (expected,) = torch.autograd.grad((closed_form(scores, 7, epsilon) * weights).sum(), scores)
        (found,) = torch.autograd.grad((soft_top_k(scores, 7, epsilon=epsilon) * weights).sum(), scores)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_logistic_gradient_is_that_of_finite_differences() -> None:
    scores = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 4, epsilon=0.3, form="logistic"), scores)


def test_saturated_entries_get_no_gradient_and_unchosen_ones_do() -> None:
    scores = SCORES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(soft_top_k(scores, 3, epsilon=0.3)[2], scores)
    assert grad[:2].tolist() == [0, 0]
    assert bool((grad[3:7] != 0).all())


def test_rows_may_differ_in_k_and_each_is_what_it_is_alone() -> None:
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    numbers = torch.tensor([1, 5, 19, 20])
    together = soft_top_k(scores, numbers, epsilon=0.3)
    for row, number in enumerate(numbers.tolist()):
        torch.testing.assert_close(together[row], soft_top_k(scores[row], number, epsilon=0.3))
    assert kept(scores, numbers).sum(-1).tolist() == numbers.tolist()


def test_masked_scores_are_never_chosen() -> None:
    scores = torch.tensor([[1.0, 5.0, 0.5, -torch.inf, -torch.inf]], requires_grad=True)
    for form in ("entropic", "logistic"):
        found = soft_top_k(scores, 2, epsilon=0.5, form=form)  # type: ignore[arg-type]
        assert found[0, 3:].tolist() == [0, 0]
        torch.testing.assert_close(found.sum(), torch.tensor(2.0))
        (grad,) = torch.autograd.grad(found[0, 0], scores)
        assert bool(grad.isfinite().all())


def test_all_are_chosen_where_k_is_their_number() -> None:
    torch.testing.assert_close(soft_top_k(SCORES, 8, epsilon=0.3), torch.ones(8))


def test_iterations_reach_the_exact_solution_only_at_high_temperature() -> None:
    exact = soft_top_k(SCORES.double(), 3, epsilon=1.0)
    torch.testing.assert_close(
        soft_top_k_iterative(SCORES.double(), 3, epsilon=1.0, num_iterations=20), exact, rtol=0, atol=1e-7
    )
    sums = {
        (number, start, decay): float(
            soft_top_k_iterative(
                SCORES.double(), 3, epsilon=0.03, num_iterations=number, start=start, decay=decay
            ).sum()
        )
        for number, start, decay in ((20, 4.0, 0.7), (50, 4.0, 0.7), (50, None, 1.0))
    }
    assert sums[20, 4.0, 0.7] == pytest.approx(2.085, abs=1e-3)
    assert sums[50, 4.0, 0.7] == pytest.approx(2.99994, abs=1e-4)
    assert sums[50, None, 1.0] == pytest.approx(4.0, abs=1e-3)


@pytest.mark.parametrize("hard", [False, True])
def test_masks_hold_exactly_k_also_among_ties(hard: bool) -> None:
    scores = torch.zeros(2, 10, requires_grad=True)
    mask = SoftTopK(epsilon=0.3, hard=hard)(scores, 3)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(mask.detach()[mask > 0], torch.full((6,), 1.0 if hard else 0.3))
    (grad,) = torch.autograd.grad(mask[0, 0], scores)
    assert float(grad[0, 0]) == pytest.approx(0.3 / 0.3 * (1 - 0.3 / 3))


def test_low_precision_scores_are_solved_in_float32() -> None:
    scores = SCORES.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = soft_top_k(scores, 3, epsilon=0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, soft_top_k(SCORES, 3, epsilon=0.3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does it
def test_compiles_whole() -> None:
    scores = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
    compiled = torch.compile(lambda s: SoftTopK()(s, 5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores), SoftTopK()(scores, 5))


@pytest.mark.parametrize(
    ("k", "epsilon", "said"),
    [(0, 0.3, "k must be"), (9, 0.3, "at most the 8 scores"), (3, 0.0, "epsilon must be positive")],
)
def test_what_cannot_be_chosen_is_refused(k: int, epsilon: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        soft_top_k(SCORES, k, epsilon=epsilon)
    with pytest.raises(ValueError, match=said):
        soft_top_k_iterative(SCORES, k, epsilon=epsilon)


def test_number_outside_of_a_row_is_refused_for_any_row() -> None:
    with pytest.raises(ValueError, match="in every row, got 0 to 3"):
        soft_top_k(torch.zeros(2, 4), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="positive and finite"):
        SoftTopK(epsilon=float("inf"))
