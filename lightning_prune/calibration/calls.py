"""Follow the calls of a model's parts while they run, to know which mask belongs to what a layer reads.

A mask counts for the tokens of the call that got it and of the calls inside it, as long as these get the same tokens.
Of an encoder-decoder the two sides are told apart by place: the decoder is what is called with encoder states, and
what still reads these states counts by the encoder's mask.

Shapes: B sequences, T tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration import padding

__all__ = ["Call", "Calls", "Hook", "in_backward"]

_MASKS = ("attention_mask",)
_PADDINGS = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")  # torch's own: True is padding
_STATES = ("encoder_hidden_states", "key_value_states", "memory")
_STATES_MASKS, _STATES_PADDINGS = ("encoder_attention_mask",), ("memory_key_padding_mask",)
_TWO_SIDES = {"decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "decoder_input_values"}
_OTHERS = {"decoder_input_ids", "decoder_attention_mask", "input_ids", "labels"}
_WANTED = {*_MASKS, *_PADDINGS, *_STATES, *_STATES_MASKS, *_STATES_PADDINGS, *_TWO_SIDES, *_OTHERS}


def in_backward() -> bool:
    """Return whether activations are being computed once more, for a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _nothing(*args: object, **kwargs: object) -> None:
    """Stand in a pickled model for what observed it."""


def _make_nothing() -> Callable[..., None]:
    return _nothing


class Hook:
    """A hook that belongs to one run: a copy of the model shares it, a pickled model comes back without it."""

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> Any:
        return _make_nothing, ()


class Call:
    """One call of a module that is going on.

    Args:
        module: what is called.
        arguments: those of interest, by name.
        tensors: all it was given.
        outer: the call inside which it was made.
    """

    def __init__(
        self, module: nn.Module, arguments: Mapping[str, object], tensors: tuple[Tensor, ...], outer: "Call | None"
    ) -> None:
        self.module, self.arguments, self.tensors, self.outer = module, arguments, tensors, outer
        self.has_gradient: bool = torch.is_grad_enabled() if outer is None else outer.has_gradient
        self.is_past_decoder = False
        self._keep: tuple[Tensor | None] | None = None

    def chain(self) -> Iterator["Call"]:
        """Yield this call and those around it, outwards."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.outer

    @property
    def states(self) -> Tensor | None:
        """Return the encoder's states if the call got some: then it is a decoder's, or of a part of one."""
        found = (self.arguments.get(name) for name in _STATES)
        return next((value for value in found if isinstance(value, Tensor)), None)

    @property
    def has_two_sides(self) -> bool:
        """Return whether encoder and decoder are both called inside."""
        return bool(_TWO_SIDES & self.arguments.keys())

    def keep(self) -> Tensor | None:
        """Return which of the call's tokens are real, bool (B, T) or flat; None if all are or nothing is known."""
        if self._keep is None:
            self._keep = (self._find_keep(),)
        return self._keep[0]

    def _find_keep(self) -> Tensor | None:
        reads = next((call for call in self.chain() if call is not self and self._reads(call.states)), None)
        if reads is not None:
            return self._carried(reads.states_keep())
        own = None if self.has_two_sides else self._mask(_MASKS, _PADDINGS, dims=(2,))
        if own is not None and self._says_something(own):
            return own
        inherited = None if self.outer is None else self._carried(self.outer.keep_of_part(self))
        if inherited is not None or self.has_two_sides:
            return inherited
        if own is None and self.states is not None:
            own = self._by_ids("input_ids")
        is_made_inside = self.outer is not None and any("attention_mask" in c.arguments for c in self.outer.chain())
        return self._mask(_MASKS, (), dims=(3, 4)) if own is None and not is_made_inside else own

    def _says_something(self, own: Tensor) -> bool:
        """Return whether a mask speaks of tokens; numbers that are all zero may be added to scores and say nothing."""
        mask = next(v for n in (*_MASKS, *_PADDINGS) if isinstance(v := self.arguments.get(n), Tensor | Mapping))
        is_added = isinstance(mask, Tensor) and mask.is_floating_point() and self.outer is not None
        return not is_added or bool(own.any())

    def _reads(self, states: Tensor | None) -> bool:
        """Return whether the first tensor of this call is the encoder's states."""
        if states is None or not self.tensors:
            return False
        first = self.tensors[0]
        return first is states or (
            first.is_floating_point() and first.numel() == states.numel() and first.data_ptr() == states.data_ptr()
        )

    def _carried(self, keep: Tensor | None) -> Tensor | None:
        """Return a mask of the call around this one, for the tokens of this one; None if these are others."""
        if keep is None or not self.tensors or any(_fits(tensor, keep) for tensor in self.tensors):
            return keep
        flat = next((tensor for tensor in self.tensors if tensor.ndim == 2 and tensor.is_floating_point()), None)
        if flat is None or self.outer is None or bool(keep.all()):
            return None
        found = (padding.rows_among(flat, t, keep) for t in self.outer.tensors if t.is_floating_point())
        return next((keep_N for keep_N in found if keep_N is not None), None)

    def keep_of_part(self, part: "Call") -> Tensor | None:
        """Return which tokens are real of a call made inside this one."""
        if not self.has_two_sides:
            return self.keep()
        return self.decoder_keep() if part.states is not None or self.is_past_decoder else self.encoder_keep()

    def encoder_keep(self) -> Tensor | None:
        """Return which tokens of the encoder are real."""
        own = self._mask(_MASKS, (), dims=(2, 3, 4))
        if own is not None or self.outer is None:
            return own
        return self._carried(self.outer.encoder_keep() if self.outer.has_two_sides else self.outer.keep())

    def decoder_keep(self) -> Tensor | None:
        """Return which tokens of the decoder are real: by its mask, the last label that counts, or the last token."""
        own = self._mask(("decoder_attention_mask",), (), dims=(2, 3, 4))
        if own is not None:
            return own
        labels = self.arguments.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            return padding.up_to_last(labels != -100)
        if self.outer is not None and self.outer.has_two_sides:
            return self.outer.decoder_keep()
        if any(self.arguments.get(name) is not None for name in _TWO_SIDES):
            return self._by_ids("decoder_input_ids")
        return self.encoder_keep()  # the decoder then reads the encoder's tokens, shifted by one

    def states_keep(self) -> Tensor | None:
        """Return which of the encoder's states that this call got are real."""
        for call in self.chain():
            own = call._mask(_STATES_MASKS, _STATES_PADDINGS, dims=(2,))
            own = call.encoder_keep() if own is None and call.has_two_sides else own
            if own is not None and self.states is not None and padding.align(self.states, own) is not None:
                return own
        return self._mask(_STATES_MASKS, (), dims=(3, 4))

    def _mask(self, names: tuple[str, ...], inverted: tuple[str, ...], *, dims: tuple[int, ...]) -> Tensor | None:
        for name in (*names, *inverted):
            value = self.arguments.get(name)
            if isinstance(value, Mapping) or (isinstance(value, Tensor) and value.ndim in dims):
                keep = padding.kept_by(value, is_inverted=name in inverted)
                if keep is not None:
                    return keep.T if name in inverted and _is_time_first(self.module) else keep
        return None

    def _by_ids(self, name: str) -> Tensor | None:
        """Return every token up to the last that is no padding; the first one starts the decoder and always counts."""
        ids = self.arguments.get(name)
        pad = getattr(getattr(self.module, "config", None), "pad_token_id", None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not isinstance(pad, int):
            return None
        keep = padding.up_to_last(ids != pad)
        keep[:, :1] = True
        return keep


def _fits(tensor: Tensor, keep: Tensor) -> bool:
    """Return whether a tensor counts the tokens of a mask."""
    shape = padding.leading(tensor)
    if shape[: keep.ndim] == keep.shape or (keep.ndim == 2 and shape[:2] == (keep.shape[1], keep.shape[0])):
        return True
    return tensor.ndim > 1 and shape == (keep.numel(),)


def _is_time_first(module: nn.Module) -> bool:
    return any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in module.modules())


def _tensors(values: object) -> Iterator[Tensor]:
    """Yield the tensors among arguments, also those in lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class Calls:
    """The calls of a model's parts that are going on, followed until closed.

    Args:
        model: its root and every part that has parts of its own are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[RemovableHandle] = []
        self._stacks: dict[int | None, list[Call]] = {}
        self._current: int | None = None
        for module in model.modules():
            if module is model or next(module.children(), None) is not None:
                before, after = _Enter(self, module), _Leave(self, module)
                self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                self.handles.append(module.register_forward_hook(after, always_call=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Follow no more."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._stacks.clear()

    def switch(self, batch: object) -> None:
        """Go on with the calls of a batch, where several are on their way through the model by turns."""
        self._current = id(batch)

    @property
    def innermost(self) -> Call | None:
        """Return the call that everything now happens in."""
        stack = self._stacks.get(self._current)
        return stack[-1] if stack else None

    def enter(self, module: nn.Module, arguments: Mapping[str, object], tensors: tuple[Tensor, ...]) -> None:
        """Note that a call begins."""
        stack = self._stacks.setdefault(self._current, [])
        if stack and stack[0].module is module:
            stack.clear()  # left behind by an interrupted pass
        stack.append(Call(module, arguments, tensors, stack[-1] if stack else None))

    def leave(self, module: nn.Module) -> None:
        """Note that a call has ended."""
        stack = self._stacks.get(self._current, [])
        if not any(call.module is module for call in stack):
            return
        while (call := stack.pop()).module is not module:
            pass
        outer = call.outer
        if outer is not None and (call.is_past_decoder or (call.states is not None and outer.has_two_sides)):
            outer.is_past_decoder = True


class _Enter(Hook):
    """Begins a call."""

    def __init__(self, calls: Calls, module: nn.Module) -> None:
        self.calls, self.module = calls, module
        self.signature = inspect.signature(module.forward)
        self.own = _WANTED & self.signature.parameters.keys()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if module is self.module and not in_backward():
            self.calls.enter(module, self._arguments(args, kwargs), tuple(_tensors((args, kwargs))))

    def _arguments(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
        """Return what is of interest, by name: by keyword, by position, or in a batch that is one argument."""
        found: dict[str, object] = dict.fromkeys({*_TWO_SIDES, *_MASKS} & self.own)
        batches = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)]
        for batch in batches:
            found |= {name: batch[name] for name in _WANTED & batch.keys()}
        named = dict(zip(self.signature.parameters, args, strict=False)) if self.own else {}
        return found | {name: value for name, value in (named | kwargs).items() if name in _WANTED}


class _Leave(Hook):
    """Ends a call."""

    def __init__(self, calls: Calls, module: nn.Module) -> None:
        self.calls, self.module = calls, module

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if module is self.module and not in_backward():
            self.calls.leave(module)
