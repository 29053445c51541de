"""Trainings of Transformers that die, start again inside, or go on to another model."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from lightning_prune.integrations.trainers.hf_train_call import TrainCall
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback
from tests.integrations.trainings import InOrderTrainer, dataset, hf_trainer
from tests.loops import NUM_STEPS, assert_same_weights, recipe, train
from tests.tiny_models import tiny_family, tiny_llama


class Dies(TrainerCallback):
    """Raise an error at one step, once."""

    def __init__(self, error: BaseException, *, at: int = 5) -> None:
        self.error: BaseException | None = error
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at and self.error is not None:
            error, self.error = self.error, None
            raise error


def num_hooks(model: nn.Module) -> int:
    of_modules = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return of_modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def assert_free(trainer: Trainer, callback: PruningCallback) -> None:
    """Check that nothing of ours is left: pruned weights move again under a plain optimizer."""
    model: Any = trainer.model
    assert not callback.run.sparsifier.is_attached
    assert num_hooks(model) == 0
    assert trainer.optimizer is None or not trainer.optimizer.optimizer._optimizer_step_post_hooks
    weight = model.model.layers[0].mlp.up_proj.weight
    before = int((weight == 0).sum())
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), last=2)
    assert int((weight == 0).sum()) < before
    pickle.dumps(model)


@pytest.mark.parametrize("error", [KeyError("boom"), KeyboardInterrupt(), SystemExit(0)])
@pytest.mark.parametrize("scorer", ["Magnitude", "Wanda"])
def test_an_error_leaves_nothing_on_the_model(tmp_path: Path, scorer: str, error: BaseException) -> None:
    callback = PruningCallback(recipe(scorer=scorer) | {"report": {"dir": str(tmp_path / "page")}})
    trainer = hf_trainer(tiny_llama(), tmp_path / "run", [callback, Dies(error)])
    with pytest.raises(type(error)):
        trainer.train()
    assert callback.run.broken[0] == "the training was interrupted"
    assert (tmp_path / "page" / "report.json").exists()
    assert_free(trainer, callback)


def test_an_error_at_the_start_leaves_nothing_either(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("boom")

    callback = PruningCallback(recipe(scorer="Wanda"))
    trainer = hf_trainer(tiny_llama(), tmp_path, [callback, Late()])
    with pytest.raises(KeyError):
        trainer.train()
    assert num_hooks(trainer.model) == 0


def test_a_callback_that_came_later_lets_go_too(tmp_path: Path) -> None:
    callback = PruningCallback(recipe(scorer="Wanda"))
    trainer = hf_trainer(tiny_llama(), tmp_path, [Dies(KeyError("boom"))])
    trainer.add_callback(callback)
    with pytest.raises(KeyError):
        trainer.train()
    assert_free(trainer, callback)


def test_the_same_trainer_resumes_after_an_interruption(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4}
    whole = hf_trainer(tiny_llama(), tmp_path / "whole", [PruningCallback(recipe(scorer="Wanda"))], **saves)
    whole.train()
    callback = PruningCallback(recipe(scorer="Wanda"))
    trainer = hf_trainer(tiny_llama(), tmp_path / "run", [callback, Dies(KeyboardInterrupt())], **saves)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, trainer.model)
    assert callback.run.broken == ()


def test_a_smaller_batch_is_found_while_masks_are_on(tmp_path: Path) -> None:
    found = set()

    class Small(InOrderTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            if self.state.global_step < 6:
                found.add(num_hooks(model))
            if len(inputs["input_ids"]) > 2 and self.state.global_step == 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(model, inputs, *args)

    callback = PruningCallback(recipe(scorer="Wanda") | {"recover": {"retrain": ["all"]}})
    model = tiny_llama()
    args = hf_trainer(model, tmp_path, [], auto_find_batch_size=True).args
    Small(model=model, args=args, train_dataset=dataset(), callbacks=[callback]).train()
    assert callback.run.sparsifier.step == NUM_STEPS
    assert [entry["step"] for entry in callback.run.sparsifier.history if "sparsity" in entry][-1] == 8
    assert callback.run.report().sparsity == 0.5
    assert callback.run.broken == ()
    assert len(found) == 1  # what was hooked on the first way was taken off
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    "again", [lambda: tiny_llama(seed=7), lambda: tiny_llama(layers=1), lambda: tiny_family("gpt2")]
)
def test_a_second_model_starts_anew(tmp_path: Path, again: Callable[[], PreTrainedModel]) -> None:
    callback = PruningCallback(recipe(scorer="Wanda"))
    hf_trainer(tiny_llama(), tmp_path / "one", [callback]).train()
    second = hf_trainer(again(), tmp_path / "two", [callback])
    second.train()
    fresh = hf_trainer(again(), tmp_path / "fresh", [PruningCallback(recipe(scorer="Wanda"))])
    fresh.train()
    assert_same_weights(fresh.model, second.model)
    assert callback.run.report().sparsity == 0.5


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_an_optimizer_that_never_steps_is_refused_at_the_first_step(tmp_path: Path) -> None:
    class Lomo(torch.optim.SGD):
        """Changes the weights in the backward pass; its step is empty, so no hook fires."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.step: Any = lambda closure=None: None

    model = tiny_llama()
    optimizer = Lomo(model.parameters(), lr=0.1)
    args = hf_trainer(model, tmp_path, []).args
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = InOrderTrainer(
        model=model,
        args=args,
        train_dataset=dataset(),
        callbacks=[PruningCallback(recipe())],
        optimizers=(optimizer, schedule),
    )
    with pytest.raises(ValueError, match=r"the step of Lomo was never called.* set optim to adamw_torch"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_longer_training_resumes_where_steps_are_numbers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    hf_trainer(tiny_llama(), tmp_path / "short", [PruningCallback(recipe())], **options).train()
    callback = PruningCallback(recipe())
    longer = hf_trainer(tiny_llama(seed=9), tmp_path / "long", [callback], **options | {"max_steps": 20})
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-10"))
    assert callback.run.sparsifier.step == 20
    assert callback.run.report().sparsity == 0.5


def test_a_longer_training_with_shares_is_told_the_steps_that_work(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    share = {"schedule": {"class_path": "Cubic", "init_args": {"sparsity": 0.5, "start": 0.2, "end": 0.7}}}
    hf_trainer(tiny_llama(), tmp_path / "short", [PruningCallback(recipe(**share))], **options).train()
    asked = str(tmp_path / "short" / "checkpoint-5")
    options["max_steps"] = 20
    refused = hf_trainer(tiny_llama(), tmp_path / "no", [PruningCallback(recipe(**share))], **options)
    with pytest.raises(ValueError, match=r"as steps of the old plan: start: 2, end: 8, interval: 1"):
        refused.train(resume_from_checkpoint=asked)
    share["schedule"]["init_args"] |= {"start": 2, "end": 8, "interval": 1}  # type: ignore[index]
    callback = PruningCallback(recipe(**share))
    hf_trainer(tiny_llama(), tmp_path / "long", [callback], **options).train(resume_from_checkpoint=asked)
    assert callback.run.sparsifier.step == 20
    assert callback.run.report().sparsity == 0.5
    assert callback.run.broken == ()


def test_a_batch_without_a_counted_label_changes_no_mask(tmp_path: Path) -> None:
    class Blank(InOrderTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            if self.state.global_step == 3:
                inputs = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
            loss = super().training_step(model, inputs, *args)
            for parameter in model.parameters():  # what torch gives for a mean over nothing
                parameter.grad.nan_to_num_(0.0)
            return loss

    callback = PruningCallback(recipe(scorer="Wanda"))
    model = tiny_llama()
    args = hf_trainer(model, tmp_path, []).args
    Blank(model=model, args=args, train_dataset=dataset(), callbacks=[callback]).train()
    assert callback.run.report().sparsity == 0.5
    assert callback.run.broken == ()


def test_a_call_goes_through_and_is_watched_once(tmp_path: Path) -> None:
    callback = PruningCallback(recipe())
    trainer = hf_trainer(tiny_llama(), tmp_path, [callback], save_strategy="steps", save_steps=12)
    call = vars(trainer)["train"]
    assert isinstance(call, TrainCall)
    trainer.train(None, None)
    trainer.train(str(tmp_path / "checkpoint-12"), None)
    trainer.train(resume_from_checkpoint=None)
    assert vars(trainer)["train"] is call
    assert not isinstance(call.method, TrainCall)
    assert call.__name__ == "train"


def test_a_resume_passes_a_half_written_checkpoint_by(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4}
    trainer = hf_trainer(tiny_llama(), tmp_path, [PruningCallback(recipe())], **saves)
    trainer.train()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("{")
    again = hf_trainer(tiny_llama(seed=9), tmp_path, [PruningCallback(recipe())], **saves)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(trainer.model, again.model)
