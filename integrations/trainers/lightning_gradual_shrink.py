"""Shrink a model while a Lightning `Trainer` trains it: `Trainer(callbacks=[ShrinkingCallback(GradualShrink(...))])`.

A resume starts from the full-size module as always; it is cut to the shapes of the checkpoint before weights load.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_prune.integrations.models.language_model import language_model
from lightning_prune.integrations.trainers.lightning_trainer import total_steps
from lightning_prune.structured.gradual import GradualShrink, fit_to_shapes

try:
    from lightning_prune.integrations.trainers.lightning_package import base_class
except ImportError as error:
    raise ImportError('ShrinkingCallback needs lightning: pip install "lightning_prune[lightning]"') from error

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback, LightningModule, Trainer = base_class("Callback"), Any, Any

__all__ = ["ShrinkingCallback"]


class ShrinkingCallback(Callback):
    """Cuts the Hugging Face model inside a LightningModule at the milestones of a schedule.

    Args:
        shrink: which units go, and when.
    """

    def __init__(self, shrink: GradualShrink) -> None:
        self.shrink = shrink
        self._last_step = -1
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let a checkpoint of a smaller model be loaded.

        Raises:
            ValueError: if the module holds no Hugging Face model.
        """
        model = language_model(pl_module)
        if model is None:
            raise ValueError("ShrinkingCallback cuts Hugging Face models, and the LightningModule holds none")
        prefix = next(name for name, module in pl_module.named_modules() if module is model)
        self._let_go()
        hook = _FitToCheckpoint(model, f"{prefix}." if prefix else "", self.shrink.kind)
        self._handle = pl_module.register_load_state_dict_pre_hook(hook)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module; teardown is not called after an exception."""
        self._let_go()

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: if the model cannot be cut so.
        """
        self._last_step = trainer.global_step
        self.shrink.check(_model(pl_module), total_steps=total_steps(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cut if a milestone was reached by an optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        wrapped = trainer.strategy.model
        self.shrink.after_step(
            _model(pl_module),
            trainer.optimizers,
            step=trainer.global_step,
            total_steps=total_steps(trainer),
            wrapper=wrapped if isinstance(wrapped, DistributedDataParallel) else None,
        )


@dataclass(frozen=True)
class _FitToCheckpoint:
    """Cuts a model to the shapes of the weights that are about to be loaded into the module that holds it."""

    model: nn.Module
    prefix: str
    kind: Any

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], *args: Any) -> None:
        """Cut; called by torch before it loads."""
        start = self.prefix
        shapes = {
            name[len(start) :]: tuple(tensor.shape) for name, tensor in state_dict.items() if name.startswith(start)
        }
        fit_to_shapes(self.model, shapes, self.kind)


def _model(module: LightningModule) -> nn.Module:
    model = language_model(module)
    assert model is not None  # checked in setup
    return model
