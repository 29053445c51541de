"""Weights of low rank: exact on hand-made matrices, the identity at full rank, and a search that leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structured.width.low_rank import (
    RankEdit,
    factors,
    rank_of,
    reduce_rank_,
    search_rank,
    trial_table,
)
from tests.structured.depth_models import sampled, stories3m
from tests.structured.width_models import calibration, family
from tests.tiny_models import needs_stacked_experts, tiny_family

DOWN = "*.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("share", "full_rank", "rank"), [(1, 192, 192), (0.5, 192, 96), (0.1, 192, 19), (0.01, 192, 1), (0.3, 10, 3)]
)
def test_the_share_is_rounded_down_to_at_least_one(share: float, full_rank: int, rank: int) -> None:
    assert rank_of(share, full_rank) == rank


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_shares_outside_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got"):
        rank_of(share, 10)


def test_the_largest_singular_value_stays() -> None:
    # diag(3, 1) turned: 3 along (1, 1), 1 along (1, -1)
    weight_OI = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    left, right = factors(weight_OI, 1)
    torch.testing.assert_close((left @ right).float(), torch.tensor([[1.5, 1.5], [1.5, 1.5]]))


def test_outputs_decide_where_inputs_are_known() -> None:
    # the second input is large, so the small weight that reads it stays
    weight_OI, gram_II = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 100.0]))
    left, right = factors(weight_OI, 1, gram_II)
    torch.testing.assert_close((left @ right).float(), torch.diag(torch.tensor([0.0, 1.0])))
    left, right = factors(weight_OI, 1)
    torch.testing.assert_close((left @ right).float(), torch.diag(torch.tensor([2.0, 0.0])))


def test_no_other_weight_of_the_rank_gives_closer_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    input_TI = torch.randn(50, 8, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 8)
    output_TO = input_TI @ weight_OI.T
    left, right = factors(weight_OI, 3, input_TI.T @ input_TI)
    got = (output_TO - input_TI @ (left @ right).T).norm()
    best = torch.linalg.svdvals(output_TO)[3:].norm()  # Eckart and Young, on the outputs themselves
    assert float(got) == pytest.approx(float(best), rel=1e-6)


def test_a_share_of_one_changes_no_bit() -> None:
    model = family("llama")
    before = copy.deepcopy(model.state_dict())
    for basis in ("svd", "output"):
        reports = reduce_rank_(
            model, [RankEdit(weights=DOWN, share=1)], basis=basis, batches=calibration(), progress=False
        )
        assert [(report.rank, report.weight_error, report.output_error) for report in reports] == [(32, 0, 0)] * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("basis", ["svd", "output"])
def test_only_the_named_weight_loses_rank_and_errors_are_told(basis: Any) -> None:
    model = family("llama")
    before = copy.deepcopy(model.state_dict())
    inputs: list[Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        for batch in calibration():
            model(**batch)
    handle.remove()
    edits = [RankEdit(weights=DOWN, share=0.25, layer=1)]
    (report,) = reduce_rank_(model, edits, basis=basis, batches=calibration(), progress=False)
    name = "model.layers.1.mlp.down_proj.weight"
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {report.name} == {name}
    new, old = model.state_dict()[name], before[name]
    assert int(torch.linalg.matrix_rank(new, rtol=1e-5)) == report.rank == 8
    assert (report.full_rank, report.num_parameters, report.num_factor_parameters) == (32, 32 * 48, 8 * 80)
    z_TI = torch.cat([part.reshape(-1, 48) for part in inputs])
    output_error = float((z_TI @ (new - old).T).norm() / (z_TI @ old.T).norm())
    assert report.output_error == pytest.approx(output_error, rel=1e-4)
    assert report.weight_error == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)


def test_each_basis_is_best_by_its_own_measure() -> None:
    found = {}
    for basis in ("svd", "output"):
        found[basis] = reduce_rank_(
            family("llama"),
            [RankEdit(weights=DOWN, share=0.5)],
            basis=basis,  # type: ignore[arg-type]
            batches=calibration(),
            progress=False,
        )
    for by_weight, by_output in zip(found["svd"], found["output"], strict=True):
        assert by_weight.weight_error < by_output.weight_error
        assert by_output.output_error < by_weight.output_error  # type: ignore[operator]


@needs_stacked_experts
def test_transposed_weights_and_stacked_experts() -> None:
    gpt2 = tiny_family("gpt2").eval()
    weight_IO = gpt2.transformer.h[0].mlp.c_fc.weight.detach().clone()
    edits = [RankEdit(weights="*.mlp.c_fc.weight", share=0.5, layer=0)]
    reduce_rank_(gpt2, edits, basis="output", batches=calibration(), progress=False)
    new_IO = gpt2.transformer.h[0].mlp.c_fc.weight
    assert new_IO.shape == weight_IO.shape
    assert int(torch.linalg.matrix_rank(new_IO, rtol=1e-5)) == 16
    moe = tiny_family("qwen3_moe")
    edits = [RankEdit(weights="*.experts.down_proj", share=0.25, layer=1)]
    (report,) = reduce_rank_(moe, edits, progress=False)
    experts = moe.model.layers[1].mlp.experts.down_proj
    assert torch.linalg.matrix_rank(experts, rtol=1e-5).tolist() == [4] * 4
    assert (report.rank, report.full_rank, report.num_parameters) == (4, 16, 4 * 32 * 16)
    with pytest.raises(ValueError, match="belongs to no linear layer, whose inputs could be seen; use basis='svd'"):
        reduce_rank_(moe, edits, basis="output", batches=calibration(), progress=False)


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        ([], {}, "no edit was given"),
        ([RankEdit(weights="*.mlp.c_proj.weight", share=0.5)], {}, "matches no weight; names look like"),
        ([RankEdit(weights=DOWN, share=0.5, layer=2)], {}, "matches no weight of block 2; the model has blocks 0 to 1"),
        ([RankEdit(weights=DOWN, share=2.0)], {}, r"share must be in \(0, 1\], got 2.0"),
        ([RankEdit(weights=DOWN, share=0.5)] * 2, {}, "is named by two edits"),
        ([RankEdit(weights=DOWN, share=0.5)], {"basis": "output"}, "outputs on calibration batches, got none"),
        ([RankEdit(weights=DOWN, share=0.5)], {"basis": "pca"}, "basis must be svd or output, got 'pca'"),
    ],
)
def test_wrong_edits_are_refused_before_anything_changes(edits: Any, options: Any, message: str) -> None:
    model = family("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        reduce_rank_(model, edits, progress=False, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def closeness(wanted: Tensor) -> Any:
    """Return an objective: how close the up projection of block 1 is to a matrix."""

    def objective(model: nn.Module) -> float:
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").detach()
        return -float((weight - wanted).norm())

    return objective


def test_a_search_finds_the_weight_and_the_rank_that_were_hidden_and_leaves_no_trace() -> None:
    # block 1's up projection is a matrix of rank 8 and small noise; taking the noise away is the best edit
    model = family("llama")
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(48, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    up = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        up.copy_(clean + 0.01 * torch.randn(48, 32, generator=generator))
    before = copy.deepcopy(model.state_dict())
    patterns = ["*.mlp.up_proj.weight", DOWN]
    trials = search_rank(model, closeness(clean), weights=patterns, shares=(0.5, 0.25, 0.125, 1.0))
    assert len(trials) == 2 * 2 * 4
    assert trials[0].edit == RankEdit(weights="*.mlp.up_proj.weight", share=0.25, layer=1)
    assert trials[0].reports[0].rank == 8
    assert trials[0].gain > 0
    assert {trial.gain for trial in trials if trial.edit.share == 1} == {0.0}
    assert [trial.objective for trial in trials] == sorted((trial.objective for trial in trials), reverse=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lines = trial_table(trials, limit=3).splitlines()
    assert lines[0].split() == ["layer", "weights", "share", "rank", "error", "objective", "gain"]
    assert len(lines) == 4
    assert lines[1].split()[:4] == ["1", "*.mlp.up_proj.weight", "0.25", "8/32"]
    reduce_rank_(model, [trials[0].edit], progress=False)
    assert closeness(clean)(model) == pytest.approx(trials[0].objective)


def test_a_search_that_fails_puts_the_weights_back() -> None:
    model = family("llama")
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []

    def failing(changed: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("evaluation failed")
        return 0.0

    with pytest.raises(RuntimeError, match="evaluation failed"):
        search_rank(model, failing, weights=[DOWN])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"matches no weight of the blocks \[5\]"):
        search_rank(model, failing, weights=[DOWN], layers=[5])
    with pytest.raises(ValueError, match="needs patterns of weights and shares"):
        search_rank(model, failing, weights=[])


@torch.no_grad()
def perplexity(model: Any, batches: list[dict[str, Tensor]]) -> float:
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.long
def test_perplexities_of_a_trained_model_are_the_measured_ones() -> None:
    # measured before by independent code, on other samples of the same model
    batches, test = sampled(stories3m(), 1), sampled(stories3m(), 2)
    expected = {("svd", 0.5): 37.6, ("output", 0.5): 9.17, ("svd", 0.25): 527, ("output", 0.25): 29.9}
    for (basis, share), value in expected.items():
        model = stories3m()
        edits = [RankEdit(weights=DOWN, share=share)]
        reduce_rank_(model, edits, basis=basis, batches=batches, progress=False)  # type: ignore[arg-type]
        assert perplexity(model, test) == pytest.approx(value, rel=0.1), (basis, share)
