"""Keep the masks of a prompt for the whole of a `generate`, with a key/value cache or without one.

Without a cache every call of the model holds the prompt and what was generated so far; with a prompt that is read in
parts the first call holds only its beginning. So the prompt is noted where `generate` is called.

Shapes: B prompts, T tokens, R rows of a call: several per prompt with beams or several answers.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.predictors.prompt import Prompt

__all__ = ["GenerationCall"]


class GenerationCall:
    """Stands in the place of a model's `generate` and notes what it is asked to go on with.

    Args:
        model: with or without a `generate`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prompt: Prompt | None = None  # of the generation that is going on
        self._masks: list[Tensor] | None = None
        self._plain: Callable[..., Any] | None = getattr(model, "generate", None)
        if self._plain is not None:
            self.__signature__ = inspect.signature(self._plain)
            model.generate = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; marks of an instruction are for training, and go no further."""
        assert self._plain is not None
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        mask = kwargs.get("attention_mask")
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("instruction_")}
        before = self.prompt, self._masks
        if isinstance(ids, Tensor):
            there = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
            self.prompt, self._masks = Prompt(ids, there), None
        try:
            return self._plain(*args, **kwargs)
        finally:
            self.prompt, self._masks = before

    def for_rows(self, num_rows: int, masks_of: Callable[[Prompt], list[Tensor]]) -> list[Tensor]:
        """Return the masks of the prompts for the rows of a call, predicted in the first one.

        Raises:
            ValueError: if the rows are not so many for each prompt.
        """
        assert self.prompt is not None
        if self._masks is None:
            self._masks = masks_of(self.prompt)
        each, rest = divmod(num_rows, len(self._masks[0]))
        if rest:
            raise ValueError(f"a generation of {len(self._masks[0])} prompts calls the model with {num_rows} rows")
        return [mask.repeat_interleave(each, dim=0) for mask in self._masks]

    def release(self) -> None:
        """Give the model its own `generate` back."""
        if self._plain is not None and self.model.__dict__.get("generate") is self:
            del self.model.generate
