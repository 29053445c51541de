"""Run a few neighbouring blocks on their own, on the hidden states that the model gave them.

What a block was called with (masks, rotary tables, positions) is recorded during a forward pass of the whole model and
used again; only the hidden state is handed from block to block. So blocks can be trained, or left out, without
computing the rest of the model.

Cost: per batch, on the CPU, the hidden state that enters the blocks and the one that leaves them, and the other
    arguments once.
Limits: the hidden state that enters a block must be what the block before it gave; `check_replay` finds out.

Shapes: B sequences, T positions, D width of the residual stream.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.structured.depth.bypass import block_input, bypassed, first_tensor
from lightning_prune.structured.depth.criteria import model_logits

__all__ = ["Recording", "check_replay", "record", "replay"]

Batch = Mapping[str, Tensor]
Run = Callable[..., object]
TOLERANCE = 1e-3  # of the largest entry; a block that reads something else is wrong by far more


@dataclass(frozen=True)
class _Stream:
    """Stands for the hidden state among the arguments of a block."""


@dataclass(frozen=True)
class Recording:
    """What some blocks were called with on one batch, and what the last of them gave; tensors lie on the CPU.

    Args:
        calls: per block, positional and keyword arguments, where `_Stream` stands for the hidden state.
        input_BTD: what the first block read.
        output_BTD: what the last block gave.
        mask_BT: which tokens are not padding.
    """

    calls: tuple[tuple[tuple[object, ...], dict[str, object]], ...]
    input_BTD: Tensor
    output_BTD: Tensor
    mask_BT: Tensor


def _mapped(value: object, change: Callable[[object], object]) -> object:
    """Change the leaves of nested tuples, lists and dictionaries."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_mapped(item, change) for item in value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)


def record(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> Recording:
    """Run a batch through a model and record these blocks.

    Args:
        model: in evaluation mode, without cache; blocks may be bypassed.
        blocks: in the order of the forward pass, each called once.
        batch: `attention_mask` leaves out padding.

    Raises:
        ValueError: if a block is not called.
    """
    calls: dict[int, tuple[object, object]] = {}
    streams: dict[int, tuple[Tensor, Tensor]] = {}
    copies: dict[int, Tensor] = {}  # blocks share masks and tables: one copy of each
    held: list[Tensor] = []  # so that no id is used twice

    def on_cpu(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        held.append(value)
        return copies.setdefault(id(value), value.detach().cpu())

    def hook(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        after = first_tensor(output)
        before = block_input(args, kwargs, after)

        def leaf(value: object) -> object:
            return _Stream() if value is before else on_cpu(value)

        calls[id(block)] = (_mapped(args, leaf), _mapped(kwargs, leaf))
        keep_first, keep_last = block is blocks[0], block is blocks[-1]
        streams[id(block)] = (
            before.detach().cpu().clone() if keep_first else before.new_empty(0),
            after.detach().cpu().clone() if keep_last else after.new_empty(0),
        )

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        _, moved = model_logits(model, batch)
    if len(calls) < len(blocks):
        raise ValueError(f"the forward pass calls {len(calls)} of {len(blocks)} blocks; they cannot be run alone")
    mask_BT = moved.get("attention_mask", torch.ones_like(moved["input_ids"])).bool().cpu()
    ordered = tuple(calls[id(block)] for block in blocks)
    return Recording(ordered, streams[id(blocks[0])][0], streams[id(blocks[-1])][1], mask_BT)  # type: ignore[arg-type]


def replay(recording: Recording, runs: Mapping[int, Run], device: torch.device) -> Tensor:
    """Hand the recorded hidden state through blocks.

    Args:
        recording: of the blocks.
        runs: position in the recording -> what is called in place of the block; those without one are left out.
        device: of the blocks.

    Returns:
        the hidden state after the last of them, (B, T, D).
    """
    stream_BTD = recording.input_BTD.to(device)
    for position, (args, kwargs) in enumerate(recording.calls):
        if position not in runs:
            continue
        current = stream_BTD

        def leaf(value: object, current: Tensor = current) -> object:
            if isinstance(value, _Stream):
                return current
            return value.to(device) if isinstance(value, Tensor) else value

        new_args, new_kwargs = _mapped(args, leaf), _mapped(kwargs, leaf)
        assert isinstance(new_args, tuple)
        assert isinstance(new_kwargs, dict)
        stream_BTD = first_tensor(runs[position](*new_args, **new_kwargs))
    return stream_BTD


@torch.no_grad()
def check_replay(model: nn.Module, blocks: Sequence[nn.Module], removed: tuple[int, int], batch: Batch) -> None:
    """Check that blocks that are run alone give what they give in the model, whole and with one of them bypassed.

    Args:
        model: in evaluation mode, without cache.
        blocks: in the order of the forward pass.
        removed: position among `blocks`, and index in the model, of the one that is left out.
        batch: a batch.

    Raises:
        ValueError: if they give something else.
    """
    position, index = removed
    device = next(model.parameters()).device
    recording = record(model, blocks, batch)
    with bypassed(model, (), layers=[index]):
        without_BTD = record(model, blocks, batch).output_BTD
    runs: dict[int, Run] = dict(enumerate(blocks))
    pairs = [(replay(recording, runs, device).cpu(), recording.output_BTD)]
    pairs.append((replay(recording, {k: run for k, run in runs.items() if k != position}, device).cpu(), without_BTD))
    for alone_BTD, inside_BTD in pairs:
        gap = (alone_BTD.double() - inside_BTD.double()).abs().max() / inside_BTD.double().abs().max()
        if not gap <= TOLERANCE:
            raise ValueError(
                f"the blocks around block {index} give something else alone than in the model (off by {gap:.2g} of the "
                "largest entry): they read more than the hidden state of the block before; use a method that trains "
                "nothing, such as ReplaceMe"
            )
