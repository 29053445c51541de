"""Hold the zeros that a model comes with."""

import pytest
import torch
from torch import nn

from lightning_prune import Existing, Once, Sparsifier
from tests.loops import batches
from tests.tiny_models import tiny_llama


def pruned() -> nn.Module:
    model = tiny_llama()
    Sparsifier(schedule=Once(sparsity=0.5)).prune_once(model, progress=False)
    return model


def train(model: nn.Module, sparsifier: Sparsifier, *, num_steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sparsifier.attach(model, [optimizer], total_steps=num_steps)
    for input_ids in batches()[:num_steps]:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.detach()


def test_zeros_stay_through_momentum_and_weight_decay() -> None:
    model = pruned()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sparsifier = Sparsifier(schedule=Existing())
    train(model, sparsifier)
    after = dict(model.named_parameters())
    assert len(sparsifier.masks) == 14
    for name, keep in sparsifier.masks.items():
        assert torch.equal(keep, before[name] != 0)
        assert torch.equal(after[name] != 0, keep)
        assert not torch.equal(after[name], before[name])
    assert sparsifier.report().sparsity == pytest.approx(0.5)
    assert sparsifier.report().notes == ()


def test_chance_zeros_are_no_mask() -> None:
    model = pruned()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight.fill_(1.0)
        weight.view(-1)[: weight.numel() // 100 - 1] = 0.0
    sparsifier = Sparsifier(schedule=Existing())
    train(model, sparsifier)
    assert name not in sparsifier.masks
    assert len(sparsifier.masks) == 13


def test_a_dense_model_is_refused_unless_allowed() -> None:
    with pytest.raises(ValueError, match=r"none of its 14 targets is sparse; prune it first"):
        train(tiny_llama(), Sparsifier(schedule=Existing()))
    sparsifier = Sparsifier(schedule=Existing(allow_dense=True))
    train(tiny_llama(), sparsifier)
    assert not sparsifier.masks


def test_a_resume_holds_the_masks_that_were_saved_and_not_those_of_the_moment() -> None:
    model = pruned()
    sparsifier = Sparsifier(schedule=Existing())
    train(model, sparsifier)
    state = sparsifier.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    row, column = sparsifier.masks[name].nonzero()[0].tolist()
    with torch.no_grad():
        model.get_parameter(name)[row, column] = 0.0
    again = Sparsifier(schedule=Existing())
    again.load_state_dict(state)
    train(model, again)
    assert again.masks[name][row, column]
    assert all(torch.equal(again.masks[key], keep) for key, keep in sparsifier.masks.items())


def test_pruning_once_takes_the_zeros_too() -> None:
    sparsifier = Sparsifier(schedule=Existing())
    assert sparsifier.prune_once(pruned(), progress=False).sparsity == pytest.approx(0.5)
    with pytest.raises(ValueError, match="is sparse; prune it first"):
        Sparsifier(schedule=Existing()).prune_once(tiny_llama(), progress=False)
