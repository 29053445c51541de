"""Evaluations during a training come when they are due, each once."""

from typing import Any

import pytest
from torch import nn

from lightning_prune.integrations.runs.pruning_run import PruningRun
from tests.loops import NUM_STEPS, adamw, recipe, train
from tests.tiny_models import tiny_llama


class Harness:
    """Stands for lm-eval; its result is the number of evaluations so far."""

    def __init__(self) -> None:
        self.num_calls = 0

    def check_tasks(self, tasks: list[str], include_path: str | None) -> None:
        assert tasks == ["fox"]

    def evaluate_model(self, model: nn.Module, tokenizer: object, **options: object) -> dict[str, dict[str, float]]:
        self.num_calls += 1
        return {"fox": {"acc": float(self.num_calls)}}


@pytest.mark.parametrize(("every", "at"), [(1, []), (5, ["end"])])
def test_it_is_evaluated_at_every_step_that_is_due(every: int, at: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    monkeypatch.setattr(PruningRun, "_harness", lambda self: harness)
    run = PruningRun(recipe() | {"evaluate": {"tasks": ["fox"], "every": every, "at": at}})
    model, logged = tiny_llama(), []
    optimizer = adamw(model)
    tokenizer: Any = object()
    run.start(model, [optimizer], total_steps=NUM_STEPS, tokenizer=tokenizer, log=logged.append)

    def after_step(step: int) -> None:
        run.after_step()
        run.after_step()  # a trainer may tell of one step twice

    train(model, optimizer, after_step=after_step)
    run.finish()
    due = list(range(every, NUM_STEPS + 1, every))
    labels = [f"step {step}" for step in due] + ["after"] * len(at)
    assert [entry["label"] for entry in run.evaluations] == labels
    assert [m["prune/fox/acc"] for m in logged if "prune/fox/acc" in m] == [float(n + 1) for n in range(len(labels))]
