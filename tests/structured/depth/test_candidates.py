"""Candidates: what they switch off and how many parameters they count, by hand."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structured.depth.bypass import SubBlock
from lightning_prune.structured.depth.candidates import (
    block_candidates,
    choose_parts,
    is_state_space,
    part_candidates,
    unit_candidates,
    unit_magnitudes,
    unit_parameters,
    unit_runs,
)
from lightning_prune.structured.groups import Cut, Group, Member, zeroed
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import family_groups, llama_groups, padded_batches, tiny_model
from tests.tiny_models import needs_stacked_experts


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**padded_batches(1)[0], use_cache=False).logits


def test_block_candidates_count_all_parameters_of_the_block() -> None:
    model = tiny_model("llama")
    found = block_candidates(model, [1])
    assert [candidate.label for candidate in found] == ["block 1"]
    assert found[0].num_parameters == 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32


def test_parts_are_chosen_by_kind_and_block() -> None:
    model = tiny_model("llama")
    groups = llama_groups(model)
    assert choose_parts(model, groups, ("mlp",), [1]) == [SubBlock(1, "mlp")]
    assert len(choose_parts(model, groups, ("attention", "mlp"), [0, 1])) == 4
    heads = [group for group in groups if group.kind != "ffn"]
    with pytest.raises(ValueError, match="no group describes the mlp parts of the model"):
        choose_parts(model, heads, ("attention", "mlp"), [0])


def test_late_parts_wait() -> None:
    model = tiny_model("llama")
    parts = [SubBlock(0, "mlp"), SubBlock(1, "mlp")]
    found = part_candidates(model, llama_groups(model), parts, late=1, not_before=2)
    assert [candidate.not_before for candidate in found] == [2, 0]


def test_runs_are_taken_from_the_end_and_one_stays() -> None:
    assert unit_runs([3, 1, 0, 2], 1) == [(2,), (0,), (1,)]
    assert unit_runs([3, 1, 0, 2], 2) == [(0, 2)]
    assert unit_runs([4, 3, 1, 0, 2], 2) == [(0, 2), (3, 1)]
    assert unit_runs([0, 1], 2) == []
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        unit_runs([0], 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_runs_of_units_are_zeroed_together(family: str) -> None:
    model = tiny_model(family)
    group = next(group for group in family_groups(family, model) if group.kind == "ffn" and group.layer == 1)
    runs = unit_runs(list(range(group.num_units)), 7)
    candidates = unit_candidates(model, group, runs)
    assert candidates[0].after is None
    assert candidates[2].after == candidates[1].label == f"{group.key} 1"
    intact = logits(model)
    with ExitStack() as stack:
        for candidate in candidates[:3]:
            stack.enter_context(candidate.switch())
        stepwise = logits(model)
    cut = Cut(group.key, tuple(range(group.num_units - 21)))
    with zeroed(model, {group.key: group}, [cut]):
        assert torch.equal(logits(model), stepwise)
    assert not torch.equal(stepwise, intact)
    assert torch.equal(logits(model), intact)


@needs_stacked_experts
def test_parameters_of_a_unit_by_hand() -> None:
    llama = tiny_model("llama")
    kv, ffn = llama_groups(llama)[:2]
    assert unit_parameters(llama, kv) == 16 * 32 + 8 * 32 + 8 * 32 + 32 * 16
    assert unit_parameters(llama, ffn) == 3 * 32
    assert unit_candidates(llama, ffn, [(1, 2, 3)])[0].num_parameters == 9 * 32
    moe = tiny_model("qwen3_moe")
    path = "model.layers.0.mlp.experts"
    members = (
        Member(f"{path}.gate_up_proj", 1, ((0, 1), (16, 1)), "out", expert=2),
        Member(f"{path}.down_proj", 2, ((0, 1),), "in", expert=2),
    )
    group = Group(f"{path}.2", "ffn", 0, 16, members)
    assert unit_parameters(moe, group) == 3 * 32
    weight = dict(moe.named_parameters())[f"{path}.gate_up_proj"][2]
    assert torch.allclose(unit_magnitudes(moe, group), (weight[:16].abs() + weight[16:].abs()).sum(1))


def test_magnitude_of_key_value_groups_repeats_keys_and_values() -> None:
    model = tiny_model("llama")
    group = llama_groups(model)[0]
    attention = model.model.layers[0].self_attn
    q = attention.q_proj.weight.abs().sum(1).reshape(2, 16).sum(1)  # two heads of 8 rows per group
    k = attention.k_proj.weight.abs().sum(1).reshape(2, 8).sum(1)
    v = attention.v_proj.weight.abs().sum(1).reshape(2, 8).sum(1)
    assert torch.allclose(unit_magnitudes(model, group), q + 2 * k + 2 * v)
    reader = Group("x", "ffn", 0, 48, (Member("model.layers.0.mlp.down_proj.weight", 1, ((0, 1),), "in"),))
    with pytest.raises(ValueError, match="x:ffn has no weight whose outputs are its units"):
        unit_magnitudes(model, reader)


def test_state_space_blocks_are_known() -> None:
    assert all(is_state_space(block) for block in find_blocks(tiny_model("mamba")))
    assert not any(is_state_space(block) for block in find_blocks(tiny_model("llama")))
