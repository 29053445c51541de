"""The texts of a batch, told apart by all that a teacher sees of them.

One row of a batch is one text. Its key covers every input of the call: the tokens, where padding stands before and
between them, their positions, where one text of a packed row ends, and which inputs were given at all, since a teacher
reads a row without a mask otherwise than one with a mask of ones. Padding after the last token is left out, so a row is
found again in another batch, order or width. A text that moved within its row, or whose neighbours in the row changed,
is another text.

Limits: a teacher that looks from one row at another, or behind the last token, is not served by such keys.

Shapes: B sequences, T tokens, N = B * T, M tokens of the passages.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Passages", "memory_of"]

# Sizes of buffers, which follow from the boundaries.
_OF_NO_CONSEQUENCE = frozenset({"max_length_k", "max_length_q"})
# Boundaries of packed texts: one list for the whole batch.
_OF_THE_BATCH = frozenset({"cu_seq_lens_k", "cu_seq_lens_q"})


@dataclass(frozen=True)
class Passages:
    """The texts of a batch: their keys, and where their tokens stand among the N of the batch."""

    keys: tuple[bytes, ...]
    lengths: tuple[int, ...]
    positions_M: Tensor
    num_tokens: int

    @classmethod
    def of(cls, inputs: Mapping[str, object]) -> "Passages":
        """Find the passages in the inputs of a model's call.

        Args:
            inputs: `input_ids` of shape BT; where given `attention_mask`, whose zeros behind a row's last token are
                left out, and other tensors of one value per token.

        Raises:
            ValueError: if there are inputs that are not made of values per token.
        """
        ids_BT = _host(inputs["input_ids"])
        per_token, common = _sorted_out(inputs, ids_BT)
        num_rows, width = ids_BT.shape
        mask_BT = per_token.get("attention_mask")
        kept_BT = torch.ones((num_rows, width), dtype=torch.bool) if mask_BT is None else mask_BT != 0
        # The number of the last kept token, counted from 1; 0 where there is none.
        ends_B = (kept_BT * torch.arange(1, width + 1)).amax(1) if width else torch.zeros(num_rows, dtype=torch.int64)
        is_in_BT = torch.arange(width) < ends_B[:, None]
        keys, lengths = [], []
        for row, end in enumerate(ends_B.tolist()):
            if end:
                keys.append(_key(common, {name: value_BT[row, :end] for name, value_BT in per_token.items()}))
                lengths.append(end)
        return cls(tuple(keys), tuple(lengths), is_in_BT.flatten().nonzero()[:, 0], ids_BT.numel())


def _sorted_out(inputs: Mapping[str, object], ids_BT: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """Return the inputs with one value per token, and what else belongs to every row's key, as text.

    Raises:
        ValueError: if an input is neither.
    """
    per_token: dict[str, Tensor] = {}
    common: list[str] = []
    unknown: list[str] = []
    for name, value in sorted(inputs.items()):
        if value is None or name in _OF_NO_CONSEQUENCE:
            continue
        if isinstance(value, Tensor) and _is_per_token(value, ids_BT):
            per_token[name] = _host(value).expand_as(ids_BT)
        elif isinstance(value, Tensor) and name in _OF_THE_BATCH:
            common.append(f"{name}={_host(value).tolist()}")
        elif isinstance(value, bool | int | float | str):
            common.append(f"{name}={value!r}")
        elif isinstance(value, Tensor) and name in ("attention_mask", "position_ids"):
            unknown.append(f"{name} of {value.ndim} dimensions")
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"cached logits are found by what is said of each token, but the model is also given {', '.join(unknown)}; "
            "set distill.cache_dir: null"
        )
    return per_token, common


def _is_per_token(value: Tensor, ids_BT: Tensor) -> bool:
    num_rows, width = ids_BT.shape
    return value.ndim == 2 and value.shape[1] == width and value.shape[0] in (1, num_rows)


def _key(common: list[str], per_token: Mapping[str, Tensor]) -> bytes:
    """Return the key of one row."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\n".join(common).encode())
    for name, value_T in per_token.items():
        # Whole numbers alike in every width of integer: a mask of bools says what one of ones does.
        same_T = value_T.double() if value_T.is_floating_point() else value_T.long()
        digest.update(f"\n{name} {len(same_T)} {same_T.dtype}\n".encode())
        digest.update(memory_of(same_T))
    return digest.digest()


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor on the CPU in the order of its values."""
    array = tensor.contiguous().numpy()
    return memoryview(array).cast("B")  # type: ignore[arg-type]


def _host(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach().cpu()
