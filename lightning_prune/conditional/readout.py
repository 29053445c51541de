"""How a language model turns the stream behind its last block into logits, to read other streams the same way.

Followed through one run: the modules that one after another take what the last block gave, up to the output
embeddings, and what the class does to their result (a factor, or a soft cap that the configuration names).

Shapes: ... any batch, D channels of the stream, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.depth.bypass import first_tensor
from lightning_prune.structured.discovery.probe import difference, tolerance
from lightning_prune.structured.discovery.probe_inputs import probe_inputs

__all__ = ["Readout", "find_readout"]


@dataclass(frozen=True)
class Readout:
    """Reads a stream as the model reads its last one.

    Args:
        model: by whose names the modules are found, whatever has been wrapped around them since.
        names: of the modules, the output embeddings last.
        after: what is done to their result: times a number, or a soft cap at it.
        number: the factor or the cap.
    """

    model: nn.Module
    names: tuple[str, ...]
    after: Literal["times", "cap"] = "times"
    number: float = 1.0

    def __call__(self, stream: Tensor) -> Tensor:
        """Return logits (..., V), float32, of a stream (..., D)."""
        for name in self.names:
            stream = self.model.get_submodule(name)(stream)
        logits = stream.float()
        if self.after == "cap":
            return self.number * torch.tanh(logits / self.number)
        return logits if self.number == 1.0 else logits * self.number


@torch.no_grad()
def find_readout(model: nn.Module, last_block: nn.Module, what: str) -> Readout:
    """Follow how a model reads the stream behind its last block.

    Args:
        model: a language model.
        last_block: of it.
        what: is to be inserted, for the message.

    Raises:
        ValueError: if it has no output embeddings, or its logits are not made from the stream by modules one after
            another.
    """
    kind = type(model).__name__
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None:
        raise ValueError(f"{what} needs a language model with output embeddings, and {kind} has none")
    calls: list[tuple[str, Tensor, Tensor]] = []
    streams: list[Tensor] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if streams and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((name, args[0], output))

        return hook

    holders = {id(module) for module in model.modules() if any(part is last_block for part in module.modules())}
    own = {id(module) for module in last_block.modules()}
    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if id(module) not in holders | own
    ]
    handles.append(last_block.register_forward_hook(lambda _, __, output: streams.append(first_tensor(output))))
    try:
        with evaluating(model), torch.autocast(next(model.parameters()).device.type, enabled=False):
            output: Any = model(**probe_inputs(model))
            logits = output.logits
    finally:
        for handle in handles:
            handle.remove()
    names, stream = _chain(calls, streams[-1])
    if not names or model.get_submodule(names[-1]) is not head:
        raise ValueError(
            f"{what} reads the stream between blocks as the model reads the last one, and in {kind} that is not one "
            "module after another up to the output embeddings"
        )
    return _finished(Readout(model, names), stream.float(), logits.float(), what)


def _chain(calls: list[tuple[str, Tensor, Tensor]], stream: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """Return the modules through which a stream goes, one after another, and what comes out."""
    names = []
    for name, read, gave in calls:
        if read.shape == stream.shape and torch.equal(read, stream):
            names.append(name)
            stream = gave
    return tuple(names), stream


def _finished(plain: Readout, found: Tensor, logits: Tensor, what: str) -> Readout:
    """Return the readout with what the class does to the result of the last module."""
    cap = getattr(plain.model.config, "final_logit_softcapping", None)
    factor = float((logits.double() * found).sum() / found.double().square().sum())
    tries = [plain, Readout(plain.model, plain.names, "times", factor)]
    if isinstance(cap, float | int):
        tries.append(Readout(plain.model, plain.names, "cap", float(cap)))
    for readout in tries:
        got = (
            found * readout.number if readout.after == "times" else readout.number * torch.tanh(found / readout.number)
        )
        if difference(got, logits) <= tolerance(logits):
            return readout
    raise ValueError(
        f"{what} reads the stream between blocks as the model reads the last one, and the logits of "
        f"{type(plain.model).__name__} are not a multiple of what its output embeddings give"
    )
