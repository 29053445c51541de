"""The metric guard in a training: it holds, goes back, goes on, and comes back after a resume."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Sparsifier
from tests.loops import (
    NUM_STEPS,
    adamw,
    assert_same_masks,
    assert_same_weights,
    recipe,
    sparsifier,
    train,
    train_pruned,
)
from tests.tiny_models import tiny_llama


def guarded(action: str) -> dict[str, Any]:
    return recipe(guard={"metric": "val", "max": 1.0, "action": action})


def test_a_crossed_guard_holds_and_then_goes_on() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier(guarded("hold"))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    values = {4: 2.0, 10: 0.5}
    seen = {}

    def observe(step: int) -> None:
        conductor.observe({"val": values[step]} if step in values else {})
        seen[step] = conductor.report().sparsity

    train(model, optimizer, after_step=observe)
    conductor.detach()
    assert seen[9] == seen[4] == pytest.approx(0.352, abs=1e-3), "held from step 4 on"
    assert seen[11] == 0.5, "the missed change is made up for"
    assert [note.split(":")[0] for note in conductor.report().notes] == ["step 4", "step 10"]


def test_a_crossed_guard_goes_back_to_the_last_good_masks() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier(guarded("rollback"))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.model.layers[0].mlp.up_proj.weight
    good: dict[str, Tensor] = {}

    def observe(step: int) -> None:
        if step == 4:
            good["mask"], good["weight"] = conductor.masks[name].clone(), weight.detach().clone()
            conductor.observe({"val": 0.5})
        if step == 6:
            now = conductor.masks[name].clone()
            assert int(now.sum()) < int(good["mask"].sum())
            trained = weight.detach().clone()
            conductor.observe({"val": float("nan")})
            assert torch.equal(conductor.masks[name], good["mask"])
            returned = good["mask"] & ~now
            assert torch.equal(weight.detach()[returned], good["weight"][returned])
            assert torch.equal(weight.detach()[now], trained[now]), "kept weights stay as trained"

    train(model, optimizer, after_step=observe)
    conductor.detach()
    assert conductor.report().sparsity == pytest.approx(0.352, abs=1e-3)
    assert "goes back from sparsity 0.4815 to the masks of 0.3519" in conductor.report().notes[0]
    assert "not the promised 0.5" in conductor.report().notes[1]


def test_a_guarded_run_resumes_exactly() -> None:
    values = {4: 0.5, 6: 2.0, 9: 0.4}

    def run(stop: int | None) -> tuple[nn.Module, Sparsifier]:
        model = tiny_llama()
        optimizer = adamw(model)
        conductor = sparsifier(guarded("rollback"))
        conductor.attach(model, [optimizer], total_steps=NUM_STEPS)

        def observe(step: int) -> None:
            conductor.observe({"val": values[step]} if step in values else {})

        train(model, optimizer, last=stop or NUM_STEPS, after_step=observe)
        if stop is not None:
            state = conductor.state_dict()
            conductor.detach()
            conductor = sparsifier(guarded("rollback"))
            conductor.load_state_dict(state)
            conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
            train(model, optimizer, first=stop, after_step=observe)
        conductor.detach()
        return model, conductor

    model, conductor = run(None)
    for stop in (5, 7):
        resumed, second = run(stop)
        assert_same_weights(model, resumed)
        assert_same_masks(conductor, second)
        assert conductor.report() == second.report()
    assert conductor.report().sparsity == 0.5


def test_a_guard_that_is_never_fed_is_said_aloud() -> None:
    _, conductor = train_pruned(guarded("hold"))
    assert conductor.report().notes == ("the guarded metric 'val' was never logged, so the guard had no effect",)
