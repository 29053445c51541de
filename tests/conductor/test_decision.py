"""Decisions over several targets: exact counts per scope, what is pruned stays pruned, options that cannot matter."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_prune import NM, Block, Targets, Unstructured
from lightning_prune.allocations.erdos_renyi import ErdosRenyi
from lightning_prune.allocations.global_rank import GlobalRank
from lightning_prune.allocations.owl import OWL
from lightning_prune.allocations.uniform import Uniform
from lightning_prune.base.types import Allocation, Granularity, Scope, Scorer
from lightning_prune.conductor.decision import Decision, check_combination
from lightning_prune.scorers.gradient import Gradient
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.wanda import Wanda

SINGLE = Unstructured()
UNIFORM = Uniform()
MAGNITUDE = Magnitude()


def decision(
    model: nn.Module,
    *,
    scorer: Scorer = MAGNITUDE,
    granularity: Granularity = SINGLE,
    allocation: Allocation = UNIFORM,
    held: Mapping[str, Tensor] | None = None,
    stats: Mapping[str, Tensor] | None = None,
) -> Decision:
    return Decision(
        bindings=Targets(include=("*weight",)).resolve(model),
        scorer=scorer,
        granularity=granularity,
        allocation=allocation,
        held=held or {},
        read=lambda binding, whole: {} if stats is None else stats,
        step=0,
        seed=0,
    )


def decide(made: Decision, sparsity: float) -> dict[str, Tensor]:
    return {binding.name: mask for binding, mask in made.decide(made.budgets(sparsity))}


def model_of(*weights: Tensor) -> nn.ModuleDict:
    """Return linear layers called a, b, ... with these weights."""
    layers = {}
    for name, weight in zip("abcdef", weights, strict=False):
        layers[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layers[name].weight = nn.Parameter(weight.clone())
    return nn.ModuleDict(layers)


def lowest_pruned(score: Tensor, num_pruned: int) -> Tensor:
    """Return the mask that prunes the `num_pruned` lowest of a tensor, ties from the highest index."""
    flat = score.double().numpy().reshape(-1)
    order = np.argsort(-flat, kind="stable")
    keep = np.ones(flat.size, dtype=bool)
    keep[order[flat.size - num_pruned :]] = False
    return torch.from_numpy(keep).reshape(score.shape)


@pytest.fixture
def two() -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(0)
    return model_of(torch.randn(10, 10, generator=generator), 3 * torch.randn(5, 20, generator=generator))


def test_rows_by_hand() -> None:
    model = model_of(torch.tensor([[1.0, -4.0, 3.0, -2.0], [0.5, 0.5, -0.5, 0.5]]))
    masks = decide(decision(model, scorer=Magnitude(scope="row")), 0.5)
    assert masks["a.weight"].int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.57, 0.99])
def test_every_tensor_prunes_exactly_its_share(two: nn.ModuleDict, sparsity: float) -> None:
    masks = decide(decision(two), sparsity)
    for name, mask in masks.items():
        expected = lowest_pruned(two.get_parameter(name).detach().abs(), round(100 * sparsity))
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.99])
def test_all_targets_together_prune_exactly_their_share(two: nn.ModuleDict, sparsity: float) -> None:
    masks = decide(decision(two, scorer=Magnitude(scope="global")), sparsity)
    both = torch.cat([two["a"].weight.detach().abs().reshape(-1), two["b"].weight.detach().abs().reshape(-1)])
    expected = lowest_pruned(both, round(200 * sparsity))
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks.values()]), expected)
    assert int((~masks["a.weight"]).sum()) > int((~masks["b.weight"]).sum())  # b is three times as large


def test_ties_over_all_targets_go_to_the_first() -> None:
    model = model_of(torch.ones(2, 4), torch.ones(2, 4))
    masks = decide(decision(model, scorer=Magnitude(scope="global")), 0.375)
    assert masks["a.weight"].all()
    assert masks["b.weight"].int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_blocks_keep_whole_rectangles() -> None:
    weight = torch.ones(4, 6)
    weight[:2, 3:] = 5
    weight[2:, :3] = -3
    masks = decide(decision(model_of(weight), granularity=Block(rows=2, cols=3)), 0.5)
    assert masks["a.weight"].int().tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[1, 1, 1, 0, 0, 0]] * 2
    rows = decide(decision(model_of(weight), granularity=Block(rows=2, cols=1), scorer=Magnitude(scope="row")), 0.5)
    assert torch.equal(rows["a.weight"], masks["a.weight"])


def test_n_of_m_runs_along_the_inputs_of_a_transposed_layer() -> None:
    model = nn.ModuleDict({"c": Conv1D(3, 8)})  # stored (inputs, outputs)
    (mask,) = decide(decision(model, granularity=NM(n=2, m=4)), 0.5).values()
    assert mask.shape == (8, 3)
    assert (mask.reshape(2, 4, 3).sum(1) == 2).all()
    top = model["c"].weight.detach().abs().reshape(2, 4, 3).topk(2, dim=1).indices
    assert mask.reshape(2, 4, 3).gather(1, top).all()


def test_masks_have_the_shape_of_their_parameter() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(2, 4, 3), "b": nn.Linear(4, 4)})
    masks = decide(decision(model), 0.5)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"a.weight": (4, 2, 3, 3), "b.weight": (4, 4)}
    assert all(mask.dtype == torch.bool for mask in masks.values())


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_what_is_pruned_stays_pruned(two: nn.ModuleDict, scope: Scope) -> None:
    # The held masks prune the largest weights, which magnitude alone would bring back.
    held = {name: ~lowest_pruned(two.get_parameter(name).detach().abs(), 70) for name in ("a.weight", "b.weight")}
    masks = decide(decision(two, scorer=Magnitude(scope=scope), held=held), 0.9)
    assert sum(int(mask.sum()) for mask in masks.values()) == 20
    assert not any((masks[name] & ~held[name]).any() for name in held)


def test_pruned_weights_come_back_under_a_scorer_with_dense_gradients() -> None:
    model = model_of(torch.ones(1, 4))
    held = {"a.weight": torch.tensor([[True, True, False, False]])}
    stats = {"grad_magnitude": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    masks = decide(decision(model, scorer=Gradient(), held=held, stats=stats), 0.5)
    assert masks["a.weight"].int().tolist() == [[0, 0, 1, 1]]


def test_changing_weights_between_masks_does_not_matter(two: nn.ModuleDict) -> None:
    expected = decide(decision(two, scorer=Magnitude(scope="global")), 0.5)
    made = decision(two, scorer=Magnitude(scope="global"))
    for binding, mask in made.decide(made.budgets(0.5)):
        assert torch.equal(mask, expected[binding.name])
        binding.parameter.data.masked_fill_(~mask, 0)


def test_sizes_are_those_of_whole_targets(two: nn.ModuleDict) -> None:
    made = decision(two, granularity=Block(rows=5, cols=2))
    assert made.names == ["a.weight", "b.weight"]
    assert [made.shape(name) for name in made.names] == [(10, 10), (5, 20)]
    assert [made.num_weights(name) for name in made.names] == [100, 100]
    assert [made.num_units(name) for name in made.names] == [10, 10]
    counts = torch.tensor([1, 2])
    assert torch.equal(made.sum("a.weight", counts), counts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_weight_stops_the_decision(two: nn.ModuleDict, value: float) -> None:
    with torch.no_grad():
        two["b"].weight[3, 3] = value
    with pytest.raises(ValueError, match=r"scores of b\.weight contain NaN or infinity"):
        decide(decision(two), 0.5)


@pytest.mark.parametrize("allocation", [ErdosRenyi(), GlobalRank(), OWL()])
def test_allocations_that_would_have_no_effect_are_refused(allocation: Allocation) -> None:
    name = type(allocation).__name__
    with pytest.raises(ValueError, match=rf"allocation {name} has no effect under scope: global.*use scope: tensor"):
        check_combination(Magnitude(scope="global"), allocation, Unstructured())
    with pytest.raises(ValueError, match=rf"allocation {name} cannot be used with NM.*use Uniform"):
        check_combination(Wanda(), allocation, NM())
    check_combination(Magnitude(), allocation, Block())
    check_combination(Wanda(), allocation, Unstructured())


def test_uniform_goes_with_everything_but_global_n_of_m() -> None:
    for granularity in (Unstructured(), Block()):
        for scope in ("row", "tensor", "global"):
            check_combination(Magnitude(scope=scope), Uniform(), granularity)
    check_combination(Wanda(), Uniform(), NM())
    with pytest.raises(ValueError, match="scope: global has no effect under N:M"):
        check_combination(Magnitude(scope="global"), Uniform(), NM())
