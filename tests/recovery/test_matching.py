"""Terms on hidden states and attention: by hand, against plain formulas, and what may not be compared."""

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.recovery.matching import (
    Attention,
    Cosine,
    Hidden,
    Relation,
    SquaredError,
    StateDistance,
    Tokens,
    map_layers,
)


def states(seed: int, *, width: int = 6, layers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, width, generator=generator) for _ in range(layers)]


def tokens(*, padded: bool = True) -> Tokens:
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = not padded
    return Tokens(mask, mask[:, None, :].expand(-1, 4, -1))


def attention(seed: int, *, heads: int, layers: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    causal = torch.full((4, 4), -math.inf).triu(1)
    return [(torch.randn(2, heads, 4, 4, generator=generator) + causal).softmax(-1) for _ in range(layers)]


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "expected"),
    [(2, 2, [0, 1]), (2, 4, [1, 3]), (3, 4, [0, 2, 3]), (4, 32, [7, 15, 23, 31]), (4, 2, [0, 0, 1, 1])],
)
def test_layers_are_spaced_evenly(num_student: int, num_teacher: int, expected: list[int]) -> None:
    assert map_layers(num_student, num_teacher) == tuple(enumerate(expected))


def test_cosine_and_squared_error_by_hand() -> None:
    student, teacher = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    one = Tokens(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool))
    assert Cosine().per_token(student, teacher, one).item() == pytest.approx(0.292893, abs=1e-6)
    assert SquaredError().per_token(student, teacher, one).item() == pytest.approx(0.5)


def test_pairs_are_summed_and_padding_is_left_out() -> None:
    student, teacher = states(0), states(1, layers=5)
    found = Hidden(distance=SquaredError(), layers=((1, 3),), embeddings=True).loss(student, teacher, tokens())
    errors = (student[2] - teacher[4]).square().mean(-1) + (student[0] - teacher[0]).square().mean(-1)
    assert found.item() == pytest.approx(errors.flatten()[:7].sum().item(), rel=1e-6)
    spaced = Hidden(distance=SquaredError()).loss(student, teacher, tokens())
    errors = (student[1] - teacher[2]).square().mean(-1) + (student[2] - teacher[4]).square().mean(-1)
    assert spaced.item() == pytest.approx(errors.flatten()[:7].sum().item(), rel=1e-6)


def test_relation_compares_a_token_with_the_others_of_its_text() -> None:
    student, teacher = states(2, width=4)[0], states(3, width=6)[0]
    found = Relation(heads=2).per_token(student, teacher, tokens())

    def relation(state: Tensor, others: list[int]) -> Tensor:
        scaled = state / state.square().mean(-1, keepdim=True).sqrt()
        return (scaled[1] @ scaled[others].T / state.shape[-1] ** 0.5).softmax(-1)

    expected = 0.0
    for head in range(2):  # of token 1 in the sequence with padding: others are 0 and 2
        p = relation(teacher[1, :, 3 * head : 3 * head + 3], [0, 2])
        q = relation(student[1, :, 2 * head : 2 * head + 2], [0, 2])
        expected += (p * (p / q).log()).sum().item() / 2
    assert found[1, 1].item() == pytest.approx(expected, rel=1e-3)  # the norm has a floor


def test_relation_is_the_same_for_rotated_and_scaled_states_and_finite_for_a_lone_token() -> None:
    student = states(4)[0].requires_grad_()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert Relation().per_token(3 * student.detach() @ rotation, student.detach(), tokens()).abs().max() < 1e-5
    alone = Tokens(torch.ones(2, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool).expand(2, 4, 4))
    value = Relation().per_token(student, states(5)[0], alone).sum()
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_attention_by_formula_and_averaged_over_heads_where_they_differ() -> None:
    student, teacher = attention(0, heads=2), attention(1, heads=2)
    counts = tokens().counts_BT

    def kl(p: Tensor, q: Tensor) -> float:
        ratio = torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0.0)
        return float(ratio.sum(-1).mean(1)[counts].sum())

    found = Attention().loss(student, teacher, tokens())
    assert found.item() == pytest.approx(kl(teacher[1], student[1]), rel=1e-5)
    wide = attention(2, heads=4)
    found = Attention(layers=((0, 1),)).loss(student, wide, tokens())
    expected = kl(wide[1].mean(1, keepdim=True), student[0].mean(1, keepdim=True))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", [Cosine(), SquaredError()], ids=str)
def test_other_widths_point_to_relation(distance: StateDistance) -> None:
    with pytest.raises(ValueError, match=r"student's width is 4 and the teacher's 6; use Relation"):
        Hidden(distance=distance).loss(states(0, width=4), states(0), tokens())


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pair \[2, 0\], but the student has blocks 0 to 1"):
        Hidden(layers=((2, 0),)).loss(states(0), states(1), tokens())
    with pytest.raises(ValueError, match="positive number or balanced, got 0"):
        Hidden(weight=0)
    with pytest.raises(ValueError, match="counted from 0"):
        Attention(layers=((0, -1),))
    with pytest.raises(ValueError, match="cuts states into 4 heads, but a width of 6"):
        Hidden(distance=Relation(heads=4)).loss(states(0), states(1), tokens())
    with pytest.raises(ValueError, match="heads must be 1 or more, got 0"):
        Relation(heads=0)
