"""Run every batch a second time, with dense weights, in step with the run through the pruned model.

A twin of every batch goes through the same blocks just before the batch itself; whenever a twin runs, the block at hand
holds its dense weights. So inputs of one layer in both models are at hand together, and only one
block's dense weights have to be on the device.

Source: our own.
Cost: the memory of one block's inputs and the time of the blocks, twice; `PairedGram`: three matrices of J x J.
Limits: a block that is called again after its visit runs with its pruned weights in both.

Shapes: T tokens, I input features, J = I + 1 with a constant 1 appended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.base.statistic import Statistic
from lightning_prune.calibration.walk import Batch, to_device

__all__ = ["PairedGram", "Readings", "Twins"]


class Twins:
    """The batches with their twins, and which weights are in force.

    Args:
        batches: as the model takes them.
        device: where the model is.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        self.batches: list[Batch] = []
        self._ids: set[int] = set()
        for batch in batches:
            own = {key: value for key, value in to_device(batch, device).items() if isinstance(value, Tensor)}
            twin = {key: value.view_as(value) for key, value in own.items()}  # the same values in tensors of their own
            self._ids |= {id(value) for value in twin.values()}
            self.batches += [twin, own]
        self.is_dense = False
        self.turn = 0
        self._other: list[tuple[Tensor, Tensor]] = []

    def hold(self, dense: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the dense values of the parameters that change places from now on, on the parameters' device."""
        self.use_dense(False)
        self._other = list(dense)

    def announce(self, batch: Mapping[str, object]) -> None:
        """Put the weights in force that a batch, or a twin, runs with."""
        is_twin = any(id(value) in self._ids for value in batch.values())
        self.turn += is_twin
        self.use_dense(is_twin)

    def use_dense(self, wanted: bool) -> None:
        """Put dense or pruned weights in force."""
        if wanted == self.is_dense:
            return
        swapped = []
        for parameter, other in self._other:
            swapped.append((parameter, parameter.data))
            parameter.data = other
        self._other, self.is_dense = swapped, wanted


@dataclass(frozen=True)
class Readings:
    """Mean products of a layer's inputs with a constant 1 appended, and over how many tokens.

    `own_JJ` of the pruned model's with themselves, `dense_JJ` of the dense model's with themselves, and `cross_JJ` of
    the dense model's (rows) with the pruned model's. Where the two were not observed together, all three are the first.
    """

    own_JJ: Tensor
    cross_JJ: Tensor
    dense_JJ: Tensor
    num_tokens: int
    is_paired: bool


class PairedGram(Statistic):
    """Sum the outer products of the inputs of both models; ranks are merged by adding.

    Inputs whose number differs between the two, as an expert's may, cannot be paired; then `is_paired` is false and
    only the pruned model's count.
    """

    source = "input"
    own_JJ: Tensor
    cross_JJ: Tensor
    dense_JJ: Tensor
    num_unpaired: Tensor

    def __init__(self, weight: Tensor, num_inputs: int, twins: Twins | None) -> None:
        super().__init__()
        self.twins = twins
        self._waiting: list[tuple[int, Tensor]] = []
        for name in ("own_JJ", "cross_JJ", "dense_JJ") if twins is not None else ("own_JJ",):
            zeros = torch.zeros(num_inputs + 1, num_inputs + 1, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.add_state("num_unpaired", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.to(weight.device)

    def update(self, input_TI: Tensor) -> None:
        """Add the tokens of one forward pass of the pruned model, or remember those of the dense one until then."""
        if self.twins is not None and self.twins.is_dense:
            self._drop_leftovers(self.twins.turn)
            self._waiting.append((self.twins.turn, input_TI))
            return
        own_TJ = _with_ones(input_TI)
        self.own_JJ.addmm_(own_TJ.T, own_TJ)
        if self.twins is None:
            return
        other_TI = self._waiting.pop(0)[1] if self._waiting else None
        if other_TI is None or other_TI.shape != input_TI.shape:
            self.num_unpaired += 1
            return
        dense_TJ = _with_ones(other_TI)
        self.cross_JJ.addmm_(dense_TJ.T, own_TJ)
        self.dense_JJ.addmm_(dense_TJ.T, dense_TJ)

    def compute(self) -> Tensor:
        """Return own_JJ, a sum."""
        return self.own_JJ

    def readings(self) -> Readings:
        """Return the means over the tokens, merged over the ranks; every rank must call it."""
        self._drop_leftovers(-1)
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            num_tokens = int(self.own_JJ[-1, -1])
            is_paired = self.twins is not None and not int(self.num_unpaired)
            names = ("own_JJ", "cross_JJ", "dense_JJ") if is_paired else ("own_JJ",) * 3
            own_JJ, cross_JJ, dense_JJ = (getattr(self, name) / max(1, num_tokens) for name in names)
        return Readings(own_JJ, cross_JJ, dense_JJ, num_tokens, is_paired)

    def _drop_leftovers(self, turn: int) -> None:
        """Forget inputs of an earlier twin that the pruned model had no counterpart for."""
        if self._waiting and self._waiting[0][0] != turn:
            self.num_unpaired += 1
            self._waiting.clear()


def _with_ones(input_TI: Tensor) -> Tensor:
    return torch.nn.functional.pad(input_TI.double(), (0, 1), value=1.0)
