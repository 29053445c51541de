"""Budgets; counts of a tiny Llama worked by hand."""

import pytest
import torch
from torch import nn

from lightning_prune.structured.cost import Budget, num_flops, num_parameters, sparsity_within
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut
from lightning_prune.structured.width.budgets import uniform
from tests.tiny_models import tiny_llama


def test_counts_of_the_smaller_model() -> None:
    model = tiny_llama(layers=2)  # hidden 32, FFN 48, 4 heads of 8 in 2 groups, 64 tied tokens
    structure = discover(model)
    attention, norms = 32 * (32 + 16 + 16 + 32), 2 * 32
    dense = 64 * 32 + 2 * (attention + 3 * 32 * 48 + norms) + 32
    assert num_parameters(model, structure, ()) == dense == sum(p.numel() for p in model.parameters())
    half = [Cut(group.key, tuple(range(24))) for group in structure.of_kind("ffn")]
    assert num_parameters(model, structure, half) == dense - 2 * 3 * 32 * 24
    assert num_flops(model, structure, half) == 2 * (64 * 32 + 2 * (attention + 3 * 32 * 24))


def test_the_smallest_sparsity_within_a_budget() -> None:
    model = tiny_llama(layers=2)
    structure = discover(model)
    dense = num_parameters(model, structure, ())
    sparsity = sparsity_within(model, structure, ("ffn",), Budget(share=0.8))
    units = 48 - int(sparsity * 48 + 1e-6)
    assert dense - 2 * 3 * 32 * (48 - units) <= 0.8 * dense < dense - 2 * 3 * 32 * (48 - units - 1)
    by_eight = sparsity_within(model, structure, ("ffn",), Budget(share=0.8, of="flops"), multiple_of=8)
    kept = uniform(structure.of_kind("ffn")[0], by_eight, 8)

    def flops(width: int) -> int:
        return num_flops(model, structure, [Cut(g.key, tuple(range(width))) for g in structure.of_kind("ffn")])

    assert kept % 8 == 0
    assert flops(kept) <= 0.8 * num_flops(model, structure, ()) < flops(kept + 8)
    least = dense - 2 * 3 * 32 * 47  # one unit stays
    assert least / dense * dense == least
    assert (
        uniform(
            structure.of_kind("ffn")[0], sparsity_within(model, structure, ("ffn",), Budget(share=least / dense)), 1
        )
        == 1
    )
    with pytest.raises(ValueError, match=r"as far as possible leaves 0.* more than the budget of 0.1"):
        sparsity_within(model, structure, ("ffn",), Budget(share=0.1))


def test_latency_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by the width of every FFN that runs, and by far more the first time, leaves one answer."""
    model = tiny_llama(layers=2)
    structure = discover(model, kinds=("ffn",))
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    runs: list[int] = []

    def wait(module: nn.Module, *_: object) -> None:
        if isinstance(module, type(model.model.layers[0].mlp)):
            runs.append(module.up_proj.out_features)

    def clock() -> float:
        return float(sum(runs) + 1000 * len(set(runs)))

    monkeypatch.setattr("lightning_prune.structured.cost.time.perf_counter", clock)
    handle = nn.modules.module.register_module_forward_hook(wait)
    try:
        sparsity = sparsity_within(
            model, structure, ("ffn",), Budget(share=0.75, of="latency"), multiple_of=16, inputs=ids
        )
    finally:
        handle.remove()
    assert uniform(structure.of_kind("ffn")[0], sparsity, 16) == 32  # of 48: two thirds of the time
    assert runs.count(32) == 2 * 8  # two blocks, timed once: a first run and seven that count


@pytest.mark.parametrize(
    ("options", "message"), [({"share": 1.0}, r"\(0, 1\), got 1.0"), ({"share": 0.5, "of": "joules"}, "'joules'")]
)
def test_bad_budgets_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**options)
