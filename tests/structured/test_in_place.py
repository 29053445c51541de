"""Cutting a model in the middle of a training: parameters, optimizers, hooks, several processes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.base import distributed
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.in_place import cut_in_place
from lightning_prune.structured.shrink import shrink
from tests.processes import Processes
from tests.structured.families import build, randomised
from tests.tiny_models import tiny_llama, token_windows


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids_NT: Tensor, num_steps: int) -> None:
    model.eval()  # without dropout, whose random numbers depend on shapes
    for _ in range(num_steps):
        model(input_ids=ids_NT, labels=ids_NT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def half_ffn(model: nn.Module, layers: tuple[int, ...] | None = None) -> Plan:
    groups = discover(model).of_kind("ffn")
    return Plan(cuts=tuple(Cut(g.key, tuple(range(0, g.num_units, 2))) for g in groups), layers=layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_as_with_the_smaller_model_and_the_cut_moments(
    name: str, kind: type[torch.optim.Optimizer]
) -> None:
    model = randomised(build(name))
    ids_NT = token_windows(4, 9)
    options = {"lr": 1e-2} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    optimizer = kind(model.parameters(), **options)
    train(model, optimizer, ids_NT, 2)
    plan = half_ffn(model)
    by_hand = shrink(model, plan).train()
    state = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    block = model.get_submodule(discover(model).of_kind("ffn")[0].name)

    cut_in_place(model, plan, [optimizer])
    assert model.get_submodule(discover(model).of_kind("ffn")[0].name) is block
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    for n, p in model.named_parameters():
        for key, value in state[n].items():
            if isinstance(value, Tensor) and value.shape == shapes[n]:
                dim = next((d for d in range(value.ndim) if value.shape[d] != p.shape[d]), None)
                kept = value if dim is None else value.index_select(dim, torch.arange(0, value.shape[dim], 2))
                assert torch.equal(optimizer.state[p][key], kept)

    other = kind(by_hand.parameters(), **options)
    for (n, p), (_, q) in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        assert torch.equal(p, q), n
        other.state[q] = copy.deepcopy(optimizer.state[p])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, ids_NT, 2)
    train(by_hand, other, ids_NT, 2)
    for (n, p), (_, q) in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        assert torch.equal(p, q), n
        assert not torch.equal(p, before[n]), n


def test_removed_blocks_leave_model_optimizer_and_cache() -> None:
    model = tiny_llama(layers=4)
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 1e-3} for p in model.parameters()])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    ids_NT = token_windows(4, 9)
    train(model, optimizer, ids_NT, 1)
    scheduler.step()
    gone = [weight for layer in (1, 2) for weight in model.model.layers[layer].parameters()]
    cut_in_place(model, Plan(layers=(0, 3)), [optimizer])
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert not {id(p) for p in gone} & {id(p) for p in optimizer.state}
    train(model, optimizer, ids_NT, 1)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
    model.eval()
    assert model.generate(ids_NT[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_hooks_on_modules_survive() -> None:
    model = tiny_llama(layers=3)
    seen: list[int] = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    cut_in_place(model, half_ffn(model, layers=(0, 2)))
    model(input_ids=token_windows(1, 5))
    assert seen[-1] == 24


def test_state_that_cannot_be_cut_is_refused_before_anything_changes() -> None:
    model = tiny_llama()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    train(model, optimizer, token_windows(2, 6), 1)
    with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var' of .* not in the parameter's"):
        cut_in_place(model, half_ffn(model), [optimizer])
    assert model.config.intermediate_size == 48


def test_parameters_of_others_stay_in_the_optimizer_and_go_on_moving() -> None:
    model, other = tiny_llama(), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()], lr=1e-2)
    other(torch.ones(1, 3)).sum().backward()
    train(model, optimizer, token_windows(2, 6), 1)
    moments = copy.deepcopy(optimizer.state[other.weight])
    cut_in_place(model, half_ffn(model), [optimizer])
    stepped = optimizer.param_groups[0]["params"]
    assert [id(p) for p in stepped[-2:]] == [id(p) for p in other.parameters()]
    assert len(stepped) == len([*model.parameters()]) + 2
    assert all(torch.equal(optimizer.state[other.weight][key], value) for key, value in moments.items())
    before = other.weight.detach().clone()
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(other.weight, before)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_remembers_nothing_yet_has_nothing_to_carry(kind: type[torch.optim.Optimizer]) -> None:
    model = tiny_llama()
    optimizer = kind(model.parameters(), lr=1e-2)
    cut_in_place(model, half_ffn(model), [optimizer])
    assert len(optimizer.state) == 0
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    train(model, optimizer, token_windows(2, 6), 1)
    assert all(value.shape == p.shape for p, state in optimizer.state.items() for key, value in state.items()
               if isinstance(value, Tensor) and key != "step")  # fmt: skip


def train_after_a_cut() -> dict[str, Tensor]:
    rank = torch.distributed.get_rank()
    model = tiny_llama(layers=3)
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_NT = token_windows(4, 9, seed=rank)
    train(wrapper, optimizer, ids_NT, 2)
    cut_in_place(model, half_ffn(model, layers=(0, 2)), [optimizer], wrapper=wrapper)
    train(wrapper, optimizer, ids_NT, 3)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
def test_ranks_stay_together_after_a_cut() -> None:
    with Processes() as processes:
        first, second = processes.run(train_after_a_cut)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["model.layers.0.mlp.down_proj.weight"].shape == (32, 24)


def test_other_wrappers_are_refused() -> None:
    with pytest.raises(ValueError, match="DataParallel cannot follow"):
        distributed.rebuild(nn.DataParallel(nn.Linear(2, 2)))
