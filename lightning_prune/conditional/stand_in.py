"""What is added to a block and runs in place of its forward.

It is a submodule of its block, so that its parameters and buffers are saved, moved, cast and sharded with it.
The block keeps its class; `forward` is set on the instance, and what the class computes, recomputation of activations
included, is called from there.

Shapes: B sequences, T tokens, D channels of the stream.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.calibration.calls import in_backward
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.discovery.stack import blocks_of
from lightning_prune.structured.structure import Stack

__all__ = ["StandIn", "forwards", "sole_blocks", "stream_width", "with_hidden"]


def sole_blocks(model: nn.Module, stack: Stack, what: str) -> list[nn.Module]:
    """Return the blocks of a stack, one module each.

    Args:
        model: the model.
        stack: its blocks.
        what: is to be inserted, for the message.

    Raises:
        ValueError: if the model has an encoder and a decoder, or a block is several modules or is used twice.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{what} needs a model of one stack of blocks, got {name}, which has an encoder and a decoder")
    found = [blocks_of(model, stack, layer) for layer in range(stack.num_layers)]
    if any(len(modules) != 1 for modules in found):
        raise ValueError(f"{what} needs blocks that are one module each; those of {name} lie in {stack.containers}")
    blocks = [modules[0] for modules in found]
    if len({id(block) for block in blocks}) < len(blocks):
        raise ValueError(f"{what} needs blocks of their own in every layer; {name} uses a block more than once")
    return blocks


@torch.no_grad()
def stream_width(model: nn.Module, blocks: Sequence[nn.Module], what: str) -> int:
    """Return how wide the stream is that every block takes and gives.

    Args:
        model: that is run on a few tokens.
        blocks: its blocks.
        what: is to be inserted, for the message.

    Raises:
        ValueError: if a block is not called once with a stream (B, T, D), or does not give one of that shape.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return int(model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
    seen: dict[int, list[object]] = {}

    def note(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        given = output[0] if isinstance(output, tuple) else output
        shapes = [value.shape if isinstance(value, Tensor) else None for value in (hidden, given)]
        seen.setdefault(id(block), []).append(shapes[0] if shapes[0] == shapes[1] else shapes)

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        outputs(model, probe_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    found = [seen.get(id(block), []) for block in blocks]
    first = found[0][0] if found[0] else None
    if not isinstance(first, torch.Size) or len(first) != 3 or any(calls != [first] for calls in found):
        raise ValueError(
            f"{what} needs blocks that each take and give one stream of the same shape (sequences, tokens, channels); "
            f"those of {type(model).__name__} do not"
        )
    return first[2]


def with_hidden(output: object, hidden_BTD: Tensor | None) -> Any:
    """Return what a block gives with another stream in it."""
    if isinstance(output, tuple):
        return (hidden_BTD, *output[1:])
    return hidden_BTD


@contextmanager
def forwards(changed: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let modules compute something else until the block ends; what stands on the instances is put back."""
    before = {module: vars(module).get("forward") for module in changed}
    try:
        for module, forward in changed.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


class StandIn(nn.Module, ABC):
    """Runs a block; inherit and give `run`.

    Args:
        block: of the model; its first argument is the stream (B, T, D), its output the stream or a tuple that starts
            with it.
    """

    block: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        vars(self)["block"] = block  # not a submodule: it is the other way round
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]
        self._before: Any = None
        self._name = ""

    @property
    def like(self) -> Tensor:
        """Return a parameter of the block, for the device and dtype of what is added."""
        return next(parameter for parameter in self.block.parameters() if parameter.is_floating_point())

    def install(self, name: str) -> None:
        """Add this to its block under a name and run it from now on."""
        self._name, self._before = name, vars(self.block).get("forward")
        self.block.add_module(name, self.train(self.block.training))
        vars(self.block)["forward"] = self.run

    def remove(self) -> None:
        """Give the block back."""
        if self._before is None:
            del vars(self.block)["forward"]
        else:
            vars(self.block)["forward"] = self._before
        delattr(self.block, self._name)

    def compute(self, *args: object, **kwargs: object) -> Any:
        """Return what the block itself computes."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        kind: Any = type(self.block)
        return kind.forward(self.block, *args, **kwargs)

    @abstractmethod
    def run(self, *args: object, **kwargs: object) -> Any:
        """Stand in for the block's forward."""

    def named(self, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, Any]:
        """Return all arguments by name, the stream first."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def is_recomputed(self) -> bool:
        """Return whether the block runs once more, for a backward pass.

        Raises:
            ValueError: if it runs for the first time in a re-entrant checkpoint, in which nothing has a gradient.
        """
        if torch.compiler.is_compiling():
            return False
        again = in_backward()
        function: Any = getattr(self.block, "_gradient_checkpointing_func", None)
        is_reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if (
            is_reentrant
            and not again
            and not torch.is_grad_enabled()
            and getattr(self.block, "gradient_checkpointing", False)
        ):
            raise ValueError(
                "re-entrant gradient checkpointing leaves no gradient for what decides per token; set "
                "gradient_checkpointing_kwargs to {'use_reentrant': False}"
            )
        return again
