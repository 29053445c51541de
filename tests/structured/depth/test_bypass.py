"""Bypassing against zeroed weights, and against models with fewer blocks."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.structured.depth.bypass import (
    SubBlock,
    block_input,
    bypassed,
    first_tensor,
    merge_parts,
    num_parameters,
    sub_blocks,
)
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Group, Member
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import FAMILIES, family_groups, padded_batches, shake, tiny_model
from tests.structured.families import build, randomised
from tests.tiny_models import STACKS_EXPERTS, tiny_llama

OUTPUTS = {
    ("llama", "attention"): ["self_attn.o_proj.weight"],
    ("llama", "mlp"): ["mlp.down_proj.weight"],
    ("gpt2", "attention"): ["attn.c_proj.weight", "attn.c_proj.bias"],
    ("gpt2", "mlp"): ["mlp.c_proj.weight", "mlp.c_proj.bias"],
    ("gpt_neox", "attention"): ["attention.dense.weight", "attention.dense.bias"],
    ("gpt_neox", "mlp"): ["mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"],
    ("qwen3_moe", "attention"): ["self_attn.o_proj.weight"],
    ("qwen3_moe", "mlp"): ["mlp.experts.down_proj"]
    if STACKS_EXPERTS
    else [f"mlp.experts.{expert}.down_proj.weight" for expert in range(4)],
    ("bloom", "attention"): ["self_attention.dense.weight", "self_attention.dense.bias"],
    ("bloom", "mlp"): ["mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"],
    ("opt", "attention"): ["self_attn.out_proj.weight", "self_attn.out_proj.bias"],
    ("opt", "mlp"): ["fc2.weight", "fc2.bias"],
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**padded_batches(1)[0], use_cache=False).logits


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bypassing_a_sub_block_equals_zeroing_its_output_projection(family: str, part: str) -> None:
    model = tiny_model(family)
    groups = family_groups(family, model)
    intact = logits(model)
    key = SubBlock(1, part)  # type: ignore[arg-type]
    with bypassed(model, groups, parts=[key]):
        changed = logits(model)
    zeroed = copy.deepcopy(model)
    parameters = dict(find_blocks(zeroed)[1].named_parameters())
    for name in OUTPUTS[family, part]:
        parameters[name].data.zero_()
    assert torch.equal(changed, logits(zeroed))
    assert (changed - intact).abs().max() > 0.01
    assert torch.equal(logits(model), intact)


@pytest.mark.parametrize("family", FAMILIES)
def test_bypassing_nothing_changes_no_bit_and_sets_no_hook(family: str) -> None:
    model = tiny_model(family)
    intact = logits(model)
    with bypassed(model, family_groups(family, model)):
        assert not any(module._forward_hooks for module in model.modules())
        assert torch.equal(logits(model), intact)


@pytest.mark.parametrize("family", FAMILIES)
def test_bypassing_both_parts_equals_bypassing_the_block(family: str) -> None:
    model = tiny_model(family)
    groups = family_groups(family, model)
    with bypassed(model, groups, parts=[SubBlock(0, "attention"), SubBlock(0, "mlp")]):
        by_parts = logits(model)
    with bypassed(model, groups, layers=[0]):
        assert torch.equal(by_parts, logits(model))


@pytest.mark.parametrize("removed", [[0], [1], [3], [1, 2]])
def test_bypassing_blocks_equals_a_llama_without_them(removed: list[int]) -> None:
    model = tiny_llama(layers=4)
    shake(model)
    model.eval()
    shrunk = copy.deepcopy(model)
    kept = [layer for index, layer in enumerate(shrunk.model.layers) if index not in removed]
    shrunk.model.layers = nn.ModuleList(kept)
    shrunk.config.num_hidden_layers = len(kept)
    shrunk.model.config.num_hidden_layers = len(kept)
    with bypassed(model, [], layers=removed):
        assert torch.equal(logits(model), logits(shrunk))


def test_contexts_can_be_nested() -> None:
    model = tiny_model("llama")
    groups = family_groups("llama", model)
    parts = [SubBlock(0, "mlp"), SubBlock(1, "attention")]
    with bypassed(model, groups, parts=parts):
        together = logits(model)
    with bypassed(model, groups, parts=parts[:1]), bypassed(model, groups, parts=parts[1:]):
        assert torch.equal(logits(model), together)


def test_part_is_the_smallest_module_or_the_output_projection() -> None:
    opt = tiny_model("opt")
    found = sub_blocks(opt, family_groups("opt", opt))
    block = find_blocks(opt)[0]
    assert found[SubBlock(0, "attention")] == (block.self_attn,)
    assert found[SubBlock(0, "mlp")] == (block.fc2,)
    moe = tiny_model("qwen3_moe")
    assert sub_blocks(moe, family_groups("qwen3_moe", moe))[SubBlock(1, "mlp")] == (find_blocks(moe)[1].mlp,)


class AddsResidual(nn.Module):
    """A feed-forward part that adds the residual itself, as BLOOM's does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return residual + self.down(self.up(hidden).relu())


class AddsResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = AddsResidual()

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return self.mlp(hidden, hidden), "kept"


def test_part_that_adds_the_residual_itself_keeps_it() -> None:
    model = nn.Sequential(AddsResidualBlock(), AddsResidualBlock())
    members = (Member("0.mlp.up.weight", 0, ((0, 1),), "out"), Member("0.mlp.down.weight", 1, ((0, 1),), "in"))
    hidden = torch.randn(3, 4)
    with bypassed(model, [Group("0.mlp", "ffn", 0, 6, members)], parts=[SubBlock(0, "mlp")]):
        assert torch.equal(model[0](hidden)[0], hidden)


def test_bypassed_block_keeps_the_structure_of_its_output() -> None:
    model = nn.Sequential(AddsResidualBlock(), AddsResidualBlock())
    hidden = torch.randn(3, 4)
    with bypassed(model, [], layers=[1]):
        output = model[1](hidden=hidden)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], hidden)
    assert output[1] == "kept"


def test_parts_are_merged_to_blocks_where_that_gives_the_same() -> None:
    model: PreTrainedModel = tiny_model("llama")
    groups = family_groups("llama", model)
    parts = [SubBlock(1, "mlp"), SubBlock(0, "mlp"), SubBlock(1, "attention")]
    assert merge_parts(model, groups, parts, lambda: logits(model)) == ((1,), (SubBlock(0, "mlp"),))


class PostNormBlock(nn.Module):
    """A block whose norm stands in the stream, so that it does something even without its part."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.LayerNorm(4)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.mlp(hidden))


def test_post_norm_parts_are_not_merged() -> None:
    model = nn.Sequential(PostNormBlock(), PostNormBlock())
    members = (Member("0.mlp.0.weight", 0, ((0, 1),), "out"), Member("0.mlp.2.weight", 1, ((0, 1),), "in"))
    part = SubBlock(0, "mlp")
    hidden = torch.randn(3, 4)
    merged = merge_parts(model, [Group("0.mlp", "ffn", 0, 6, members)], [part], lambda: model(hidden))
    assert merged == ((), (part,))


def test_parameters_of_shared_modules_count_once() -> None:
    linear = nn.Linear(3, 4)
    assert num_parameters([linear, nn.Sequential(linear, nn.Linear(4, 1))]) == 16 + 5


def test_errors_name_what_is_there() -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(ValueError, match="block 2 does not exist; the model has the blocks 0 to 1"),
        bypassed(model, [], layers=[2]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no group describes mlp 0; there are none"),
        bypassed(model, [], parts=[SubBlock(0, "mlp")]),
    ):
        pass
    members = (Member("model.layers.0.input_layernorm.weight", 0, ((0, 1),), "norm"),)
    other = (Member("model.layers.0.mlp.up_proj.weight", 0, ((0, 1),), "out"),)
    with pytest.raises(ValueError, match="mlp 0 has no module of its own and no output projection"):
        sub_blocks(model, [Group("x", "ffn", 0, 32, members + other)])
    with pytest.raises(ValueError, match="tuple that starts with one"):
        first_tensor({"a": 1})
    with pytest.raises(ValueError, match=r"no argument of the block has the shape \(2, 3\)"):
        block_input((torch.zeros(2),), {}, torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_attention_whose_heads_cannot_be_cut_is_found_beside_the_mlp(name: str) -> None:
    """Discovery finds no head groups here; bypassing equals zeroed output projections all the same."""
    model = randomised(build(name))
    groups = list(discover(model).groups.values())
    parts = sub_blocks(model, groups)
    attention = SubBlock(1, "attention")
    assert attention in parts
    inputs = probe_inputs(model)
    with bypassed(model, groups, parts=[attention]):
        without = outputs(model, inputs)
    projection = next(
        module for name, module in parts[attention][0].named_modules() if name in ("c_proj", "dense", "out_proj")
    )
    with torch.no_grad():
        projection.weight.zero_()
        projection.bias.zero_()
    torch.testing.assert_close(without, outputs(model, inputs), atol=1e-6, rtol=0)
