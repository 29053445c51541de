"""Shrinking while training, in a bare loop."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_prune.schedules import Linear
from lightning_prune.structured.gradual import GradualShrink, fit_to_shapes
from tests.tiny_models import tiny_family, tiny_llama, token_windows


def test_units_go_at_the_milestones_and_the_weakest_first() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shrink = GradualShrink(schedule=Linear(sparsity=0.5, start=2, end=6, interval=2))
    shrink.check(model, total_steps=8)
    ids_NT = token_windows(2, 8)
    widths = []
    for step in range(1, 9):
        model(input_ids=ids_NT, labels=ids_NT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mlp = model.model.layers[0].mlp
        strength = sum(
            w.abs().sum(d) for w, d in ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
        )
        was_cut = shrink.after_step(model, [optimizer], step=step, total_steps=8)
        width = model.config.intermediate_size
        widths.append(width)
        if was_cut:
            best = strength.argsort(descending=True)[:width].sort().values
            kept = (
                mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1) + mlp.down_proj.weight.abs().sum(0)
            )
            torch.testing.assert_close(kept, strength[best])
    # half of 48 units between steps 2 and 6, in equal steps
    assert widths == [48, 48, 48, 36, 36, 24, 24, 24]
    assert model.config.cut_from == {"intermediate_size": 48}


def test_a_checkpoint_remembers_what_it_was_cut_from(tmp_path: object) -> None:
    model = tiny_llama()
    shrink = GradualShrink(schedule=Linear(sparsity=0.5, start=0, end=4, interval=1))
    shrink.after_step(model, [], step=2, total_steps=4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.intermediate_size == 36
    shrink.after_step(loaded, [], step=4, total_steps=4)
    assert loaded.config.intermediate_size == 24  # half of 48, not of 36


def test_heads_leave_evenly() -> None:
    model = tiny_llama()  # 4 heads in 2 groups
    shrink = GradualShrink(schedule=Linear(sparsity=0.5, start=0, end=1, interval=1), kind="heads")
    assert shrink.after_step(model, [], step=1, total_steps=2)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)


def test_a_fresh_model_is_cut_to_the_shapes_of_a_checkpoint() -> None:
    small, fresh = tiny_llama(), tiny_llama(seed=1)
    GradualShrink(schedule=Linear(sparsity=0.5, start=0, end=4, interval=1)).after_step(
        small, [], step=4, total_steps=4
    )
    state = small.state_dict()
    fit_to_shapes(fresh, {name: tuple(tensor.shape) for name, tensor in state.items()}, "ffn")
    fresh.load_state_dict(state)
    assert fresh.config.cut_from == {"intermediate_size": 48}
    with pytest.raises(ValueError, match="which cutting ffn does not give"):
        fit_to_shapes(tiny_llama(), {**{n: tuple(t.shape) for n, t in state.items()}, "model.norm.weight": (7,)}, "ffn")


def test_what_cannot_be_cut_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="channels cannot be cut"):
        GradualShrink(schedule=Linear(sparsity=0.5, start=0, end=4), kind="channels").check(tiny_llama(), total_steps=4)


def test_a_sparsity_that_removes_nothing_is_refused_before_training() -> None:
    shrink = GradualShrink(schedule=Linear(sparsity=0.2, start=0, end=4), kind="heads")
    with pytest.raises(ValueError, match=r"0\.2 of heads removes nothing: the 4 .* steps of 2; give at least 0\.5"):
        shrink.check(tiny_llama(), total_steps=4)


def test_a_width_that_is_not_set_is_remembered_all_the_same(tmp_path: object) -> None:
    model = tiny_family("gpt2")  # n_inner is null and means 4 x 32
    shrink = GradualShrink(schedule=Linear(sparsity=0.5, start=0, end=4, interval=1))
    shrink.check(model, total_steps=4)
    assert shrink.after_step(model, [], step=2, total_steps=4)
    assert (model.config.n_inner, model.config.cut_from) == (96, {"n_inner": 128})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert shrink.after_step(loaded, [], step=4, total_steps=4)
    assert loaded.config.n_inner == 64


def test_sensitivity_cuts_the_least_sensitive_whole_units_and_keeps_the_moments_of_the_others() -> None:
    model, plain = tiny_llama(), tiny_llama()
    shrink = GradualShrink(schedule=Linear(sparsity=0.5, start=2, end=6, interval=2), score="sensitivity")
    ids_NT = token_windows(2, 8)
    runs = []
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        runs.append((one, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)))
    for step in range(1, 9):
        for one, optimizer, scheduler in runs:
            one(input_ids=ids_NT, labels=ids_NT).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        mlp, state = model.model.layers[0].mlp, runs[0][1].state
        by_row = ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
        sensitivity_U = sum((w.detach().abs() * state[w]["exp_avg_sq"].sqrt()).sum(dim) for w, dim in by_row)
        magnitude_U = sum(w.detach().abs().sum(dim) for w, dim in by_row)
        moments = {(dim, idx): state[w]["exp_avg"].clone() for idx, (w, dim) in enumerate(by_row)}
        if shrink.after_step(model, [runs[0][1]], step=step, total_steps=8):
            width = model.config.intermediate_size
            best = sensitivity_U.argsort(descending=True)[:width].sort().values
            assert not torch.equal(best, magnitude_U.argsort(descending=True)[:width].sort().values)
            for idx, (layer, dim) in enumerate(((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1))):
                was = moments[1 - dim, idx].index_select(dim, best)
                assert torch.equal(state[layer.weight]["exp_avg"], was)
        # one learning-rate curve: the user's scheduler goes on as if nothing were pruned
        assert runs[0][1].param_groups[0]["lr"] == runs[1][1].param_groups[0]["lr"]
    assert model.config.intermediate_size == 24


def test_sensitivity_refuses_an_optimizer_without_mean_squares_after_the_first_step() -> None:
    model, ids_NT = tiny_llama(), token_windows(2, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model(input_ids=ids_NT, labels=ids_NT).loss.backward()
    optimizer.step()
    shrink = GradualShrink(schedule=Linear(sparsity=0.5, start=4, end=6), score="sensitivity")
    with pytest.raises(ValueError, match=r"which SGD does not keep as exp_avg_sq .*; train it with AdamW"):
        shrink.after_step(model, [optimizer], step=1, total_steps=8)
    with pytest.raises(ValueError, match="score must be one of magnitude, sensitivity, got 'loud'"):
        GradualShrink(schedule=Linear(sparsity=0.5, start=4, end=6), score="loud")  # type: ignore[arg-type]
