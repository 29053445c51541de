"""Run batches through a model block by block, so that every block sees what the pruned blocks before it give.

Each batch runs through the real forward of the model in a thread of its own, which stops at every block; nothing is
assumed about what lies between blocks, which arguments they take or whether they are an encoder's or a decoder's.
Only one thread runs at a time. A block is run twice on all batches: once to be observed, once pruned.

Source: the order is that of Wanda (arXiv 2306.11695; locuslab/wanda); the way to stop at blocks is ours.
Cost: two forward passes without the output head; holds the input of one block for all batches.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune.base import distributed

__all__ = ["evaluating", "forward_all", "to_device", "walk_blocks"]

Batch = Mapping[str, Tensor]
Visit = Callable[[nn.Module, Callable[[], None]], None]
Announce = Callable[[Mapping[str, object]], None]


class _Stop(BaseException):
    """Ends a batch's thread early; passes through `except Exception`."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without cache, and put every module's mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]  # one for each side of T5
    caches = [(config, config.use_cache) for config in configs if getattr(config, "use_cache", None)]
    model.eval()
    for config, _ in caches:
        config.use_cache = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for config, use_cache in caches:
            config.use_cache = use_cache


def to_device(batch: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Move the tensors of a batch."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def forward_all(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, *, progress: bool, title: str
) -> None:
    """Run all batches through the model without gradients."""
    with torch.no_grad():
        for batch in tqdm(batches, desc=title, disable=not (progress and distributed.is_first_rank())):
            model(**to_device(batch, device))


class _Lane(threading.Thread):
    """One batch on its way through the model."""

    def __init__(self, model: nn.Module, batch: Mapping[str, object], device: torch.device, announce: Announce) -> None:
        super().__init__(daemon=True)
        self.model, self.batch, self.announce = model, batch, announce
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.block: nn.Module | None = None
        self.arguments: tuple[tuple[object, ...], dict[str, object]] = ((), {})
        self.output: object = None
        self.error: BaseException | None = None
        self.is_aborted = False
        self.autocast = torch.autocast(  # on in one thread alone, so the lane takes it over
            device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        )

    def run(self) -> None:
        """Run the model's forward; called by `start`."""
        self.go.acquire()
        try:
            if not self.is_aborted:
                with torch.no_grad(), self.autocast:
                    self.model(**self.batch)
        except _Stop:
            pass
        except BaseException as error:  # noqa: BLE001 - handed over to the main thread, which raises it
            self.error = error
        self.block, self.arguments, self.output = None, ((), {}), None
        self.stopped.release()

    def stop_at(self, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Wait at a block, in this thread, until the main thread gives the block's output."""
        self.block, self.arguments = block, (args, kwargs)
        self.stopped.release()
        self.go.acquire()
        if self.is_aborted:
            raise _Stop
        output, self.output, self.arguments = self.output, None, ((), {})
        return output

    def compute(self, block: Callable[..., object]) -> object:
        """Run a block, from the main thread, on the inputs that wait at it."""
        self.announce(self.batch)
        args, kwargs = self.arguments
        return block(*args, **kwargs)

    def advance(self) -> None:
        """Run, from the main thread, until the next block or the end."""
        self.announce(self.batch)
        self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error


@contextmanager
def _stopping(blocks: Sequence[nn.Module], passed: set[int]) -> Iterator[dict[int, Callable[..., object]]]:
    """Make blocks hand their inputs to the main thread instead of computing, until they are in `passed`."""
    originals: dict[int, Callable[..., object]] = {id(block): block.forward for block in blocks}
    own = {id(block) for block in blocks if "forward" in vars(block)}

    def replacement(block: nn.Module) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            lane = threading.current_thread()
            if id(block) in passed or not isinstance(lane, _Lane):
                return originals[id(block)](*args, **kwargs)
            return lane.stop_at(block, args, kwargs)

        return forward

    for block in blocks:
        block.forward = replacement(block)
    try:
        yield originals
    finally:
        for block in blocks:
            if id(block) in own:
                block.forward = originals[id(block)]
            else:
                del block.forward


def walk_blocks(
    model: nn.Module,
    batches: Iterable[Batch],
    blocks: Sequence[nn.Module],
    visit: Visit,
    *,
    device: torch.device,
    stop_after_blocks: bool,
    progress: bool,
    announce: Announce = lambda batch: None,
) -> None:
    """Visit blocks in order; each sees the inputs that the blocks before it, as they are by then, produce.

    Args:
        model: called once per batch with its entries as keyword arguments, in evaluation mode.
        batches: all are started at once, so they are held in memory together with one block's inputs.
        blocks: in the order of the forward pass; a block that is called again after its visit just runs.
        visit: gets the block and a function that runs it on all batches that reach it; may change its weights.
        device: where the batches go.
        stop_after_blocks: whether what follows the last block need not run.
        progress: whether to show a bar.
        announce: told a batch before any part of the model runs on it.
    """
    passed: set[int] = set()
    lanes = [_Lane(model, to_device(batch, device), device, announce) for batch in batches]
    bar = tqdm(total=len(blocks), desc="pruning blocks", disable=not (progress and distributed.is_first_rank()))
    with _stopping(blocks, passed) as originals, torch.no_grad(), bar:
        for lane in lanes:
            lane.start()
        try:
            for block, here in _arrivals(lanes, blocks):
                visit(block, functools.partial(_compute_all, here, block))
                passed.add(id(block))
                bar.update()
                if stop_after_blocks and len(passed) == len(blocks):
                    break
                for lane in here:
                    lane.output = lane.compute(originals[id(block)])
                    lane.advance()
        finally:
            for lane in lanes:
                lane.is_aborted = True
                lane.go.release()
            for lane in lanes:
                lane.join()


def _arrivals(lanes: Sequence[_Lane], blocks: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, list[_Lane]]]:
    """Yield the earliest block that lanes wait at, and these lanes, until all lanes have ended."""
    order = {id(block): index for index, block in enumerate(blocks)}
    for lane in lanes:
        lane.advance()
    while waiting := [lane.block for lane in lanes if lane.block is not None]:
        first = min(waiting, key=lambda block: order[id(block)])
        yield first, [lane for lane in lanes if lane.block is first]


def _compute_all(lanes: Sequence[_Lane], block: nn.Module) -> None:
    """Run a block on all inputs that wait at it, called whole, so that hooks on the block itself observe."""
    for lane in lanes:
        lane.compute(block)
