"""Stand around the calls of a model, whoever changes its `forward` before or after.

Training programs put functions of their own in the place of a model's `forward`: for mixed precision, or for a loss
that never makes all logits. Hooks are not enough, since adapters call `forward` past them. So what stands around is
put in the place of `forward` too, and again in a later call of `hold`, around what has come in between.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["OuterCall"]

Around = Callable[[Callable[..., Any], dict[str, Any]], Any]


class OuterCall:
    """Calls a function with a model's forward and its arguments by name, once per call of the model.

    Args:
        model: whose forward it stands around.
        around: takes what to call and the arguments, and returns the output.
    """

    def __init__(self, model: nn.Module, around: Around) -> None:
        self.model, self.around = model, around
        self.is_on, self.is_inside = True, False
        self.num_calls = 0
        self._forward: _Forward | None = None
        self.hold()

    def hold(self) -> None:
        """Stand around the forward that the model has now."""
        if self.model.forward is not self._forward:
            self._forward = _Forward(self, self.model.forward)
            self.model.forward = self._forward

    def release(self) -> None:
        """Stand around no more; what others have put around this since calls through it."""
        self.is_on = False
        is_outermost = self._forward is not None and self.model.__dict__.get("forward") is self._forward
        if not is_outermost or self._forward is None:
            return
        inner = self._forward.inner
        if getattr(inner, "__func__", None) is type(self.model).forward:
            del self.model.forward  # the class has its own
        else:
            self.model.forward = inner


class _Forward:
    """What stands in the place of `forward`, with its signature."""

    def __init__(self, call: OuterCall, inner: Callable[..., Any]) -> None:
        self.call, self.inner = call, inner
        self.__signature__ = inspect.signature(inner)
        self._names = [
            name for name, one in self.__signature__.parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.call
        if not call.is_on or call.is_inside:
            return self.inner(*args, **kwargs)
        call.num_calls += 1
        call.is_inside = True
        try:
            return call.around(self.inner, {**dict(zip(self._names, args, strict=False)), **kwargs})
        finally:
            call.is_inside = False
