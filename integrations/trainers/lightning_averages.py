"""Averages of weights that Lightning callbacks keep beside the model, and copy into it when training ends."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.integrations.trainers.lightning_package import loaded_classes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["averages"]


def averages(trainer: "Trainer") -> Iterator[nn.Module]:
    """Yield the averages of the weights: torch's `AveragedModel` in any callback, and what Lightning's SWA keeps.

    Any other module in a callback, such as a teacher, is not one.
    """
    swa = loaded_classes("StochasticWeightAveraging")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for held in vars(callback).values():
            is_swa = isinstance(callback, swa) and isinstance(held, nn.Module) and held is not trainer.lightning_module
            if is_swa or isinstance(held, AveragedModel):
                yield held
