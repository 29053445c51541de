"""Distillation from a recipe in both trainers: whose loss is taken, what does not count, who teaches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback

from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as TransformersCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from tests.integrations.recoveries import PRUNE, recipe, same, with_lightning, with_transformers
from tests.integrations.trainings import InOrderTrainer, TinyModule, hf_trainer, lightning_trainer, loader
from tests.loops import BATCH
from tests.tiny_models import TokenDataset, tiny_llama, token_windows


def test_a_loss_of_the_programs_own_and_a_distillation_exclude_each_other(tmp_path: Path) -> None:
    trainer = hf_trainer(tiny_llama(), tmp_path, [TransformersCallback(recipe({"distill": {}}, tmp_path))])
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    with pytest.raises(ValueError, match="leave out one of them"):
        trainer.train()


def test_evaluating_after_a_distillation_gives_the_ordinary_loss(tmp_path: Path) -> None:
    callback = TransformersCallback({"prune": PRUNE, "recover": {"distill": {}}})
    trainer = hf_trainer(tiny_llama(), tmp_path, [callback])
    trainer.train()
    measured = callback.run.recovery.report().as_dict()["moments"]["recovered"]["loss"]["nats"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured, abs=1e-4)


class Preferring(InOrderTrainer):
    """Trains on a loss of its own, as trainers for preferences and rewards do."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = -functional.logsigmoid(outputs.logits[:, -1, 3] - outputs.logits[:, -1, 4]).mean()
        return (loss, outputs) if return_outputs else loss


class PreferringModule(TinyModule):
    """The same in Lightning; the model is called with labels, but not for its loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.model(**batch).logits
        return -functional.logsigmoid(logits[:, -1, 3] - logits[:, -1, 4]).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_distillation_that_the_trainers_own_loss_passes_by_ends_after_the_first_step(
    accumulate: int, tmp_path: Path
) -> None:
    content = recipe({"distill": {}}, tmp_path)
    trainer = hf_trainer(
        tiny_llama(), tmp_path, [TransformersCallback(content)], gradient_accumulation_steps=accumulate
    )
    trainer.__class__ = Preferring
    with pytest.raises(ValueError, match=r"recover.distill changes nothing in this training: an optimizer step was"):
        trainer.train()
    assert trainer.state.global_step == 1
    module = PreferringModule()
    lightning = lightning_trainer([LightningCallback(content)], accumulate_grad_batches=accumulate)
    with pytest.raises(ValueError, match=r"recover.distill changes nothing in this training"):
        lightning.fit(module, loader(), loader())
    assert lightning.global_step == 1
    assert not module.model._forward_hooks
    assert not module.model._forward_pre_hooks


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_label_smoothing_is_that_of_the_trainer(smoothing: float, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "teacher")
    own: dict[str, Any] = {"max_steps": 1, "label_smoothing_factor": smoothing}
    # A student that is its teacher has no other loss than the cross-entropy.
    distill = {"teacher": str(tmp_path / "teacher"), "ce_weight": 1.0}
    content = {"recover": {"distill": distill, "requires": "any"}}
    losses = []
    for callbacks in ([], [TransformersCallback(content)]):
        trainer = hf_trainer(tiny_llama(), tmp_path, callbacks, **own)
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_label_smoothing_of_labels_that_do_not_count_is_refused(tmp_path: Path) -> None:
    content = recipe({"distill": {}}, tmp_path)
    with pytest.raises(ValueError, match=r"label smoothing \(0.1\) .*distill.ce_weight 0 leaves them out of the loss"):
        with_transformers(content, tmp_path, label_smoothing_factor=0.1)


class SomeWithout(TokenDataset):
    """Sequences of which the second batch has no label that counts."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        is_out = index // BATCH == 1
        return row | {"labels": torch.full_like(row["labels"], -100)} if is_out else row


def test_a_batch_without_a_counted_label_changes_nothing_in_both_trainers(tmp_path: Path) -> None:
    data = SomeWithout(token_windows(BATCH * 3))
    content = {"recover": {"distill": {"teacher": str(tmp_path / "teacher")}, "requires": "any"}}
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    found = []
    for batches in (range(3), (0, 2)):
        rows = torch.utils.data.Subset(data, [BATCH * batch + row for batch in batches for row in range(BATCH)])
        callback, model = TransformersCallback(content), tiny_llama()
        options = {"optim": "sgd", "max_steps": len(batches), "learning_rate": 0.5}
        trainer = hf_trainer(model, tmp_path, [callback], **options)
        trainer.train_dataset = rows
        trainer.train()
        found.append(dict(model.named_parameters()))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert [loss == 0 for loss in losses] == [batch == 1 for batch in batches]
        module = SgdModule()
        lightning = lightning_trainer([LightningCallback(content)], max_steps=len(batches))
        lightning.fit(module, torch.utils.data.DataLoader(rows, batch_size=BATCH), loader())
        found.append(dict(module.model.named_parameters()))
    assert same(found[0], found[2])
    assert same(found[1], found[3])
    assert same(found[0], found[1])


class SgdModule(TinyModule):
    """With an optimizer that stands still without a gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


SELF_TAUGHT: dict[str, Any] = {"prune": PRUNE, "recover": {"distill": {"temperature": 2.0}}}


class DyingAt(TrainerCallback):
    """Ends a training at each of these steps, once."""

    def __init__(self, steps: list[int], error: BaseException) -> None:
        self.steps, self.error = steps, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.steps.remove(state.global_step)
            raise self.error


def test_a_trainer_that_resumes_twice_has_its_self_teacher(tmp_path: Path) -> None:
    expected = dict(with_transformers(SELF_TAUGHT, tmp_path / "whole", max_steps=4)[1].named_parameters())
    callbacks = [TransformersCallback(SELF_TAUGHT), DyingAt([2, 3], KeyboardInterrupt())]
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = hf_trainer(tiny_llama(), tmp_path / "out", callbacks, **options)
    for resume in (None, str(tmp_path / "out" / "checkpoint-1")):
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same(dict(trainer.model.named_parameters()), expected)
    with pytest.raises(ValueError, match="let go of when the training has ended; to train on, give a new callback"):
        trainer.train()


def test_a_training_that_looks_for_its_batch_size_has_its_self_teacher(tmp_path: Path) -> None:
    callback = TransformersCallback(SELF_TAUGHT)
    callbacks = [callback, DyingAt([1], RuntimeError("CUDA out of memory."))]
    trainer = hf_trainer(tiny_llama(), tmp_path, callbacks, auto_find_batch_size=True, max_steps=2)
    trainer.train()
    assert trainer._train_batch_size < BATCH
    assert callback.run.report().sparsity == 0.5
    taught = [entry["prune/distill/kd"] for entry in trainer.state.log_history if "prune/distill/kd" in entry]
    assert len(taught) == 2 + 1
    assert min(taught) > 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the second run goes on in the folder of the first
def test_a_lightning_training_that_goes_on_has_its_self_teacher(tmp_path: Path) -> None:
    class Dying(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                raise RuntimeError("a worker died")

    expected = with_lightning(SELF_TAUGHT, max_steps=3)[1]
    callback, module = LightningCallback(SELF_TAUGHT), TinyModule()
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 3, "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="a worker died"):
        lightning_trainer([callback, Dying(), saving], **options).fit(module, loader(), loader())
    again = lightning_trainer([callback, Dying(), saving], **options)
    again.fit(module, loader(), loader(), ckpt_path=tmp_path / "step=1.ckpt")
    assert same(dict(module.model.named_parameters()), dict(expected.named_parameters()))
