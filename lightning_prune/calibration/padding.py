"""Which tokens of an activation are real, told from the masks and the labels that a model was called with.

Shapes: B sequences, T tokens, Q queries, I features, N rows of a flattened activation.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["align", "kept_by", "leading", "real_tokens", "rows_among", "sequences", "up_to_last"]


def leading(tensor: Tensor) -> torch.Size:
    """Return the dimensions that count tokens: all of ids, all but the last of activations."""
    return tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape


def kept_by(mask: object, *, is_inverted: bool = False) -> Tensor | None:
    """Return keep_BT, bool, from an attention mask of any kind; None if it cannot be told or says nothing.

    Args:
        mask: (B, T) with non-zeros at real tokens, or added to scores, so with negative numbers at padding; (B, Q, Q)
            or (B, heads, Q, Q) of pairs, or (B, heads, 1, T); several by name, of which the first that can be read.
        is_inverted: whether True means padding, as in torch's `key_padding_mask`.
    """
    if isinstance(mask, Mapping):
        return next((keep for keep in map(kept_by, mask.values()) if keep is not None), None)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4):
        return None
    if mask.ndim == 2:
        return _kept(mask, is_inverted=is_inverted)
    if mask.ndim == 4:
        mask = mask[:, 0]
    if mask.shape[1] == 1:
        return _kept(mask[:, 0], is_inverted=False)
    return _kept_by_pairs(_kept(mask, is_inverted=False)) if mask.shape[1] == mask.shape[2] else None


def _kept(mask: Tensor, *, is_inverted: bool) -> Tensor:
    mask = mask.detach()
    if mask.is_floating_point() and (is_inverted or bool((mask < 0).any())):
        return mask > -1
    return (mask == 0) if is_inverted else (mask != 0)


def _kept_by_pairs(pairs_BQT: Tensor) -> Tensor:
    """Return keep_BT from who may attend to whom: a real token attends to itself.

    Rows of padding that would attend to nothing are opened to everything by some kernels' callers; an open row is
    padding unless another row that is not open attends to it, or it is the last.
    """
    itself = pairs_BQT.diagonal(dim1=1, dim2=2)
    is_open = pairs_BQT.all(2)
    is_read = (pairs_BQT & ~is_open[:, :, None]).any(1)
    is_last = torch.arange(itself.shape[1], device=itself.device) == itself.shape[1] - 1
    return itself & (~is_open | is_read | is_last | is_open.all(1, keepdim=True))


def up_to_last(is_real_BT: Tensor) -> Tensor:
    """Return keep_BT: every token up to the last real one of its sequence."""
    return is_real_BT.flip(1).cumsum(1).flip(1) > 0


def align(inputs: Tensor, keep: Tensor) -> Tensor | None:
    """Return an activation with the tokens of a mask as its first dimensions; None if they are not its tokens."""
    shape = inputs.shape[:-1]
    if shape[: keep.ndim] == keep.shape:
        return inputs
    if keep.ndim == 2 and shape[:2] == (keep.shape[1], keep.shape[0]):
        return inputs.transpose(0, 1)  # time first
    return inputs.reshape(*keep.shape, inputs.shape[-1]) if shape == (keep.numel(),) else None


def rows_among(rows_NI: Tensor, tokens: Tensor, keep: Tensor) -> Tensor | None:
    """Return keep_N for rows picked from some tokens, as experts get them; None if they were not picked from these.

    Rows are found by their bits; one that equals a padding token counts as padding.
    """
    aligned = align(tokens, keep)
    if aligned is None or rows_NI.ndim != 2 or aligned.ndim != keep.ndim + 1:
        return None
    if rows_NI.shape[-1] != tokens.shape[-1] or rows_NI.dtype != tokens.dtype:
        return None
    found, real, padding = (_fingerprints(rows) for rows in (rows_NI, aligned[keep], aligned[~keep]))
    is_padding = torch.isin(found, padding)
    return ~is_padding if bool((torch.isin(found, real) | is_padding).all()) else None


def _fingerprints(rows_NI: Tensor) -> Tensor:
    """Return one int64 number per row that depends on every bit of it."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows_NI.element_size()]
    bits = rows_NI.detach().contiguous().view(width).to(torch.int64)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x1E3779B97F4A7C15
    mixed = (bits ^ places) * 0x3F58476D1CE4E5B9
    return (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)).sum(1)


def real_tokens(inputs: Tensor, keep: Tensor | None) -> Tensor:
    """Return input_TI without padding."""
    aligned = None if keep is None else align(inputs, keep)
    return inputs.reshape(-1, inputs.shape[-1]) if aligned is None else aligned[keep].reshape(-1, inputs.shape[-1])


def sequences(inputs: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
    """Yield input_TI without padding of every sequence; flat inputs without a mask are one sequence."""
    aligned = None if keep is None else align(inputs, keep)
    if keep is None or aligned is None or keep.ndim != 2:
        rest = inputs if aligned is None else aligned[keep]
        yield from (rest.flatten(0, -3) if rest.ndim > 2 else rest[None])
        return
    for input_TI, keep_T in zip(aligned, keep, strict=True):
        yield input_TI[keep_T].reshape(-1, inputs.shape[-1])
