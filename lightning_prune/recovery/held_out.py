"""Measure the loss of a model on held-out batches, in the middle of training and without a trace in it.

The mean is over tokens, not over batches: a short or heavily padded batch counts for the tokens it predicts. The loss
is the model's own, so that any head is measured by its own rule.

Cost: one forward pass per batch.
Limits: every process measures the batches it is given and reports no one else's; where the model is sharded, all of
    them call it with the same number of batches.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.calibration.loss_gradients import token_labels
from lightning_prune.calibration.walk import evaluating, to_device

__all__ = ["IGNORED", "measure_loss", "num_predicted"]

IGNORED = -100


def num_predicted(model: nn.Module, labels: Tensor) -> int:
    """Count the labels that a loss is computed for.

    A decoder predicts each token from those before it, so the first label of each sequence is never predicted; the
    labels of an encoder-decoder are all predicted. Labels of -100 are left out.
    """
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    counted = labels if is_encoder_decoder else labels[..., 1:]
    return int((counted != IGNORED).sum())


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    state = random.getstate()  # of collators that mask or shuffle words
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)


def measure_loss(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, max_batches: int | None = None
) -> tuple[float, int]:
    """Return the mean loss in nats per predicted token, and the number of these tokens.

    Args:
        model: called with the entries of a batch; its modes and the random states are afterwards as they were.
        batches: model inputs; where `labels` are missing, the tokens themselves are the labels, padding left out.
        max_batches: how many are read at most; all when None.

    Raises:
        ValueError: if there is nothing to predict, or the model returns no loss.
    """
    device = distributed.local(next(model.parameters()).detach()).device
    total, num_tokens = 0.0, 0
    with _random_state_kept(device), evaluating(model), torch.no_grad():
        for batch in itertools.islice(batches, max_batches):
            inputs = to_device(batch, device)
            inputs = inputs if "labels" in inputs else {**inputs, **token_labels(inputs)}
            labels = inputs.get("labels")
            loss = getattr(model(**inputs), "loss", None)
            if not isinstance(labels, Tensor) or not isinstance(loss, Tensor):
                raise ValueError(
                    "the held-out loss needs a model that returns a loss and batches with labels or input_ids, got "
                    f"{type(model).__name__} and a batch of {', '.join(sorted(batch))}"
                )
            predicted = num_predicted(model, labels)
            if predicted:  # the mean over no token is not a number
                total += float(loss) * predicted
                num_tokens += predicted
    if not num_tokens:
        raise ValueError("the held-out batches predict no token: there are none, or all labels are -100")
    return total / num_tokens, num_tokens
