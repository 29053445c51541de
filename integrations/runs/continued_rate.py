"""Put one continued learning-rate schedule in the place of a trainer's own, before the trainer restores a checkpoint.

    on_init_end    of a Transformers callback: `take_over_transformers(trainer, options)`
    on_fit_start   of a Lightning callback: `take_over_lightning(trainer, options, total_steps=...)`
    on train start of both: `check_place(schedule, global_step)`

Both trainers then save and load the schedule with their checkpoints as they do their own.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_prune.base import distributed
from lightning_prune.conductor.saved_state import load_file
from lightning_prune.recovery.learning_rate import ContinuedSchedule, LearningRate

if TYPE_CHECKING:
    from lightning.pytorch import Trainer as LightningTrainer
    from transformers import Trainer

__all__ = ["check_place", "read_schedule", "take_over_lightning", "take_over_transformers"]

logger = logging.getLogger(__name__)


def take_over_transformers(trainer: "Trainer", options: LearningRate) -> None:
    """Let a Trainer make a `ContinuedSchedule` where it would make its own; call it before `train`.

    `lr_scheduler_type`, `warmup_steps` and the like of the TrainingArguments have no effect then.

    Raises:
        ValueError: if the Trainer was given a schedule, or the training before cannot be read.
    """
    if trainer.lr_scheduler is not None and not trainer._created_lr_scheduler:
        raise ValueError(
            f"the Trainer was given a {type(trainer.lr_scheduler).__name__} and the recipe has a learning_rate; keep "
            "one of them: pass optimizers=(optimizer, None), or leave learning_rate out"
        )
    state = None if options.continues is None else read_schedule(options.continues)

    own: Any = trainer  # annotated for the schedules that it makes itself

    def create_scheduler(num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        if own.lr_scheduler is None:
            stepped = own.optimizer if optimizer is None else optimizer
            own.lr_scheduler = ContinuedSchedule(stepped, options, total_steps=num_training_steps, state=state)
            own._created_lr_scheduler = True
        return own.lr_scheduler

    own.create_scheduler = create_scheduler
    _announce(options)


def take_over_lightning(trainer: "LightningTrainer", options: LearningRate, *, total_steps: int) -> ContinuedSchedule:
    """Replace the schedules of a module by a `ContinuedSchedule`; call it in `on_fit_start`.

    Args:
        trainer: set up, with one optimizer.
        options: of the schedule.
        total_steps: optimizer steps of the whole training.

    Raises:
        ValueError: if the module steps by itself or has not one optimizer, or the training before cannot be read.
    """
    module, optimizers = trainer.lightning_module, trainer.optimizers
    if not module.automatic_optimization:
        raise ValueError(
            "learning_rate needs automatic optimization, because with manual optimization the module steps its "
            "schedule itself; leave learning_rate out and use ContinuedSchedule in configure_optimizers"
        )
    if len(optimizers) != 1:
        raise ValueError(f"learning_rate schedules one optimizer, the module has {len(optimizers)}; return one")
    if any("max_lr" in group for group in optimizers[0].param_groups):
        raise ValueError(
            "the module's own schedule (OneCycleLR or CyclicLR) has changed the base rates; return the optimizer alone "
            "from configure_optimizers, or leave learning_rate out"
        )
    from lightning.pytorch.utilities.types import LRSchedulerConfig

    state = None if options.continues is None else read_schedule(options.continues)
    schedule = ContinuedSchedule(optimizers[0], options, total_steps=total_steps, state=state)
    trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(schedule, interval="step")]
    _announce(options)
    return schedule


def check_place(schedule: object, global_step: int) -> None:
    """Check that the schedule stands where a resumed training stands; call it when training starts.

    Raises:
        ValueError: if the checkpoint held no schedule, so that it would start again.
    """
    if isinstance(schedule, ContinuedSchedule) and global_step > 0 and schedule.last_epoch == 0:
        raise ValueError(
            f"training resumes at step {global_step} from a checkpoint without a learning-rate schedule, so the rate "
            "would start again; leave learning_rate out, or start a new training from the weights"
        )


def read_schedule(path: str) -> dict[str, Any]:
    """Return the state of the schedule in a checkpoint: a folder of Transformers, or a file of Lightning.

    Raises:
        ValueError: if there is none.
    """
    found = Path(path).expanduser()
    file = found / "scheduler.pt" if found.is_dir() else found
    if not file.is_file():
        raise ValueError(
            f"learning_rate.continues names {path}, which holds no {file.name}; name a checkpoint folder of "
            "Transformers or a checkpoint file of Lightning, saved with learning_rate"
        )
    state = load_file(str(file))
    schedules: list[dict[str, Any]] = state.get("lr_schedulers", [state])
    if len(schedules) != 1 or "curve" not in schedules[0]:
        raise ValueError(
            f"{file} was saved without the learning_rate section, so there is no schedule to continue; leave "
            "learning_rate.continues out"
        )
    return schedules[0]


def _announce(options: LearningRate) -> None:
    distributed.log(logger, logging.INFO, "the learning rate follows the recipe: %s", options)
