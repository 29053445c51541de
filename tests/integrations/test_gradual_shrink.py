"""Shrinking while training: the same weights in every trainer, and through a resume before or after a cut."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prune.integrations.trainers import hf_gradual_shrink, lightning_gradual_shrink
from lightning_prune.schedules import Linear
from lightning_prune.structured.gradual import GradualShrink
from tests.integrations.trainings import ResumableLoader, TinyModule, hf_trainer, lightning_trainer
from tests.loops import NUM_STEPS, adamw, train
from tests.tiny_models import tiny_llama

SHRINK = GradualShrink(schedule=Linear(sparsity=0.5, start=1, end=NUM_STEPS - 1, interval=2), score="sensitivity")


def bare() -> dict[str, Tensor]:
    model = tiny_llama()
    optimizer = adamw(model)
    train(
        model,
        optimizer,
        after_step=lambda step: SHRINK.after_step(model, [optimizer], step=step, total_steps=NUM_STEPS),
    )
    return model.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.long
def test_transformers_and_a_bare_loop_give_the_same_weights_and_resume(tmp_path: Path) -> None:
    model = tiny_llama()
    callback = hf_gradual_shrink.ShrinkingCallback(SHRINK)
    hf_trainer(model, tmp_path, [callback], save_strategy="steps", save_steps=1).train()
    assert model.config.intermediate_size == 24
    assert same(bare(), model.state_dict())
    for step in (2, NUM_STEPS // 2, NUM_STEPS - 1):
        folder = tmp_path / f"checkpoint-{step}"
        again = AutoModelForCausalLM.from_pretrained(folder)
        hf_trainer(again, tmp_path / f"again{step}", [callback]).train(resume_from_checkpoint=str(folder))
        assert same(model.state_dict(), again.state_dict()), step


@pytest.mark.slow
def test_mixed_precision_cuts_as_full_precision_does(tmp_path: Path) -> None:
    """Accelerate puts autocast around `forward`, which the smaller model does not have."""
    model = tiny_llama()
    callback = hf_gradual_shrink.ShrinkingCallback(SHRINK)
    hf_trainer(model, tmp_path, [callback], bf16=True).train()
    assert model.config.intermediate_size == 24
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(2, marks=pytest.mark.slow),
        *(pytest.param(stop, marks=pytest.mark.long) for stop in (NUM_STEPS // 2, NUM_STEPS - 1)),
    ],
)
def test_lightning_resumes_a_smaller_model_into_a_full_size_module(stop: int, tmp_path: Path) -> None:
    def callback() -> lightning_gradual_shrink.ShrinkingCallback:
        return lightning_gradual_shrink.ShrinkingCallback(SHRINK)

    straight = TinyModule()
    lightning_trainer([callback()], limit_val_batches=0).fit(straight, ResumableLoader(), ResumableLoader())
    assert straight.model.config.intermediate_size == 24
    assert same(bare(), straight.model.state_dict())

    class Save(lightning_gradual_shrink.Callback):
        def on_train_batch_end(self, trainer: object, *args: object) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    saved = lightning_trainer([callback(), Save()], limit_val_batches=0)
    saved.fit(TinyModule(), ResumableLoader(), ResumableLoader())
    resumed = TinyModule(tiny_llama(seed=5))
    lightning_trainer([callback()], limit_val_batches=0).fit(
        resumed, ResumableLoader(), ResumableLoader(), ckpt_path=tmp_path / "stopped.ckpt"
    )
    assert same(straight.model.state_dict(), resumed.model.state_dict())


def test_what_keeps_old_shapes_is_refused(tmp_path: Path) -> None:
    callback = hf_gradual_shrink.ShrinkingCallback(SHRINK)
    options = dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | dict.fromkeys(
        ("save_steps", "eval_steps"), 1
    )
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        hf_trainer(tiny_llama(), tmp_path, [callback], load_best_model_at_end=True, **options).train()
    with pytest.raises(ValueError, match="the LightningModule holds none"):
        module = TinyModule()
        module.model = torch.nn.Linear(2, 2)
        lightning_trainer([lightning_gradual_shrink.ShrinkingCallback(SHRINK)], limit_val_batches=0).fit(
            module, ResumableLoader(), ResumableLoader()
        )
