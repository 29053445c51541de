"""Pruning inside a Lightning Trainer: the same run as the bare loop, saved, resumed, logged and exported."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from tests.integrations.trainings import TinyModule, lightning_trainer, loader
from tests.loops import NUM_STEPS, assert_same_masks, assert_same_weights, recipe, train_pruned
from tests.tiny_models import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
SCORERS = ["Magnitude", "Wanda", "Taylor", "Gradient", "Movement", "Random"]


def run(
    source: Any = None, *, resume: Path | None = None, folder: Path | None = None, **options: Any
) -> tuple[TinyModule, PruningCallback]:
    callback = PruningCallback(recipe() if source is None else source)
    callbacks: list[Any] = [callback]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1))
        options["enable_checkpointing"] = True
    module = TinyModule(tiny_llama(seed=0 if resume is None else 99))
    if "val_check_interval" not in options:
        options["limit_val_batches"] = 0
    trainer: Trainer = lightning_trainer(callbacks, **options)
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return module, callback


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_run_equals_a_bare_loop_bit_for_bit(scorer: str) -> None:
    plain, conductor = train_pruned(recipe(scorer=scorer), wrap=TinyModule)
    module, callback = run(recipe(scorer=scorer))
    assert_same_masks(conductor, callback.run.sparsifier)
    assert_same_weights(plain, module.model)


@pytest.mark.parametrize("scorer", SCORERS)
def test_resume_equals_no_pause_also_from_a_moved_file(tmp_path: Path, scorer: str) -> None:
    whole, callback = run(recipe(scorer=scorer), folder=tmp_path / "whole")
    moved = tmp_path / "moved.ckpt"
    shutil.move(tmp_path / "whole" / "step=5.ckpt", moved)
    resumed, second = run(recipe(scorer=scorer), folder=tmp_path / "again", resume=moved)
    assert second.run.sparsifier.step == NUM_STEPS
    assert_same_weights(whole, resumed)
    assert_same_masks(callback.run.sparsifier, second.run.sparsifier)


def test_a_checkpoint_from_mid_training_is_sparse_and_plain(tmp_path: Path) -> None:
    run(folder=tmp_path)
    saved = torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    weights = [value for name, value in saved["state_dict"].items() if name.endswith("_proj.weight")]
    assert sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights) == 0.5
    assert not any("mask" in name for name in saved["state_dict"])


def test_accumulation_counts_optimizer_steps() -> None:
    schedule = {"class_path": "Linear", "init_args": {"sparsity": 0.5, "start": 0, "end": 4, "interval": 2}}
    _, callback = run({"prune": {"schedule": schedule}}, accumulate_grad_batches=2, max_steps=6)
    assert [entry["step"] for entry in callback.run.sparsifier.history if "sparsity" in entry] == [2, 4]
    assert callback.run.sparsifier.step == 6


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions_keep_exact_zeros(precision: Any) -> None:
    module, callback = run(precision=precision)
    weights = dict(module.named_parameters())
    assert all(not weights[name].detach()[~mask].any() for name, mask in callback.run.sparsifier.masks.items())
    assert callback.run.sparsifier.report().sparsity == 0.5


def test_sparsity_goes_to_the_logger(tmp_path: Path) -> None:
    _, callback = run(logger=CSVLogger(tmp_path, name="", version=""), val_check_interval=4)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    column = names.index("prune/sparsity")
    values = [round(float(cells[column]), 3) for row in rows[1:] if (cells := row.split(","))[column]]
    assert values == [0.0, 0.352, 0.481, 0.5, 0.5]
    assert "prune/sparsity/model.model.layers.0.mlp.up_proj.weight" in names
    assert {"loss", "val_loss", "train_loss"} <= set().union(*callback.run.sparsifier.history)


def test_a_guard_on_the_validation_loss_rolls_back() -> None:
    source = recipe(guard={"metric": "val_loss", "max": 0.1, "action": "rollback"})
    _, callback = run(source, val_check_interval=5)
    report = callback.run.sparsifier.report()
    assert report.sparsity == 0.0, "the bound was never met, so the dense masks are the last good ones"
    assert "goes back from sparsity 0.3519 to the masks of 0" in report.notes[0]


class Interrupted(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 7:
            raise RuntimeError("stopped")
        return super().training_step(batch, batch_idx)


def test_an_error_detaches_and_keeps_the_report(tmp_path: Path) -> None:
    callback = PruningCallback(recipe() | {"report": {"dir": str(tmp_path / "report")}})
    module = Interrupted()
    with pytest.raises(RuntimeError, match="stopped"):
        lightning_trainer([callback], limit_val_batches=0).fit(module, loader(), loader())
    assert not callback.run.sparsifier.is_attached
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())
    assert (tmp_path / "report" / "index.html").exists()


def test_another_recipe_on_resume_is_refused(tmp_path: Path) -> None:
    run(folder=tmp_path)
    with pytest.raises(ValueError, match=r"another recipe: schedule was .*0\.5.* is now .*0\.6"):
        run(recipe(sparsity=0.6), folder=tmp_path, resume=tmp_path / "step=5.ckpt")


def test_the_length_of_training_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"schedule\.end is step 8, beyond the 4 steps"):
        run(max_steps=4)
    with pytest.raises(ValueError, match="set max_steps"):
        run(max_steps=-1, max_epochs=-1)


def test_export_writes_all_tensors(tmp_path: Path) -> None:
    module, _ = run(recipe() | {"export": {"format": "dense", "dir": str(tmp_path / "out")}})
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == module.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


def test_evaluation_needs_a_language_model_with_its_tokenizer() -> None:
    callback = PruningCallback(recipe() | {"evaluate": {"tasks": ["wikitext"]}})
    with pytest.raises(ValueError, match="its tokenizer was not found in this training"):
        lightning_trainer([callback], limit_val_batches=0).fit(TinyModule(), loader(), loader())


def test_a_model_from_a_folder_without_a_tokenizer_trains(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    module = TinyModule(LlamaForCausalLM.from_pretrained(tmp_path / "model").train())
    callback = PruningCallback(recipe())
    lightning_trainer([callback], limit_val_batches=0).fit(module, loader(), loader())
    assert callback.run.sparsifier.step == NUM_STEPS
