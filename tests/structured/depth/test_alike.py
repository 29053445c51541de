"""Blocks that cannot lend each other weights are refused with the reason."""

import pytest
from torch import nn

from lightning_prune.structured.depth.alike import check_alike, linear_roles, rank_limits, weight_of
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import tiny_model
from tests.structured.families import build
from tests.tiny_models import needs_stacked_experts, tiny_llama


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom"])
def test_equal_blocks_pass(family: str) -> None:
    check_alike(tiny_model(family))


def test_weights_have_their_outputs_first() -> None:
    gpt2, llama = (linear_roles(find_blocks(tiny_model(name))[0]) for name in ("gpt2", "llama"))
    assert weight_of(gpt2["mlp.c_fc"]).shape == (128, 32)
    assert weight_of(llama["mlp.up_proj"]).shape == (48, 32)
    assert rank_limits(tiny_model("llama")) == {
        "self_attn.q_proj": 32,
        "self_attn.k_proj": 16,
        "self_attn.v_proj": 16,
        "self_attn.o_proj": 32,
        "mlp.gate_proj": 32,
        "mlp.up_proj": 32,
        "mlp.down_proj": 32,
    }


def test_unequal_blocks_are_refused() -> None:
    ragged = tiny_llama(layers=4)
    ragged.model.layers[2].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match=r"mlp.up_proj is \(40, 32\) in block 2 and \(48, 32\) in block 0"):
        check_alike(ragged)
    hybrid = tiny_llama(layers=4)
    hybrid.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"block 1 .* has not the linear layers of block 0"):
        check_alike(hybrid)
    tied = tiny_llama(layers=4)
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="are one tensor; blocks whose weights are tied already"):
        check_alike(tied)
    check_alike(build("mamba"))


@needs_stacked_experts
def test_blocks_of_stacked_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="most weights of block 0 are not in linear layers"):
        check_alike(tiny_model("qwen3_moe"))
