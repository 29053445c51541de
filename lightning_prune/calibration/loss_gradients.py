"""Gradients of the loss over calibration batches, sequence by sequence, so that batch sizes do not matter.

The mean of |weight * gradient| over batches depends on how many sequences a batch holds, because gradients of sequences
cancel inside a batch. Here every sequence has a backward pass of its own, weighted by the number of its labels that
count. Batches whose entries have different numbers of rows (images beside tokens), and losses that are no mean over
sequences (contrastive ones), are taken whole.

Cost: one forward and backward pass per sequence, and one forward pass of every batch to check. Where the check fails,
what was done by then is done again with whole batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune.base import distributed
from lightning_prune.base.types import Scorer
from lightning_prune.calibration.observation import Observation
from lightning_prune.calibration.walk import Batch, evaluating, to_device
from lightning_prune.targets.targets import Binding

__all__ = ["gradients", "observe_gradients", "token_labels"]

_TAKEN_WHOLE = "batches with entries of different numbers of rows were taken whole: their size matters to the scores"
_NO_MEAN = "the loss is no mean over sequences, so batches were taken whole: their size matters to the scores"
_Inputs = Mapping[str, object]
_TOLERANCE = 0.1  # relative difference of a batch's loss from the mean over its sequences: a router's loss is in both


def token_labels(inputs: _Inputs) -> dict[str, Tensor]:
    """Return the input tokens as labels, padding left out; nothing if the model does not read tokens."""
    ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        return {}
    if isinstance(attention_mask, Tensor) and attention_mask.shape == ids.shape:
        return {"labels": ids.masked_fill(attention_mask == 0, -100)}
    return {"labels": ids}


@contextmanager
def gradients(model: nn.Module, bindings: Sequence[Binding]) -> Iterator[None]:
    """Collect gradients of the targets alone; modes, gradients and flags are put back afterwards."""
    targets = {id(parameter) for binding in bindings for parameter in (binding.parameter, *binding.copies)}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with evaluating(model), torch.enable_grad():
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in targets)
            yield
        finally:
            for parameter, requires_grad, grad in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def observe_gradients(
    model: nn.Module, scorer: Scorer, bindings: Sequence[Binding], batches: Sequence[Batch], *, progress: bool
) -> tuple[Observation, list[str]]:
    """Return what a scorer needs of the gradients of the loss, and sentences on what one should know of it.

    Args:
        model: called with the entries of a batch as keyword arguments; modes, gradients and flags are put back.
        scorer: one that needs gradients.
        bindings: the targets.
        batches: with `labels`; input tokens are used if there are none.
        progress: whether to show a bar.

    Raises:
        ValueError: if the model returns no loss.
    """
    device = distributed.local(bindings[0].parameter.detach()).device
    whole = [_labelled(batch) for batch in batches]
    split = [_rows(batch) for batch in whole]
    notes = (
        [_TAKEN_WHOLE] if any(len(rows) < _num_rows(batch) for rows, batch in zip(split, whole, strict=True)) else []
    )
    passes = _Passes(model, scorer, bindings, device, progress)
    with gradients(model, bindings):
        observation, is_mean = passes.observe(whole, split)
        if not distributed.agree(is_mean, device):
            observation, _ = passes.observe(whole, [[batch] for batch in whole])
            notes = [_NO_MEAN]
    return observation, notes


@dataclass(frozen=True)
class _Passes:
    """Forward and backward passes for a scorer."""

    model: nn.Module
    scorer: Scorer
    bindings: Sequence[Binding]
    device: torch.device
    progress: bool

    def observe(self, whole: Sequence[_Inputs], split: Sequence[Sequence[_Inputs]]) -> tuple[Observation, bool]:
        """Return what the gradients of the parts of all batches show, and whether each batch's loss is their mean.

        The first batch whose loss is not ends it, unless other processes wait for this one.
        """
        observation = Observation(self.scorer, self.bindings, weigh_alike=True)
        counts = [_num_counted(part) for parts in split for part in parts]
        mean = sum(counts) / max(1, sum(count > 0 for count in counts))
        is_mean = True
        with tqdm(desc="calibrating", disable=not self.progress, total=len(counts)) as bar:
            for batch, parts in zip(whole, split, strict=True):
                counted = [(part, count) for part in parts if (count := _num_counted(part))]
                with torch.no_grad():
                    total = self.loss(batch) if len(counted) > 1 else None
                losses = []
                for part, count in counted:
                    loss = self.loss(part)
                    (loss * (count / mean)).backward()
                    for binding in self.bindings:
                        _gather(binding)
                    observation.feed_step(self.bindings)
                    for binding in self.bindings:
                        binding.parameter.grad = None
                    losses.append(loss.detach())
                bar.update(len(parts))
                is_mean = is_mean and (total is None or _is_mean(total, losses, [part for part, _ in counted]))
                if not is_mean and not distributed.is_active():
                    break
        return observation, is_mean

    def loss(self, inputs: _Inputs) -> Tensor:
        """Return the loss of the model on a batch."""
        loss = getattr(self.model(**to_device(inputs, self.device)), "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(self.scorer).__name__} needs a loss, but the model returns none; add labels to the batches"
            )
        return loss.mean()


def _gather(binding: Binding) -> None:
    """Add to a target's gradient those of further parameters over the same memory."""
    for copy in binding.copies:
        if copy.grad is not None:
            own = binding.parameter.grad
            binding.parameter.grad = copy.grad if own is None else own + copy.grad
            copy.grad = None


def _labelled(batch: Batch) -> dict[str, object]:
    inputs: dict[str, object] = dict(batch)
    return inputs if "labels" in inputs else inputs | token_labels(inputs)


def _num_rows(inputs: _Inputs) -> int:
    tensors = (value for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    first = next((value for name in ("labels", "input_ids") if isinstance(value := inputs.get(name), Tensor)), None)
    leading = next(tensors, None) if first is None or not first.ndim else first
    return 1 if leading is None else len(leading)


def _rows(inputs: _Inputs) -> list[dict[str, object]]:
    """Return a batch as batches of one row each, or whole if its entries do not all have one row per sequence."""
    number, ids = _num_rows(inputs), inputs.get("input_ids")
    for value in inputs.values():
        if isinstance(value, list | tuple) and len(value) == number:
            return [dict(inputs)]
        if not isinstance(value, Tensor) or not value.ndim:
            continue
        has_rows_later = isinstance(ids, Tensor) and value.ndim == 3 and value.shape[1:] == ids.shape  # 3D positions
        if len(value) != number or has_rows_later:
            return [dict(inputs)]
    return [
        {
            name: value[row : row + 1] if isinstance(value, Tensor) and value.ndim else value
            for name, value in inputs.items()
        }
        for row in range(number)
    ]


def _num_counted(inputs: _Inputs, num_left_out: int = 0) -> int:
    """Count the labels that count, the first few of each sequence left out; 1 where labels are no indices."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return 1
    return int(((labels[..., num_left_out:] if labels.ndim > 1 else labels) != -100).sum())


def _is_mean(total: Tensor, losses: Sequence[Tensor], parts: Sequence[_Inputs]) -> bool:
    """Return whether the loss of a batch is the mean of those of its parts, weighted by the labels that count.

    Where the next token is predicted, the first label of a sequence does not count, whatever it is.
    """
    losses_P = torch.stack(list(losses)).double().cpu()
    for num_left_out in (0, 1):
        counts_P = torch.tensor([_num_counted(part, num_left_out) for part in parts], dtype=torch.float64)
        mean = float((losses_P * counts_P).sum() / counts_P.sum().clamp_min(1))
        if not abs(float(total) - mean) > _TOLERANCE * abs(float(total)):  # what is no number is found when scored
            return True
    return False
