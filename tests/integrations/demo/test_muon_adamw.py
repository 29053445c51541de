"""The combined optimizer equals torch's two, each on its own parameters."""

import pytest
import torch
from torch import nn

from lightning_prune.integrations.demo.muon_adamw import MuonAdamW, orthogonalize


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape)
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    core = left.T @ orthogonalize(update) @ right.T
    values = torch.diagonal(core)
    assert torch.allclose(core, torch.diag(values), atol=1e-4)
    assert values.min() > 0.5
    assert values.max() < 1.3


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    theirs = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_steps_equal_those_of_torch() -> None:
    ours, theirs = _pair()
    mine = MuonAdamW([ours[0].weight], [ours[0].bias, *ours[1].parameters()], lr=0.02, weight_decay=0.1)
    muon = torch.optim.Muon([theirs[0].weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs[0].bias, *theirs[1].parameters()], lr=0.02, weight_decay=0.0, betas=(0.9, 0.95))
    before = ours[0].weight.detach().clone()
    for number in range(6):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        for model, optimizers in ((ours, [mine]), (theirs, [muon, adamw])):
            model.zero_grad()
            # A loss whose gradient does not depend on the weights: torch's Muon rounds to bfloat16, and must not drift.
            (model[0].weight * inputs[:10]).sum().add((model[0].bias * inputs[0, :1]).sum()).backward()
            model(inputs.detach())[:, 0].sum().backward(inputs=[*model[1].parameters()])
            for optimizer in optimizers:
                optimizer.step()
    moved = (ours[0].weight - before).abs().mean()
    assert (ours[0].weight - theirs[0].weight).abs().max() < 0.05 * moved
    assert torch.allclose(ours[0].bias, theirs[0].bias, atol=1e-6)


def test_the_state_is_saved_and_loaded() -> None:
    def train(model: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
        for number in steps:
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=torch.Generator().manual_seed(number))).square().sum().backward()
            optimizer.step()

    def new(model: nn.Module) -> MuonAdamW:
        return MuonAdamW([model[0].weight, model[1].weight], [model[0].bias, model[1].bias], lr=0.02)

    whole, part = _pair()
    train(whole, new(whole), range(6))
    first = new(part)
    train(part, first, range(3))
    second = new(part)
    second.load_state_dict(first.state_dict())
    train(part, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_parameters_without_gradient_stay_and_a_closure_gives_its_loss() -> None:
    model, _ = _pair()
    optimizer = MuonAdamW([model[0].weight], [model[1].weight], lr=0.1)
    frozen = model[0].weight.detach().clone()

    def closure() -> float:
        loss = model[1].weight.square().sum()
        loss.backward()
        return float(loss.detach())

    expected = float(model[1].weight.detach().square().sum())
    assert optimizer.step(closure) == expected
    assert torch.equal(model[0].weight, frozen)
    assert float(model[1].weight.detach().square().sum()) < expected
