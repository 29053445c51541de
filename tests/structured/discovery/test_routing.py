"""How few experts a router can choose from, and that no bias brings a removed one back."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.shrink import masked, shrink
from tests.structured.families import SIZES, randomised

EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8},
    "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 1, "head_dim": 8,
                 "moe_intermediate_size": 16, "first_k_dense_replace": 0},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0,
                     "moe_layer_end_index": 1, "moe_layer_interval": 1},
}  # fmt: skip


def mixture(name: str, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | {"num_hidden_layers": 2} | EXPERTS[name] | sizes))
    model = randomised(AutoModelForCausalLM.from_config(config))
    for key, buffer in model.named_buffers():
        if "correction_bias" in key:
            buffer.copy_(torch.linspace(3, -3, buffer.numel()).reshape(buffer.shape))  # the first always win
    return model


def experts(model: PreTrainedModel) -> tuple[Any, list[Group]]:
    structure = discover(model, kinds=("experts",))
    return structure, structure.of_kind("experts")


def test_a_router_keeps_as_many_as_it_chooses() -> None:
    model = mixture("qwen3_moe")
    structure, groups = experts(model)
    assert {(group.min_units, group.num_parts) for group in groups} == {(3, 1)}
    with pytest.raises(
        ValueError,
        match=r"experts would keep 2 of 8 units, but its router sends every token to 3 of them \(num_experts_per_tok=3"
        r"\); at least 3 must stay, a sparsity of at most 0.625",
    ):
        shrink(model, Plan(cuts=tuple(Cut(group.key, (0, 5)) for group in groups)), structure=structure)
    small = shrink(model, Plan(cuts=tuple(Cut(group.key, (0, 5, 7)) for group in groups)), structure=structure)
    assert small.config.num_experts == 3
    assert small(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_experts_of_groups_that_are_chosen_first_stay_equally_many_in_each() -> None:
    model = mixture("glm4_moe", n_group=2, topk_group=1)
    structure, groups = experts(model)
    assert [(group.num_parts, group.min_units) for group in groups] == [(2, 4), (2, 4)]
    assert "from 1 of 2 equal groups (n_group=2, topk_group=1), so each needs 2" in groups[0].min_reason
    with pytest.raises(ValueError, match=r"equally many of its 4 units in each of its 2 parts, got \[3, 1\]; cut even"):
        shrink(model, Plan(cuts=tuple(Cut(group.key, (0, 1, 2, 5)) for group in groups)), structure=structure)
    small = shrink(model, Plan(cuts=tuple(Cut(group.key, (1, 3, 4, 6)) for group in groups)), structure=structure)
    assert small.config.n_routed_experts == 4


def test_the_chosen_groups_hold_as_many_as_are_chosen() -> None:
    _, groups = experts(mixture("glm4_moe", num_experts_per_tok=3, n_group=2, topk_group=1))
    assert [(group.num_parts, group.min_units) for group in groups] == [(2, 6), (2, 6)]  # three of the one group


def test_where_every_expert_of_a_group_is_chosen_none_can_go() -> None:
    structure = discover(mixture("glm4_moe"), kinds=("experts",))  # 2 in each of 4 groups, of which 1 is chosen
    with pytest.raises(ValueError, match=r"every token to 2 of them \(num_experts_per_tok=2\) from 1 of 4 equal gro"):
        structure.of_kind("experts")


@pytest.mark.parametrize("name", ["glm4_moe", "ernie4_5_moe"])
def test_correction_biases_do_not_bring_removed_experts_back(name: str) -> None:
    model = mixture(name) if name == "ernie4_5_moe" else mixture(name, n_group=1)
    structure, groups = experts(model)
    assert any("correction_bias" in member.name for member in groups[0].members)
    keep = tuple(range(groups[0].num_units // 2, groups[0].num_units))  # those that the biases are against
    plan = Plan(cuts=tuple(Cut(group.key, keep) for group in groups))
    inputs = probe_inputs(model)
    small = shrink(model, plan, structure=structure)
    with masked(model, structure, plan):
        torch.testing.assert_close(outputs(small, inputs), outputs(model, inputs), atol=1e-5, rtol=0)


def test_units_of_stacked_experts_stay_in_rows_of_sixteen_bytes() -> None:
    model = mixture("qwen3_moe", moe_intermediate_size=24)
    structure = discover(model, kinds=("ffn",))
    groups = structure.of_kind("ffn")
    assert {group.multiple_of for group in groups} == {8}
    plan = Plan(cuts=tuple(Cut(group.key, tuple(range(12))) for group in groups))
    with pytest.raises(ValueError, match=r"12 of 24 units; .* keep 8 or 16, or plan with multiple_of=8"):
        shrink(model, plan, structure=structure)
    with pytest.raises(ValueError, match=r"are as narrow as grouped matrix products .* run \(multiple_of=8\)"):
        discover(mixture("qwen3_moe", moe_intermediate_size=8), kinds=("ffn",)).of_kind("ffn")
