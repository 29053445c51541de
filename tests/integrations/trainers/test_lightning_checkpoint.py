"""Which checkpoint is the best: a pruned one with `PrunedCheckpoint`; with any other, what it holds is said."""

import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.integrations.trainers.lightning_checkpoint import PrunedCheckpoint, check_state
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from tests.integrations.lightning_nets import Net, cubic, data, net_trainer, zeros

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Rising(Net):
    """The validation loss rises, as it does while a model is pruned."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.trainer.global_step))


def fit(keeping: Any) -> tuple[Net, PruningCallback]:
    module, callback = Rising(), PruningCallback(cubic())
    trainer = net_trainer(callback, keeping, enable_checkpointing=True)
    trainer.fit(module, data(), data())
    trainer.test(module, data(), ckpt_path="best", verbose=False)
    return module, callback


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of this library about checkpoints."""
    return [record.getMessage() for record in caplog.records if "heckpoint" in record.getMessage()]


def test_a_best_checkpoint_from_before_the_pruning_is_told_at_start_and_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        module, callback = fit(ModelCheckpoint(tmp_path, monitor="val_loss"))
    assert zeros(module) < 0.4
    assert ours(caplog)[0].startswith("ModelCheckpoint keeps the best by 'val_loss': as a rule a model from before the")
    assert len(callback.run.report().notes) == 1
    assert "epoch=0-step=8.ckpt, is not the pruned model: " in callback.run.report().notes[0]
    assert "PrunedCheckpoint in place of ModelCheckpoint" in callback.run.report().notes[0]
    assert callback.run.broken == (), "the model itself is as promised"


def test_pruned_checkpoints_alone_compete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keeping = PrunedCheckpoint(tmp_path, monitor="val_loss")
    with caplog.at_level(logging.WARNING):
        module, callback = fit(keeping)
    assert Path(keeping.best_model_path).name == "epoch=2-step=24.ckpt"
    assert len(list(tmp_path.iterdir())) == 1
    assert zeros(module) == 0.5
    assert ours(caplog) == []
    assert callback.run.report().notes == ()


@pytest.mark.skipif("on_train_end" not in vars(ModelCheckpoint), reason="Lightning 2.5 saves nothing at the end")
def test_the_last_checkpoint_is_written_at_the_end_if_it_is_pruned(tmp_path: Path) -> None:
    keeping = PrunedCheckpoint(tmp_path, every_n_epochs=100, save_last=True)
    net_trainer(PruningCallback(cubic()), keeping, enable_checkpointing=True).fit(Net(), data(), data())
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_ordinary_checkpoint_without_a_metric_needs_no_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        module, callback = fit(ModelCheckpoint(tmp_path))
    assert ours(caplog) == []
    assert zeros(module) == 0.5
    assert callback.run.report().notes == ()


def test_a_best_checkpoint_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    class Spoiling(ModelCheckpoint):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_end(trainer, pl_module)
            if self.best_model_path:
                Path(self.best_model_path).write_bytes(b"not a checkpoint")

    module, callback = Rising(), PruningCallback(cubic())
    keeping = Spoiling(tmp_path, monitor="val_loss")
    net_trainer(callback, keeping, enable_checkpointing=True).fit(module, data(), data())
    assert "could not be compared with the masks" in callback.run.report().notes[0]


def test_it_needs_something_to_wait_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PrunedCheckpoint waits for the masks of a PruningCallback"):
        net_trainer(PrunedCheckpoint(tmp_path), enable_checkpointing=True).fit(Net(), data(), data())


def test_whether_the_masks_are_final_is_a_metric(tmp_path: Path) -> None:
    seen: list[float] = []

    class Noting(ModelCheckpoint):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics["prune/is_final"]))

    callbacks = (PruningCallback(cubic()), Noting(tmp_path))
    net_trainer(*callbacks, enable_checkpointing=True).fit(Net(), data(), data())
    assert seen == [0.0, 0.0, 1.0, 1.0]


def test_a_state_that_is_not_whole_or_of_another_step_is_refused() -> None:
    whole = {"sparsifier": {}, "evaluations": []}
    check_state(whole, {"global_step": 7})
    check_state(whole | {"global_step": 7}, {"global_step": 7})
    with pytest.raises(ValueError, match="belongs to step 5, the checkpoint to step 7"):
        check_state(whole | {"global_step": 5}, {"global_step": 7})
    with pytest.raises(ValueError, match=r"lacks \['evaluations'\]; it is damaged"):
        check_state({"sparsifier": {}}, {"global_step": 7})
