"""Which tokens are real, by hand."""

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration import padding

NEGATIVE = torch.finfo(torch.float32).min
REAL = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()  # padded on the right, and on the left


def causal(keep_BT: Tensor) -> Tensor:
    """Return pairs_BQT: every token attends to itself and to real tokens before it."""
    length = keep_BT.shape[1]
    return torch.ones(length, length).tril().bool() & (keep_BT[:, None, :] & keep_BT[:, :, None])


@pytest.mark.parametrize(
    "mask",
    [
        REAL,
        REAL.long(),
        REAL.float(),
        torch.where(REAL, 0.0, NEGATIVE),
        torch.where(REAL, 0.0, -torch.inf)[:, None, :],
        torch.where(REAL, 0.0, NEGATIVE)[:, None, None, :],
        causal(REAL)[:, None],
        torch.where(causal(REAL), 0.0, NEGATIVE)[:, None].expand(-1, 3, -1, -1),
        (REAL[:, None, :] & REAL[:, :, None])[:, None],
        {"full": torch.where(causal(REAL), 0.0, NEGATIVE)[:, None], "other": None},
    ],
)
def test_a_mask_of_any_kind_tells_the_same(mask: object) -> None:
    keep = padding.kept_by(mask)
    assert keep is not None
    assert torch.equal(keep, REAL)


def test_rows_of_padding_that_are_opened_to_everything_stay_padding() -> None:
    opened = causal(REAL)
    opened[1, 0] = True  # the row of padding on the left, which would attend to nothing
    opened[0, 3] = True
    found = padding.kept_by(opened[:, None])
    assert found is not None
    assert torch.equal(found[1], REAL[1])


def test_a_causal_mask_without_padding_keeps_everything() -> None:
    assert bool(padding.kept_by(torch.ones(2, 1, 5, 5).tril().bool()).all())  # type: ignore[union-attr]
    assert bool(padding.kept_by(torch.ones(2, 1, 5, 5, dtype=torch.bool)).all())  # type: ignore[union-attr]


def test_where_true_is_padding_it_is_turned_round() -> None:
    assert torch.equal(padding.kept_by(~REAL, is_inverted=True), REAL)  # type: ignore[arg-type]
    added = torch.where(REAL, 0.0, -torch.inf)
    assert torch.equal(padding.kept_by(added, is_inverted=True), REAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, "causal", torch.ones(4), torch.ones(2, 1, 3, 4), {}])
def test_what_says_nothing_is_no_mask(value: object) -> None:
    assert padding.kept_by(value) is None


def test_everything_up_to_the_last_real_token_counts() -> None:
    is_real = torch.tensor([[True, False, True, False], [False] * 4])
    assert padding.up_to_last(is_real).tolist() == [[True, True, True, False], [False] * 4]


def test_tokens_are_found_in_every_order_of_dimensions() -> None:
    inputs_BTI = torch.arange(24.0).reshape(2, 4, 3)
    wanted = inputs_BTI[REAL]
    assert torch.equal(padding.real_tokens(inputs_BTI, REAL), wanted)
    assert torch.equal(padding.real_tokens(inputs_BTI.transpose(0, 1), REAL), wanted)
    assert torch.equal(padding.real_tokens(inputs_BTI.reshape(8, 3), REAL), wanted)
    assert torch.equal(padding.real_tokens(inputs_BTI, None), inputs_BTI.reshape(8, 3))
    other = torch.rand(5, 3)  # no tokens of this mask
    assert torch.equal(padding.real_tokens(other, REAL), other)
    one, two = padding.sequences(inputs_BTI, REAL)
    assert torch.equal(one, inputs_BTI[0, :3])
    assert torch.equal(two, inputs_BTI[1, 1:])


def test_rows_that_were_picked_from_tokens_are_told_from_padding_by_their_bits() -> None:
    tokens_BTI = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    flat = tokens_BTI.reshape(8, 3)
    found = padding.rows_among(flat[[6, 0, 3, 4, 6]], tokens_BTI, REAL)
    assert found is not None
    assert found.tolist() == [True, True, False, False, True]
    assert padding.rows_among(flat[[6, 0]] + 1, tokens_BTI, REAL) is None
    assert padding.rows_among(flat[:, :2], tokens_BTI, REAL) is None
