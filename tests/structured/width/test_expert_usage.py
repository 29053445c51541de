"""Experts are rated by the tokens that are sent to them; counts are worked by hand from the routers' weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import GreedyOutput
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.width.expert_usage import expert_usage
from lightning_prune.structured.width.method import Width
from tests.structured.discovery.test_routing import mixture


def batches(num: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(3, 64, (num, 2, 12), generator=generator)
    mask_T = torch.arange(12) >= 4
    return [{"input_ids": ids, "attention_mask": mask_T.expand(2, 12).long()} for ids in ids_NT]


@torch.no_grad()
def counted(model: Any, layer: int) -> Tensor:
    """Return how many tokens that are no padding each expert of a layer gets, from the router's own output."""
    picked: list[Tensor] = []
    gate = model.model.layers[layer].mlp.gate
    handle = gate.register_forward_hook(lambda module, args, output: picked.append(output[2]))
    for batch in batches():
        model(**batch)
    handle.remove()
    real = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches()])
    return torch.bincount(torch.cat(picked)[real].flatten(), minlength=8)


def test_tokens_are_counted_without_padding() -> None:
    model = mixture("qwen3_moe")
    groups = discover(model, kinds=("experts",)).of_kind("experts")

    def run() -> None:
        for batch in batches():
            model(**batch)

    found = expert_usage(model, model, groups, run)
    for layer, group in enumerate(groups):
        assert found[group.key].tolist() == counted(model, layer).tolist()
        assert int(found[group.key].sum()) == 2 * 2 * 8 * 3  # batches, sequences, tokens, chosen
    with pytest.raises(ValueError, match=r"no token was seen to be sent to an expert of model\.layers\.0\.mlp:experts"):
        expert_usage(model, model, groups, lambda: None)


def test_by_default_the_experts_with_the_most_tokens_stay() -> None:
    model = mixture("qwen3_moe")
    structure = discover(model, kinds=("experts",))
    plan = Width(sparsity={"experts": 0.625}).plan(model, structure, batches(), progress=False)
    first, second = (cut.keep for cut in plan.cuts)
    best, whole = (counted(model, layer).argsort(descending=True, stable=True)[:3] for layer in (0, 1))
    assert first == tuple(sorted(best.tolist()))
    assert plan.method["experts"] == "tokens sent to each"
    small = shrink(model, plan, structure=structure)
    # the second layer is rated as it is used once the first layer's experts are gone
    reference = mixture("qwen3_moe")
    router = reference.model.layers[0].mlp.gate
    rows = torch.full((8,), -torch.inf).index_fill(0, torch.tensor(first), 0)
    linear = torch.nn.functional.linear

    def without(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = linear(input, weight, bias)
        return output + rows if weight is router.weight else output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", without)
        best = counted(reference, 1).argsort(descending=True, stable=True)[:3]
    assert second == tuple(sorted(best.tolist())) != tuple(sorted(whole.tolist()))
    assert small.config.num_experts == 3


def test_a_scorer_of_weights_rates_all_that_an_expert_holds() -> None:
    model = mixture("qwen3_moe")
    structure = discover(model, kinds=("experts",))
    plan = Width(sparsity={"experts": 0.5}, scorer=Magnitude()).plan(model, structure, [], progress=False)
    mlp = model.model.layers[0].mlp
    sums = mlp.gate.weight.abs().sum(1) + sum(
        weight.abs().sum((1, 2)) for weight in (mlp.experts.gate_up_proj, mlp.experts.down_proj)
    )
    assert plan.cuts[0].keep == tuple(sorted(sums.topk(4).indices.tolist()))


def test_experts_and_other_units_go_together() -> None:
    model = mixture("qwen3_moe")
    structure = discover(model, kinds=("experts", "kv_groups"))
    method = Width(sparsity={"experts": 0.25, "kv_groups": 0.5}, compensate="none")
    assert method.needs_batches
    plan = method.plan(model, structure, batches(), progress=False)
    small = shrink(model, plan, structure=structure)
    assert (small.config.num_experts, small.config.num_key_value_heads) == (6, 1)


def test_nothing_that_reads_experts_can_be_chosen_by() -> None:
    with pytest.raises(ValueError, match="GreedyOutput rates the columns of output projections, and nothing reads ex"):
        Width(sparsity={"experts": 0.5}, scorer=GreedyOutput())
    assert not Width(sparsity={"experts": 0.5}).repairs
    assert Width(sparsity={"experts": 0.5, "ffn": 0.25}, scorer=Wanda()).repairs
