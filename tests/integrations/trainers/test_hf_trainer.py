"""Pruning inside a Hugging Face Trainer: the same run as the bare loop, saved, resumed, logged and exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from lightning_prune.integrations.trainers.hf_trainer import SIDE_FILE, PruningCallback
from tests.integrations.trainings import hf_trainer
from tests.loops import NUM_STEPS, assert_same_masks, assert_same_weights, recipe, train_pruned
from tests.tiny_models import tiny_llama

SAVES = {"save_strategy": "steps", "save_steps": 5}


def run(out: Path, source: Any = None, *, resume: Any = None, **options: Any) -> tuple[Trainer, PruningCallback]:
    callback = PruningCallback(recipe() if source is None else source)
    trainer = hf_trainer(tiny_llama(seed=0 if resume is None else 99), out, [callback], **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.mark.parametrize("scorer", ["Magnitude", "Wanda", "Taylor", "Gradient", "Random"])
def test_the_run_equals_a_bare_loop_bit_for_bit(tmp_path: Path, scorer: str) -> None:
    plain, conductor = train_pruned(recipe(scorer=scorer))
    trainer, callback = run(tmp_path, recipe(scorer=scorer))
    assert_same_masks(conductor, callback.run.sparsifier)
    assert_same_weights(plain, trainer.model)


@pytest.mark.parametrize("scorer", ["Magnitude", "Wanda", "Taylor", "Gradient", "Movement", "Random"])
def test_resume_equals_no_pause(tmp_path: Path, scorer: str) -> None:
    whole, callback = run(tmp_path / "whole", recipe(scorer=scorer), **SAVES)
    resumed, second = run(
        tmp_path / "again", recipe(scorer=scorer), resume=str(tmp_path / "whole" / "checkpoint-5"), **SAVES
    )
    assert second.run.sparsifier.step == NUM_STEPS
    assert_same_weights(whole.model, resumed.model)
    assert_same_masks(callback.run.sparsifier, second.run.sparsifier)
    strip = [{k: e[k] for k in ("step", "sparsity") if k in e} for e in callback.run.sparsifier.history]
    assert [{k: e[k] for k in ("step", "sparsity") if k in e} for e in second.run.sparsifier.history] == strip


def test_resume_from_a_moved_folder_and_by_name_of_the_run(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", **SAVES)
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "elsewhere" / "kept")
    moved, _ = run(tmp_path / "other", resume=str(tmp_path / "elsewhere" / "kept"), **SAVES)
    assert_same_weights(whole.model, moved.model)
    shutil.rmtree(tmp_path / "whole" / "checkpoint-10")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-12")
    last, _ = run(tmp_path / "whole", resume=True, **SAVES)
    assert_same_weights(whole.model, last.model)


def test_resume_with_restored_callback_states(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", **SAVES)
    callback = PruningCallback(recipe())
    trainer = hf_trainer(
        tiny_llama(seed=99), tmp_path / "again", [callback], restore_callback_states_from_checkpoint=True
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    restored = next(found for found in trainer.callback_handler.callbacks if isinstance(found, PruningCallback))
    assert restored is not callback
    assert restored.run.sparsifier.step == NUM_STEPS
    assert_same_weights(whole.model, trainer.model)


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    _, callback = run(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert [entry["step"] for entry in callback.run.sparsifier.history if "sparsity" in entry] == [4, 6, 8]
    assert callback.run.sparsifier.report().sparsity == 0.5


def test_a_checkpoint_from_mid_training_opens_sparse(tmp_path: Path) -> None:
    run(tmp_path, **SAVES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")
    weights = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    assert sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights) == 0.5


def test_sparsity_is_logged_beside_the_loss(tmp_path: Path) -> None:
    trainer, callback = run(tmp_path, eval_strategy="steps", eval_steps=6, **SAVES)
    log = trainer.state.log_history
    changes = {entry["step"]: entry["prune/sparsity"] for entry in log if "prune/sparsity" in entry}
    assert {step: round(value, 3) for step, value in changes.items()} == {0: 0.0, 4: 0.352, 6: 0.481, 8: 0.5, 12: 0.5}
    assert any("prune/sparsity/model.layers.0.mlp.up_proj.weight" in entry for entry in log)
    assert sorted(entry["step"] for entry in log if "loss" in entry) == list(range(1, NUM_STEPS + 1))
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [6, 12]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-5",
    ]
    assert any("eval_loss" in entry for entry in callback.run.sparsifier.history)


def test_a_guard_on_the_evaluation_loss_holds(tmp_path: Path) -> None:
    source = recipe(guard={"metric": "eval_loss", "max": 0.1, "action": "hold"})
    _, callback = run(tmp_path, source, eval_strategy="steps", eval_steps=4)
    report = callback.run.sparsifier.report()
    assert report.sparsity == pytest.approx(0.352, abs=1e-3)
    assert "crossed its bound; pruning holds at sparsity 0.3519" in report.notes[0]
    assert "not the promised 0.5" in report.notes[1]


def test_a_guard_that_acts_when_a_checkpoint_is_saved_resumes_exactly(tmp_path: Path) -> None:
    source = recipe(guard={"metric": "eval_loss", "max": 0.1, "action": "hold"})
    options = {"eval_strategy": "steps", "eval_steps": 5, **SAVES}
    whole, callback = run(tmp_path / "whole", source, **options)
    resumed, second = run(tmp_path / "again", source, resume=str(tmp_path / "whole" / "checkpoint-5"), **options)
    assert second.run.sparsifier.report().notes == callback.run.sparsifier.report().notes
    assert "step 5: eval_loss" in callback.run.sparsifier.report().notes[0]
    assert_same_weights(whole.model, resumed.model)
    assert_same_masks(callback.run.sparsifier, second.run.sparsifier)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the least pruned, which is the first, is "best"
}


@pytest.mark.parametrize("saves", [{"save_strategy": "best"}, {"save_strategy": "steps", "save_steps": 3}])
def test_the_best_checkpoint_is_one_of_the_pruned_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, saves: dict[str, Any]
) -> None:
    _, callback = run(tmp_path, **BEST, **saves)
    assert "the best checkpoint by eval_loss would be one that is hardly pruned" in caplog.text
    assert "step 8, the last of this schedule" in caplog.text
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    assert callback.run.report().sparsity == 0.5
    assert callback.run.broken == ()
    run(tmp_path, resume=True, **BEST, **saves)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]


def test_the_step_of_the_best_checkpoint_may_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Trainer._determine_best_metric

    def as_transformers_4_does(self: Trainer, *args: Any, **kwargs: Any) -> bool:
        is_better = compare(self, *args, **kwargs)
        self.state.best_global_step = None
        return is_better

    monkeypatch.setattr(Trainer, "_determine_best_metric", as_transformers_4_does)
    for resume in (None, True):
        run(tmp_path, resume=resume, **BEST, save_strategy="best")
        assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]


class Averages(TrainerCallback):
    """Puts other weights in the place of the trained ones when training has ended."""

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(0.01)


@pytest.mark.parametrize("is_last", [True, False])
def test_weights_that_were_replaced_are_said_aloud(tmp_path: Path, is_last: bool) -> None:
    callback = PruningCallback(recipe() | {"report": {"dir": str(tmp_path / "page")}})
    callbacks = [Averages(), callback] if is_last else [callback, Averages()]
    hf_trainer(tiny_llama(), tmp_path / "run", callbacks).train()
    (sentence,) = callback.run.broken
    when = "after the last step" if is_last else "after pruning had ended; put its callback last"
    assert sentence.startswith(f"the weights were replaced {when}")
    assert "first model.layers.0.mlp.up_proj.weight" in sentence
    assert sentence in json.loads((tmp_path / "page" / "report.json").read_text())["report"]["notes"]


def test_no_best_checkpoint_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, **SAVES)
    assert "best checkpoint" not in caplog.text


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    hf_trainer(tiny_llama(), tmp_path / "plain", [], **SAVES).train()
    with pytest.raises(ValueError, match=r"resumes at step 5 from .*checkpoint-5, which holds no lightning_prune\.pt"):
        run(tmp_path / "again", resume=str(tmp_path / "plain" / "checkpoint-5"))


def test_a_damaged_or_foreign_side_file_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "whole", **SAVES)
    side = tmp_path / "whole" / "checkpoint-5" / SIDE_FILE
    content = side.read_bytes()
    side.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated, damaged or not ours"):
        run(tmp_path / "again", resume=str(side.parent))
    torch.save({"global_step": 5, "run": Path("anything")}, side)
    with pytest.raises(ValueError, match="truncated, damaged or not ours"):
        run(tmp_path / "again", resume=str(side.parent))
    shutil.copy(tmp_path / "whole" / "checkpoint-10" / SIDE_FILE, side)
    with pytest.raises(ValueError, match="belongs to step 10, the checkpoint to step 5"):
        run(tmp_path / "again", resume=str(side.parent))
    side.write_bytes(content)
    with pytest.raises(ValueError, match="another recipe"):
        run(tmp_path / "again", recipe(sparsity=0.6), resume=str(side.parent))


def test_report_and_export_are_written_at_the_end(tmp_path: Path) -> None:
    source = recipe() | {
        "report": {"dir": str(tmp_path / "report")},
        "export": {"format": "huggingface", "dir": str(tmp_path / "export")},
    }
    trainer, _ = run(tmp_path / "run", source)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert_same_weights(trainer.model, exported)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["report"]["sparsity"] == 0.5
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    with pytest.raises(ValueError, match="is not empty"):
        run(tmp_path / "again", source | {"seed": 1, "report": {}})


def test_evaluation_by_the_trainer_works_while_masks_are_on(tmp_path: Path) -> None:
    trainer, callback = run(tmp_path)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.evaluate()["eval_loss"] > 0
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert not callback.run.sparsifier.is_attached
