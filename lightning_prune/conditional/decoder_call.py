"""What holds for the call of a decoder that is going on: which of its tokens are real.

Blocks are told of padding in many ways (a mask of pairs, a kernel's own form, nothing at all); the decoder around them
gets the mask that the user made, so it is read there.

Shapes: B sequences, T tokens of the call.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prune.calibration import padding
from lightning_prune.structured.structure import Stack

__all__ = ["DecoderCall", "Noted"]


class Noted(dict[object, Any]):
    """What calls leave behind for those who ask afterwards; a copy of the model starts without it."""

    def __reduce__(self) -> Any:
        return type(self), ()


class DecoderCall:
    """Follows the calls of the module that holds the blocks, until it is removed.

    Args:
        model: the model.
        stack: its blocks.
    """

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        self.decoder = model.get_submodule(stack.containers[0].rpartition(".")[0])
        names = list(inspect.signature(self.decoder.forward).parameters)
        self._position = names.index("attention_mask") if "attention_mask" in names else len(names)
        self._mask: object = None
        self.noted = Noted()  # in the last training call
        self._handle = self.decoder.register_forward_pre_hook(self.begin, with_kwargs=True)

    def begin(self, decoder: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Note the mask of a call; the first thing that happens in it."""
        if decoder.training:
            self.noted.clear()
        positional = args[self._position] if self._position < len(args) else None
        self._mask = kwargs.get("attention_mask", positional)

    def real(self, like_BTD: Tensor) -> Tensor | None:
        """Return which tokens are real, bool (B, T); None if all are, or nothing is known.

        Args:
            like_BTD: an activation of the call; of a mask that also covers what a cache holds, the last T are meant.
        """
        keep = padding.kept_by(self._mask)
        if keep is None or keep.shape[0] != like_BTD.shape[0] or keep.shape[1] < like_BTD.shape[1]:
            return None
        return keep[:, -like_BTD.shape[1] :].to(like_BTD.device)

    def remove(self) -> None:
        """Follow no more."""
        self._handle.remove()
