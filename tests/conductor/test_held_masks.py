"""Masks hold after every step of whatever steps a target, also one that was frozen, added or named by no one before."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import Existing, Once, Sparsifier, Targets
from lightning_prune.scorers.gradient import Gradient
from lightning_prune.scorers.taylor import Taylor
from tests.conductor.test_optimizer_steps import Lookahead, Rescaled, SharpnessAware
from tests.loops import NUM_STEPS, adamw, assert_same_masks, assert_same_weights, batches, sparsifier, train
from tests.tiny_models import tiny_llama, tiny_mlp

PRUNED = Once(sparsity=0.5)
ALL = Targets(include=("*_proj.weight",))


def attached(model: nn.Module, *optimizers: Any, schedule: Any = PRUNED, **parts: Any) -> Sparsifier:
    conductor = Sparsifier(schedule=schedule, **parts)
    conductor.attach(model, optimizers, total_steps=NUM_STEPS)
    return conductor


def backward(model: Any, index: int = 0) -> Any:
    ids_BT = batches()[index]
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    return loss


def test_an_optimizer_that_no_one_named_leaves_every_zero() -> None:
    model = tiny_llama()
    named = adamw(model.model.layers[0])
    conductor = attached(model, named)
    other = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    weight = model.model.layers[1].mlp.up_proj.weight
    before = weight.detach().clone()
    for optimizer in (named, other):
        backward(model)
        with torch.no_grad():
            weight.add_(1e-3)  # something else that moves pruned weights
        optimizer.step()
        assert conductor.verify(model) == ()
        assert float(conductor.sparsity()) == 0.5
    assert not torch.equal(weight, before)
    assert conductor.step == 1, "the clock is the named one"


@pytest.mark.parametrize("is_new_optimizer", [False, True], ids=["added group", "second optimizer"])
def test_a_part_unfrozen_later_keeps_its_zeros_and_clips_without_them(is_new_optimizer: bool) -> None:
    model = tiny_llama()
    model.model.layers[1].requires_grad_(False)
    optimizer = adamw(model)
    conductor = attached(model, optimizer, targets=ALL)
    train(model, optimizer, last=2)
    model.model.layers[1].requires_grad_(True)
    unfrozen = list(model.model.layers[1].parameters())
    later = torch.optim.AdamW(unfrozen, lr=1e-2) if is_new_optimizer else optimizer
    if not is_new_optimizer:
        optimizer.add_param_group({"params": unfrozen})
    backward(model)
    later.step()
    weight, mask = model.model.layers[1].mlp.up_proj.weight, conductor.masks["model.layers.1.mlp.up_proj.weight"]
    assert conductor.verify(model) == ()
    assert not later.state[weight]["exp_avg"][~mask].any()
    assert later.state[weight]["exp_avg"][mask].any()
    backward(model)
    assert weight.grad is not None
    assert not weight.grad[~mask].any()


def test_regrowth_keeps_gradients_of_parts_unfrozen_later_too() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = attached(model, optimizer, schedule=Once(sparsity=0.5, at=1), scorer=Gradient())
    train(model, optimizer, last=2)
    backward(model)
    mask = conductor.masks["model.layers.1.mlp.up_proj.weight"]
    grad = model.model.layers[1].mlp.up_proj.weight.grad
    assert grad is not None
    assert grad[~mask].any()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sam": lambda params: SharpnessAware(params, lr=1e-2, weight_decay=0.1),
    "super().step()": lambda params: Rescaled(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_is_one_tick_also_where_steps_call_steps(name: str) -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    model = tiny_llama()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    conductor = attached(model, optimizer, schedule=Once(sparsity=0.5, at=2))
    for index in range(4):

        def closure(index: int = index) -> Any:
            optimizer.zero_grad()
            return backward(model, index)

        closure()
        optimizer.step(closure)
        assert conductor.step == index + 1
        assert conductor.verify(model) == ()
    assert float(conductor.sparsity()) == 0.5


def test_a_step_inside_another_optimizer_is_observed_once() -> None:
    seen = []
    for is_inner in (False, True):
        model = tiny_llama()
        optimizer = SharpnessAware(list(model.parameters()), lr=1e-2)
        given = optimizer.base_optimizer if is_inner else optimizer
        conductor = attached(model, given, schedule=Once(sparsity=0.5, at=4), scorer=Taylor())

        def closure(model: Any = model, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            return backward(model)

        for _ in range(2):
            optimizer.step(closure)
        seen.append(conductor.state_dict()["statistics"]["model.layers.0.mlp.up_proj.weight"])
    (outer,), (inner,) = (list(found.values()) for found in seen)
    assert outer.keys() == inner.keys()
    assert all(torch.equal(value, inner[key]) for key, value in outer.items())


def test_a_lookahead_that_hides_its_step_is_refused_and_leaves_nothing() -> None:
    model = tiny_llama()
    conductor = Sparsifier(schedule=PRUNED)
    with pytest.raises(ValueError, match="Lookahead steps an optimizer of its own"):
        conductor.attach(model, [Lookahead(adamw(model))], total_steps=NUM_STEPS)
    assert not conductor.is_attached
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.0


def test_after_letting_go_no_optimizer_is_watched() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = attached(model, optimizer)
    train(model, optimizer, last=1)
    conductor.detach()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), first=1, last=2)
    assert float(conductor.sparsity()) < 0.01
    assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters())


def test_one_weight_that_came_back_makes_it_another_model() -> None:
    model = tiny_llama()
    conductor = Sparsifier(schedule=PRUNED)
    conductor.prune_once(model)
    mask = conductor.masks["model.layers.1.mlp.up_proj.weight"]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[tuple((~mask).nonzero()[0])] = 1e-3
    with pytest.raises(ValueError, match="do not fit this model"):
        conductor.attach(model, [adamw(model)], total_steps=NUM_STEPS)


def test_masks_of_prune_once_are_refused_by_a_model_with_other_names() -> None:
    conductor = Sparsifier(schedule=PRUNED)
    conductor.prune_once(tiny_llama())
    with pytest.raises(ValueError, match="do not fit this model"):
        conductor.attach(model := tiny_mlp(), [adamw(model)], total_steps=NUM_STEPS)


def test_masks_of_prune_once_follow_the_model_into_a_wrapper() -> None:
    model = tiny_llama()
    conductor = Sparsifier(schedule=PRUNED)
    conductor.prune_once(model)
    held = {name: mask.clone() for name, mask in conductor.masks.items()}
    around = nn.ModuleDict({"student": model})
    optimizer = adamw(model)
    conductor.attach(around, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=2)
    assert conductor.verify(around) == ()
    assert float(conductor.sparsity()) == 0.5
    assert all(torch.equal(conductor.masks[f"student.{name}"], mask) for name, mask in held.items())


@pytest.mark.parametrize("other", [tiny_llama(layers=3), tiny_llama(seed=3)], ids=["shape", "weights"])
def test_another_model_is_pruned_anew(other: Any) -> None:
    first, second, alone = tiny_llama(), copy.deepcopy(other), copy.deepcopy(other)
    conductor = sparsifier()
    for model in (first, second):
        optimizer = adamw(model)
        conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
        train(model, optimizer)
        conductor.detach()
    fresh = sparsifier()
    optimizer = adamw(alone)
    fresh.attach(alone, [optimizer], total_steps=NUM_STEPS)
    train(alone, optimizer)
    assert_same_masks(conductor, fresh)
    assert_same_weights(second, alone)


def test_a_dense_model_has_no_zeros_to_hold() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="holds the zeros that the model has, but none of its 14 targets is sparse"):
        attached(model, adamw(model), schedule=Existing())


def test_averages_take_the_masks() -> None:
    model = tiny_llama()
    average = AveragedModel(model)
    optimizer = adamw(model)
    conductor = attached(model, optimizer)
    assert len(conductor.verify(average)) == 1
    assert conductor.apply_to(average) == len(conductor.masks)
    train(model, optimizer, last=2, after_step=lambda step: average.update_parameters(model))
    assert conductor.verify(average) == ()
    assert conductor.apply_to(nn.Linear(3, 3)) == 0


def test_an_average_inside_the_model_is_no_target_and_takes_the_masks() -> None:
    model = nn.ModuleDict({"net": tiny_llama()})
    model["mean"] = AveragedModel(model["net"])
    optimizer = adamw(model["net"])
    conductor = sparsifier()
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    net, mean = model["net"], model["mean"]
    train(net, optimizer, after_step=lambda step: mean.update_parameters(net))
    assert {name.split(".")[0] for name in conductor.masks} == {"net"}
    assert conductor.verify(mean) == conductor.verify(net) == ()
    conductor.detach()
    assert conductor.broken == ()
