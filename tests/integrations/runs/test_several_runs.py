"""Several recipes in one Trainer of Transformers: apart, or refused."""

from pathlib import Path
from typing import Any

import pytest

from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.integrations.runs.several_runs import check_beside, check_targets_apart
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback
from tests.integrations.trainings import hf_trainer
from tests.loops import assert_same_masks, assert_same_weights, recipe
from tests.tiny_models import tiny_llama

ATTENTION, FFN = ["*self_attn*"], ["*mlp*"]


def some(include: list[str], sparsity: float = 0.5, **sections: Any) -> dict[str, Any]:
    return recipe(sparsity, targets={"include": include}) | sections


def train(out: Path, *sources: dict[str, Any], resume: Path | None = None) -> tuple[Any, list[PruningCallback]]:
    callbacks = [PruningCallback(source) for source in sources]
    model = tiny_llama(seed=0 if resume is None else 99)
    trainer = hf_trainer(model, out, callbacks, save_strategy="steps", save_steps=5)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, callbacks


def test_each_keeps_its_own_state_in_a_checkpoint(tmp_path: Path) -> None:
    sources = some(ATTENTION, 0.3), some(FFN, 0.7)
    whole, callbacks = train(tmp_path / "whole", *sources)
    assert [round(callback.run.report().sparsity, 1) for callback in callbacks] == [0.3, 0.7]
    resume = tmp_path / "whole" / "checkpoint-5"
    assert len(list(resume.glob("lightning_prune-*.pt"))) == 2
    again, others = train(tmp_path / "again", *reversed(sources), resume=resume)  # in whatever order
    assert_same_weights(whole.model, again.model)
    for one, other in zip(callbacks, reversed(others), strict=True):
        assert_same_masks(one.run.sparsifier, other.run.sparsifier)


def test_a_resume_with_other_callbacks_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "two", some(ATTENTION), some(FFN))
    with pytest.raises(ValueError, match=r"of a training with other pruning callbacks: give this one the same"):
        train(tmp_path / "one", some(FFN), resume=tmp_path / "two" / "checkpoint-5")


def test_two_masks_on_one_weight_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prune model\.layers\.0\.mlp\.down_proj\.weight \(6 targets in all\)"):
        train(tmp_path, some(FFN), some(["*mlp*", "*self_attn*"]))
    runs = [PruningRun(some(ATTENTION)), PruningRun(some(FFN))]
    check_targets_apart(runs, tiny_llama())
    check_targets_apart(runs[:1] * 1, tiny_llama())


@pytest.mark.parametrize("name", ["export", "report"])
def test_two_that_write_into_one_folder_are_refused_at_construction(tmp_path: Path, name: str) -> None:
    folder = {name: {"dir": str(tmp_path / "out")}}
    with pytest.raises(ValueError, match=f"two pruning callbacks write into {name}.dir: .*out"):
        hf_trainer(
            tiny_llama(), tmp_path, [PruningCallback(some(ATTENTION, **folder)), PruningCallback(some(FFN, **folder))]
        )


def test_recovery_stands_alone() -> None:
    recovery = PruningRun({"recover": {"retrain": ["norms"]}, "export": {"dir": "unused"}})
    with pytest.raises(ValueError, match="changes what is trained, so it stands alone"):
        check_beside(PruningRun(some(FFN)), [recovery])
    with pytest.raises(ValueError, match="changes what is trained, so it stands alone"):
        check_beside(recovery, [PruningRun(some(FFN))])
    check_beside(recovery, [])


def test_callbacks_that_came_later_are_checked_when_training_starts(tmp_path: Path) -> None:
    trainer = hf_trainer(tiny_llama(), tmp_path, [])
    for include in (ATTENTION, FFN):
        trainer.add_callback(PruningCallback(some(include, export={"dir": str(tmp_path / "out")})))
    with pytest.raises(ValueError, match=r"two pruning callbacks write into export\.dir"):
        trainer.train()
