"""Add the term of a conditional method to the loss in a model's output, for any trainer."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_prune.conditional.method import Condition
from lightning_prune.predictors.outer_call import OuterCall

__all__ = ["AddedLoss"]


class AddedLoss:
    """Adds the term of a method to the loss in the model's output."""

    def __init__(self, condition: Condition, model: nn.Module) -> None:
        self.condition, self._was_added = condition, False
        has_term = type(condition).loss is not Condition.loss
        self._call = OuterCall(model, self._add) if has_term else None

    def hold(self) -> None:
        """Stand around what the training program has put in the place of the model's forward since."""
        if self._call is not None:
            self._call.hold()

    def _add(self, forward: Callable[..., Any], batch: dict[str, Any]) -> Any:
        output = forward(**batch)
        term = self.condition.loss()
        if term is not None and getattr(output, "loss", None) is not None:
            output.loss = output.loss + term
            self._was_added = True
        return output

    def check_added(self) -> None:
        """Check, once a step was taken, that the loss had the term in it.

        Raises:
            ValueError: if the training takes a loss of its own.
        """
        if self.condition.loss() is not None and not self._was_added:
            raise ValueError(
                f"{type(self.condition).__name__} adds a term to the loss in the model's output, and this training "
                "computes its loss by itself (label smoothing, a loss function, logits alone); train on the model's "
                "own loss: pass labels"
            )
