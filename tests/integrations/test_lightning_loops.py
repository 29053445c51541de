"""A Lightning training that runs without pruning runs with it: skipped batches, tuners, folds, interruptions."""

import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner.tuning import Tuner
from packaging.version import Version

from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from tests.integrations.lightning_nets import BATCHES, Net, cubic, data, net_trainer, zeros
from tests.loops import assert_same_masks, assert_same_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*is not resumable"),
    pytest.mark.filterwarnings("ignore:.*returned `None`"),
]
# In Lightning 2.4 the callback that looks for a learning rate leaves the batches of its trial out of the first epoch.
LR_FINDER_REWINDS = Version(lightning.__version__) >= Version("2.6")


def fit(module: Net | None = None, recipe: Any = None, *others: Any, **options: Any) -> tuple[Net, PruningCallback]:
    module = Net() if module is None else module
    callback = PruningCallback(cubic() if recipe is None else recipe, total_steps=options.pop("total_steps", None))
    resume = options.pop("resume", None)
    net_trainer(callback, *others, **options).fit(module, data(), data(), ckpt_path=resume)
    return module, callback


class Skipping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 4 == 1 else super().training_step(batch, batch_idx)


class Manual(Net):
    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()


class Adversarial(Net):
    """Two optimizers, both stepped on every batch; the second holds the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.out.parameters(), lr=0.01), torch.optim.AdamW(self.blocks.parameters(), lr=0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_batches_may_be_skipped() -> None:
    module, callback = fit(Skipping())
    assert callback.run.sparsifier.step == 4 * BATCHES, "Lightning steps its optimizer without gradients"
    assert zeros(module) == 0.5


def test_manual_optimization_is_pruned_on_its_own_clock() -> None:
    module, callback = fit(Manual())
    assert callback.run.sparsifier.step == 4 * BATCHES
    assert zeros(module) == 0.5
    module, callback = fit(Manual(every=2), total_steps=2 * BATCHES)
    assert callback.run.sparsifier.step == 2 * BATCHES
    assert zeros(module) == 0.5
    assert callback.run.sparsifier.broken == ()


def test_of_several_optimizers_the_clock_is_the_one_that_holds_the_targets() -> None:
    module, callback = fit(Adversarial())
    assert callback.run.sparsifier.step == 4 * BATCHES
    assert zeros(module) == 0.5
    with pytest.raises(ValueError, match=r"max_steps counts the steps of all 2 optimizers .* total_steps="):
        fit(Adversarial(), max_steps=40, max_epochs=-1)
    module, callback = fit(Adversarial(), max_steps=40, max_epochs=-1, total_steps=20)
    assert callback.run.sparsifier.step == 20
    assert zeros(module) == 0.5
    assert callback.run.report().notes == ()


def test_a_length_that_is_not_known_can_be_given() -> None:
    with pytest.raises(ValueError, match="give total_steps to the PruningCallback"):
        fit(max_epochs=-1, max_steps=-1)
    stop = ModelStop(at=20)
    module, _ = fit(None, None, stop, max_epochs=-1, total_steps=20)
    assert zeros(module) == 0.5


class ModelStop(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.at


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return data(self.batch_size)

    def val_dataloader(self) -> Any:
        return data(self.batch_size)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("way", ["callback", "lr_find", "scale_batch_size"])
def test_tuners_leave_the_training_to_start_at_its_beginning(way: str, tmp_path: Path) -> None:
    module, callback, source = Net(), PruningCallback(cubic()), Data()
    net_trainer(callback, max_epochs=1).fit(Net(seed=4), data(), data())  # an earlier fold
    finder = [LearningRateFinder(num_training_steps=6)] if way == "callback" else []
    trainer = net_trainer(*finder, callback, default_root_dir=tmp_path, max_epochs=2)
    if way == "lr_find":
        Tuner(trainer).lr_find(module, datamodule=source, num_training=6)
    elif way == "scale_batch_size":
        Tuner(trainer).scale_batch_size(module, datamodule=source, max_trials=2, steps_per_trial=1)
    trainer.fit(module, datamodule=source)
    if way != "callback" or LR_FINDER_REWINDS:
        assert trainer.global_step == 2 * len(data(source.batch_size))
    assert callback.run.sparsifier.step == trainer.global_step
    assert zeros(module) == 0.5
    assert callback.run.sparsifier.broken == ()


def test_folds_with_one_callback_are_pruned_one_by_one(tmp_path: Path) -> None:
    shared = PruningCallback(cubic())
    for seed in (0, 1):
        keeping = ModelCheckpoint(tmp_path / str(seed), save_last=True)
        trainer = net_trainer(shared, keeping, enable_checkpointing=True)
        module = Net(seed)
        trainer.fit(module, data(), data())
        trainer.test(module, data(), ckpt_path="last", verbose=False)
        alone, own = fit(Net(seed))
        assert_same_weights(module, alone)
        assert_same_masks(shared.run.sparsifier, own.run.sparsifier)
        assert shared.run.report() == own.run.report()


class Stop(Callback):
    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize("scorer", ["Wanda", "Movement"])
@pytest.mark.parametrize("moment", ["in training", "after it"])
def test_resume_at_the_end_of_an_epoch_is_exact_with_batches_that_differ(
    scorer: str, moment: str, tmp_path: Path
) -> None:
    recipe = cubic(scorer=scorer)
    recipe["prune"]["schedule"]["init_args"]["start"] = 1
    whole, first = fit(None, recipe)
    callback, module = PruningCallback(recipe), Net()
    trainer = net_trainer(callback, Stop() if moment == "after it" else SaveAt(16, tmp_path))
    trainer.fit(module, data(), data())
    if moment == "after it":
        assert callback.run.report().notes[0].startswith("training ended at step 16")
        trainer.save_checkpoint(tmp_path / "16.ckpt")
    resumed, second = fit(Net(seed=9), recipe, resume=tmp_path / "16.ckpt")
    assert_same_weights(whole, resumed)
    assert_same_masks(first.run.sparsifier, second.run.sparsifier)
    assert second.run.report() == first.run.report()


class SaveAt(Callback):
    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / f"{self.step}.ckpt")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and self.step % BATCHES:
            trainer.save_checkpoint(self.folder / f"{self.step}.ckpt")


def test_a_resume_inside_an_epoch_says_what_an_ordinary_loader_does(tmp_path: Path) -> None:
    fit(None, None, SaveAt(11, tmp_path))
    module, callback = fit(None, None, resume=tmp_path / "11.ckpt")
    assert callback.run.sparsifier.step == module.trainer.global_step
    is_repeated = f"where {4 * BATCHES} steps were planned"  # Lightning 2.4 repeats a batch, which is told too
    (note,) = (note for note in callback.run.report().notes if is_repeated not in note)
    assert note.startswith("training resumes after batch 3 of 8 of an epoch, and its data")


def saved(folder: Path) -> dict[str, Any]:
    fit(None, None, SaveAt(16, folder))
    content: dict[str, Any] = torch.load(folder / "16.ckpt", weights_only=True)
    return content


def refused(content: dict[str, Any], folder: Path, match: str) -> None:
    torch.save(content, folder / "changed.ckpt")
    callback = PruningCallback(cubic())
    with pytest.raises(ValueError, match=match):
        net_trainer(callback).fit(Net(), data(), data(), ckpt_path=folder / "changed.ckpt")
    assert callback.run.sparsifier.step == 0
    assert not callback.run.sparsifier.is_attached


def test_a_checkpoint_that_does_not_fit_its_pruning_state_is_refused(tmp_path: Path) -> None:
    content = saved(tmp_path)
    state = content["callbacks"]["PruningCallback"]
    refused(content | {"callbacks": {}}, tmp_path, "at step 16 .* holds no state of a PruningCallback")
    del content["state_dict"]["out.bias"]
    content["state_dict"] |= {"out.bias": torch.zeros(1)}
    dense = {name: torch.ones_like(weight) for name, weight in content["state_dict"].items()}
    refused(content | {"state_dict": dense}, tmp_path, "not zero, in 3 targets.*mixed up")
    other = content | {"callbacks": {"PruningCallback": state | {"global_step": 8}}}
    refused(other, tmp_path, "state belongs to step 8, the checkpoint to step 16")
    other = content | {"callbacks": {"PruningCallback": {"sparsifier": state["sparsifier"]}}}
    refused(other, tmp_path, r"lacks \['evaluations'\]")
    masks = {key: value for key, value in state["sparsifier"].items() if key != "masks"}
    other = content | {"callbacks": {"PruningCallback": state | {"sparsifier": masks}}}
    refused(other, tmp_path, r"lacks \['masks'\]")


class Plain(Net):
    """Without momentum, which Lightning forgets between two fits."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_trainer_that_fits_the_same_module_once_more_goes_on() -> None:
    recipe = cubic()
    recipe["prune"]["schedule"]["init_args"] |= {"start": 0, "end": 28, "interval": 4}
    whole, _ = fit(Plain(), recipe)
    callback, module = PruningCallback(recipe, total_steps=4 * BATCHES), Plain()
    trainer = net_trainer(callback, max_epochs=3)
    trainer.fit(module, data(), data())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data(), data())
    assert callback.run.sparsifier.step == 4 * BATCHES
    assert_same_weights(whole, module)
    assert callback.run.report().notes == ()


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.blocks, optimizer, lr=0.05)


class HeadOnly(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=0.05)


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append((zeros(pl_module), float(trainer.callback_metrics["prune/sparsity"])))


@pytest.mark.parametrize("kind", ["Once", "Cubic"])
def test_a_backbone_unfrozen_later_stays_pruned_and_what_is_logged_is_measured(kind: str) -> None:
    recipe = (
        cubic() if kind == "Cubic" else {"prune": {"schedule": {"class_path": kind, "init_args": {"sparsity": 0.5}}}}
    )
    watch = Watch()
    module, _ = fit(HeadOnly(), recipe, Unfreezing(), watch)
    assert zeros(module) == 0.5
    assert [logged for _, logged in watch.seen] == pytest.approx([found for found, _ in watch.seen])


class Restoring(Callback):
    """Something of the program's own that moves pruned weights outside any optimizer."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step >= 31:
            with torch.no_grad():
                pl_module.blocks[0].weight.add_(1e-3)


def test_the_logged_sparsity_is_that_of_the_weights_and_what_is_not_kept_is_broken() -> None:
    watch = Watch()
    module, callback = fit(None, None, Restoring(), watch)
    assert watch.seen[-1] == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert zeros(module) == pytest.approx(1 / 3)
    assert callback.run.sparsifier.broken[0].startswith("the weights were replaced after the last step")
    assert callback.run.broken == callback.run.sparsifier.broken


class OwnAverage(Net):
    """Copies other weights into itself after everyone else has ended the training."""

    def on_train_end(self) -> None:
        with torch.no_grad():
            self.blocks[0].weight.fill_(1.0)


def test_what_the_module_itself_does_at_the_end_is_seen() -> None:
    _, callback = fit(OwnAverage())
    assert callback.run.sparsifier.broken[0].startswith(
        "the weights were replaced after the training had ended: 128 of"
    )
    assert callback.run.report().notes == callback.run.sparsifier.broken


class Worse(Net):
    """Validation is good the first time and bad ever after."""

    num_validations = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0 if self.num_validations == 0 else 9.0)

    def on_validation_epoch_end(self) -> None:
        self.num_validations += 1


def test_a_guard_judges_a_metric_only_when_it_was_measured_again() -> None:
    recipe = cubic(guard={"metric": "val_loss", "max": 2.0, "action": "rollback"})
    recipe["prune"]["schedule"] = {
        "class_path": "Linear",
        "init_args": {"sparsity": 0.4, "start": 0, "end": 32, "interval": 1},
    }
    _, callback = fit(Worse(), recipe, check_val_every_n_epoch=2)
    assert callback.run.report().sparsity == pytest.approx(0.2, abs=0.01), "the masks of the good validation, step 16"
    measured = [entry["step"] for entry in callback.run.sparsifier.history if "val_loss" in entry]
    assert measured == [16, 32]


def test_two_pruning_callbacks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PruningCallback`"):
        net_trainer(PruningCallback(cubic()), PruningCallback(cubic(0.6)))
    other = type("Derived", (PruningCallback,), {})(cubic())
    with pytest.raises(ValueError, match="a Trainer holds one PruningCallback"):
        net_trainer(PruningCallback(cubic()), other).fit(Net(), data(), data())


class Interrupting(Callback):
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_on_the_model() -> None:
    schedule = {"class_path": "Cubic", "init_args": {"sparsity": 0.5, "start": 1, "end": 24, "interval": 1}}
    module, callback = Net(), PruningCallback({"prune": {"schedule": schedule, "scorer": "Wanda"}})
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            net_trainer(callback, Interrupting()).fit(module, data(), data())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert not callback.run.sparsifier.is_attached
    assert not any(weight._post_accumulate_grad_hooks for weight in module.parameters())
    assert not any(part._forward_pre_hooks for part in module.modules())
    module.zero_grad()
    with torch.no_grad():
        module.blocks[0].weight.fill_(1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    assert bool((module.blocks[0].weight == 1.0).all())


class NeverStepped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for weight in self.parameters():  # as LOMO does, in the backward pass
            weight.data.add_(1e-3)


def test_a_training_without_an_optimizer_step_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no optimizer step was seen.*such as LOMO"):
        fit(NeverStepped())
