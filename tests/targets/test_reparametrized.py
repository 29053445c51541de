"""Weights that are computed from other parameters are pruned by what comes out, or refused by name."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lightning_prune import Once, Sparsifier, Targets

OLD = "ignore:.*weight_norm.*deprecated.*:FutureWarning"
NORMS = {
    "old weight norm": (weight_norm, "weight_v"),
    "new weight norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "old spectral norm": (spectral_norm, "weight_orig"),
    "new spectral norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
}


def stack(norm: Callable[[nn.Module], nn.Module]) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(norm(nn.Linear(8, 8)) for _ in range(2))


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("name", NORMS)
def test_the_effective_weight_is_pruned_by_its_own_size(name: str) -> None:
    norm, tensor = NORMS[name]
    layers = stack(norm)
    if "weight" in name:
        for layer in layers:  # gains that turn the order of the directions around
            gain = layer.weight_g if "old" in name else layer.parametrizations.weight.original0
            gain.data.copy_(torch.linspace(1.0, 1.5, 8)[:, None])
    for layer in layers:
        layer.eval()(torch.ones(1, 8))
    dense = [layer.weight.detach().clone() for layer in layers]
    if "weight" in name:  # the effective weights do not rank as the directions do
        direction = layers[0].weight_v if "old" in name else layers[0].parametrizations.weight.original1
        assert dense[0].abs().flatten().argsort().tolist() != direction.abs().flatten().argsort().tolist()
    report = Sparsifier(schedule=Once(sparsity=0.5)).prune_once(layers, progress=False)
    assert [target.name for target in report.targets] == [f"{at}.{tensor}" for at in (0, 1)]
    for layer, weight in zip(layers, dense, strict=True):
        cut = weight.abs().flatten().sort().values[32]
        assert torch.equal(layer.weight != 0, weight.abs() >= cut)
        layer.train()(torch.ones(1, 8))
        assert torch.equal(layer.weight != 0, weight.abs() >= cut)


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("name", ["old weight norm", "new weight norm"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weights_that_a_weight_norm_keeps_stay_what_they_are(name: str, dim: int | None) -> None:
    layers = stack(lambda layer: NORMS[name][0](layer, dim=dim))
    for layer in layers:
        layer(torch.ones(1, 8))
    dense = [layer.weight.detach().clone() for layer in layers]
    Sparsifier(schedule=Once(sparsity=0.5)).prune_once(layers, progress=False)
    for layer, weight in zip(layers, dense, strict=True):
        layer(torch.ones(1, 8))
        torch.testing.assert_close(layer.weight, torch.where(layer.weight != 0, weight, 0.0))
        assert int((layer.weight == 0).sum()) == 32


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("name", ["old weight norm", "new weight norm"])
def test_a_norm_keeps_its_largest_weight(name: str) -> None:
    layers = stack(NORMS[name][0])
    gain = layers[0].weight_g if "old" in name else layers[0].parametrizations.weight.original0
    gain.data[:2] = 1e-4
    layers[0](torch.ones(1, 8))
    largest = layers[0].weight.abs().argmax(1)
    conductor = Sparsifier(schedule=Once(sparsity=0.5), targets=Targets(include=("0.*",)))
    conductor.prune_once(layers, progress=False)
    layers[0](torch.ones(1, 8))
    assert layers[0].weight.isfinite().all()
    kept = next(iter(conductor.masks.values()))
    assert kept.sum(1)[:2].tolist() == [1, 1]
    assert kept.float().argmax(1)[:2].tolist() == largest[:2].tolist()


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("name", NORMS)
def test_zeros_stay_while_it_trains(name: str) -> None:
    layers = stack(NORMS[name][0])
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.1)
    conductor = Sparsifier(schedule=Once(sparsity=0.5, at=1))
    conductor.attach(layers, [optimizer], total_steps=3)
    for _ in range(3):
        layers[1](layers[0](torch.rand(4, 8))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers:
        layer(torch.ones(1, 8))
        assert int((layer.weight == 0).sum()) == 32


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("name", ["old weight norm", "new weight norm"])
def test_gains_are_never_pruned_even_if_included(name: str) -> None:
    layers = stack(NORMS[name][0])
    found = Targets(include=("*",)).select(layers)
    assert {one.reason for one in found.left_out} == {"gain of a weight norm"}
    assert len(found.targets) == len(found.left_out) == 2


def test_other_parametrizations_are_refused_by_name() -> None:
    layers = stack(parametrizations.orthogonal)
    with pytest.raises(
        ValueError, match=r"target 0\.parametrizations.* is computed by Orthogonal, which need not keep"
    ):
        Targets().resolve(layers)
    twice = stack(lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)))
    with pytest.raises(ValueError, match="is computed by WeightNorm and SpectralNorm"):
        Targets().resolve(twice)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    assert len(Targets().resolve(layers)) == 2


def test_masks_of_torch_are_refused_by_name() -> None:
    layers = stack(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))
    with pytest.raises(ValueError, match=r"target 0\.weight_orig is masked by torch\.nn\.utils\.prune; make its zeros"):
        Targets().resolve(layers)
