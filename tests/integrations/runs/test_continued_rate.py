"""One schedule in real trainings of both trainers: resumed under another length, in a second training, taken over."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import TrainerCallback

from lightning_prune.integrations.runs.continued_rate import (
    check_place,
    read_schedule,
    take_over_lightning,
    take_over_transformers,
)
from lightning_prune.integrations.trainers.hf_trainer import calling_trainer
from lightning_prune.integrations.trainers.lightning_trainer import total_steps
from lightning_prune.recovery.learning_rate import ContinuedSchedule, LearningRate, planned
from tests.integrations.trainings import TinyModule, hf_trainer, lightning_trainer, loader
from tests.tiny_models import tiny_llama

BASE = 1e-2
OPTIONS = LearningRate(warmup=2, decay="linear", final=0.0)
# 2 steps of warm-up and 8 of decay; after 6 steps half of the decay is left, over 4 steps or, to step 18, over 12
FIRST = [BASE / 3, BASE * 2 / 3, BASE, BASE * 7 / 8, BASE * 6 / 8, BASE * 5 / 8]
REST_OF_10 = [BASE * left / 8 for left in (4, 3, 2, 1)]
REST_OF_18 = [BASE * 0.5 * (1 - step / 12) for step in range(12)]


class Recorder(TrainerCallback):
    """Notes the rate of every step; takes the schedule over where options are given."""

    def __init__(self, options: LearningRate | None = None) -> None:
        self.options, self.rates = options, list[float]()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.options is not None:
            take_over_transformers(calling_trainer()[0], self.options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_place(calling_trainer()[0].lr_scheduler, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append(float(kwargs.get("opt", optimizer).param_groups[0]["lr"]))


def hf_rates(
    folder: Path, max_steps: int, *, resume: int | None = None, own: bool = False, **given: Any
) -> list[float]:
    """Train a tiny model, saving at step 6; return the rates."""
    model, recorder = tiny_llama(), Recorder(None if own else given.pop("options", OPTIONS))
    trainer = hf_trainer(model, folder, [recorder], max_steps=max_steps, save_strategy="steps", save_steps=6, **given)
    if own:
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE)
        schedule = ContinuedSchedule(optimizer, OPTIONS, total_steps=max_steps)
        trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    assert isinstance(trainer.lr_scheduler, ContinuedSchedule)
    return recorder.rates


@pytest.mark.parametrize("own", [True, False], ids=["given to the Trainer", "taken over"])
def test_transformers_goes_on_after_a_resume(tmp_path: Path, own: bool) -> None:
    assert hf_rates(tmp_path, 10, own=own) == pytest.approx(FIRST + REST_OF_10)
    assert hf_rates(tmp_path, 10, own=own, resume=6) == pytest.approx(REST_OF_10)
    assert hf_rates(tmp_path, 18, own=own, resume=6) == pytest.approx(REST_OF_18)


def test_a_second_training_goes_on_with_the_first(tmp_path: Path) -> None:
    hf_rates(tmp_path / "first", 10)
    again = LearningRate(warmup=2, decay="linear", final=0.0, continues=str(tmp_path / "first" / "checkpoint-6"))
    assert hf_rates(tmp_path / "second", 12, options=again) == pytest.approx(REST_OF_18)
    assert hf_rates(tmp_path / "second", 12, options=again, resume=6) == pytest.approx(REST_OF_18[6:])


def test_a_given_schedule_and_a_recipe_contradict_each_other(tmp_path: Path) -> None:
    trainer = hf_trainer(tiny_llama(), tmp_path, [])
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="given a LambdaLR and the recipe has a learning_rate"):
        take_over_transformers(trainer, OPTIONS)


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    trainer = hf_trainer(tiny_llama(), tmp_path, [], max_steps=10, save_strategy="steps", save_steps=6)
    trainer.train()
    with pytest.raises(ValueError, match="another scheduler's"):
        hf_rates(tmp_path, 10, resume=6)
    with pytest.raises(ValueError, match="saved without the learning_rate section"):
        read_schedule(str(tmp_path / "checkpoint-6"))
    (tmp_path / "checkpoint-6" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="from a checkpoint without a learning-rate schedule"):
        hf_rates(tmp_path, 10, resume=6)
    with pytest.raises(ValueError, match=r"which holds no scheduler\.pt"):
        read_schedule(str(tmp_path / "checkpoint-6"))


class ScheduledModule(TinyModule):
    """Returns the schedule itself."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=BASE)
        schedule = ContinuedSchedule(optimizer, OPTIONS, total_steps=total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FallingModule(TinyModule):
    """Has a schedule of its own, which is replaced."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=BASE)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class LightningRecorder(Callback):
    """Notes the rate of every step and saves after six; takes the schedule over where options are given."""

    def __init__(self, options: LearningRate | None, folder: Path) -> None:
        self.options, self.file, self.rates = options, folder / "saved.ckpt", list[float]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.file)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.options is not None:
            take_over_lightning(trainer, self.options, total_steps=total_steps(trainer))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        check_place(trainer.lr_scheduler_configs[0].scheduler, trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


def lightning_rates(
    module: TinyModule, max_steps: int, folder: Path, *, options: LearningRate | None, resume: str | None = None
) -> list[float]:
    """Train a tiny model, saving at step 6; return the rates."""
    recorder = LightningRecorder(options, folder)
    clip = 1.0 if module.automatic_optimization else None
    trainer = lightning_trainer([recorder], max_steps=max_steps, gradient_clip_val=clip)
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return recorder.rates


@pytest.mark.parametrize(
    ("kind", "options"),
    [(ScheduledModule, None), (TinyModule, OPTIONS), (FallingModule, OPTIONS)],
    ids=["made by the module", "taken over", "taken over from another"],
)
def test_lightning_goes_on_after_a_resume(tmp_path: Path, kind: Any, options: LearningRate | None) -> None:
    file = str(tmp_path / "saved.ckpt")
    assert lightning_rates(kind(), 10, tmp_path, options=options) == pytest.approx(FIRST + REST_OF_10)
    assert lightning_rates(kind(), 10, tmp_path, options=options, resume=file) == pytest.approx(REST_OF_10)
    assert lightning_rates(kind(), 18, tmp_path, options=options, resume=file) == pytest.approx(REST_OF_18)


def test_a_second_training_under_lightning_goes_on_with_the_first(tmp_path: Path) -> None:
    lightning_rates(TinyModule(), 10, tmp_path, options=OPTIONS)
    again = LearningRate(decay="linear", final=0.0, continues=str(tmp_path / "saved.ckpt"))
    assert lightning_rates(TinyModule(), 12, tmp_path / "second", options=again) == pytest.approx(REST_OF_18)


def test_lightning_checkpoints_without_a_schedule_are_refused(tmp_path: Path) -> None:
    class Nothing(LightningRecorder):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pass

    lightning_trainer([Nothing(None, tmp_path)], max_steps=6).fit(TinyModule(), loader(), loader())
    with pytest.raises(ValueError, match="from a checkpoint without a learning-rate schedule"):
        lightning_rates(TinyModule(), 10, tmp_path, options=OPTIONS, resume=str(tmp_path / "saved.ckpt"))


class ManualModule(TinyModule):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class CyclicModule(TinyModule):
    """Has a schedule that changes the base rates."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=BASE)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE, 10)]


@pytest.mark.parametrize(
    ("kind", "message"), [(ManualModule, "needs automatic optimization"), (CyclicModule, "has changed the base rates")]
)
def test_lightning_modules_that_cannot_be_taken_over(tmp_path: Path, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lightning_rates(kind(), 10, tmp_path, options=OPTIONS)


def test_the_expected_rates_are_those_of_the_curve() -> None:
    curve = planned(OPTIONS, 10)
    assert [BASE * curve.share(step) for step in range(10)] == pytest.approx(FIRST + REST_OF_10)
    assert all(a > b for a, b in itertools.pairwise(REST_OF_18))
