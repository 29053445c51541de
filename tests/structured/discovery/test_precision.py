"""Models that were cast are found to be what the same models loaded in that precision are."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.precision import exact_buffers, precise
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.shrink import shrink
from tests.structured.families import SIZES, build, randomised


def cast(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=8))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_frequencies_hide_nothing(dtype: torch.dtype) -> None:
    model = cast(dtype)
    rounded = model.model.rotary_emb.inv_freq
    assert rounded.dtype == dtype
    structure = discover(model)
    assert set(structure.kinds) == {"ffn", "heads", "kv_groups", "hidden", "layers"}
    plan = Plan(cuts=tuple(Cut(group.key, tuple(range(24))) for group in structure.of_kind("ffn")))
    small = shrink(model, plan, structure=structure)
    assert model.model.rotary_emb.inv_freq is rounded
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    assert small.model.embed_tokens.weight.dtype == dtype


def test_exact_values_are_there_for_a_while() -> None:
    model = cast(torch.bfloat16)
    expected = LlamaForCausalLM(model.config).model.rotary_emb.inv_freq
    rounded = model.model.rotary_emb.inv_freq
    with exact_buffers(model, Blueprint(model)):
        assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert model.model.rotary_emb.inv_freq is rounded
    model.model.rotary_emb.inv_freq = rounded * 2  # no rounding: somebody wanted other frequencies
    with exact_buffers(model, Blueprint(model)):
        assert torch.equal(model.model.rotary_emb.inv_freq, rounded * 2)


def test_full_precision_is_made_where_it_is_missing() -> None:
    model = randomised(build("llama"))
    assert precise(model, Blueprint(model)) is model
    short = cast(torch.float16)
    long = precise(short, Blueprint(short))
    assert {tensor.dtype for tensor in long.state_dict().values()} == {torch.float32}
    assert torch.equal(long.lm_head.weight.half(), short.lm_head.weight)
