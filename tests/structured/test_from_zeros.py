"""Plans from zeros: what is cut is what was zeroed, and the smaller model gives the masked one's logits."""

import functools
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.from_zeros import alive_units, plan_from_zeros
from lightning_prune.structured.groups import Group, Member
from lightning_prune.structured.shrink import shrink
from tests.tiny_models import tiny_family, tiny_llama, token_windows

STRUCTURE = functools.cache(lambda: discover(tiny_llama()))  # of the intact model: zeros hide what is under them

FFN = "model.layers.{}.mlp:ffn"
HEADS = "model.layers.{}.self_attn:heads"
KV = "model.layers.{}.self_attn:kv_groups"


@torch.no_grad()
def zero_columns(model: PreTrainedModel, layer: int, *, units: Sequence[int] = (), heads: Sequence[int] = ()) -> None:
    """Zero columns of the output projections of one Llama block: feed-forward units, query heads."""
    block = model.model.layers[layer]
    block.mlp.down_proj.weight[:, list(units)] = 0
    size = model.config.head_dim
    for head in heads:
        block.self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0


def same_logits(model: PreTrainedModel, small: torch.nn.Module) -> None:
    ids_NT = token_windows(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=ids_NT).logits, model(input_ids=ids_NT).logits, rtol=0, atol=1e-6)


def test_alive_units_by_hand() -> None:
    weight_OI = torch.tensor([[1.0, 0, 0, 0, 0, 3], [0, 0, 0, 0, 2, 0]])
    one = Group("m", "heads", 0, 3, (Member("w", 1, ((0, 2),), "in"), Member("v", 0, ((0, 2),), "out")))
    assert alive_units(one, {"w": weight_OI}).tolist() == [True, False, True]
    fused = Group("m", "ffn", 0, 3, (Member("w", 1, ((0, 1), (3, 1)), "in"),))
    assert alive_units(fused, {"w": weight_OI}).tolist() == [True, True, True]
    weight_OI[:, 4] = 0
    assert alive_units(fused, {"w": weight_OI}).tolist() == [True, False, True]


def test_zeroed_units_are_cut_and_the_logits_stay() -> None:
    model = tiny_llama().eval()
    zero_columns(model, 0, units=range(0, 12))
    zero_columns(model, 1, units=range(30, 42))
    plan = plan_from_zeros(model, STRUCTURE())
    kept = {cut.group: cut.keep for cut in plan.cuts}
    assert kept == {FFN.format(0): tuple(range(12, 48)), FFN.format(1): (*range(30), *range(42, 48))}
    assert plan.method == {"name": "zeros", "notes": []}
    small = shrink(model, plan, structure=STRUCTURE())
    assert small.config.intermediate_size == 36
    same_logits(model, small)


def test_blocks_that_differ_keep_the_largest_number_and_a_note() -> None:
    model = tiny_llama().eval()
    zero_columns(model, 0, units=range(20))
    zero_columns(model, 1, units=range(12))
    plan = plan_from_zeros(model, STRUCTURE())
    kept = {cut.group: cut.keep for cut in plan.cuts}
    assert kept == {FFN.format(0): (*range(8), *range(20, 48)), FFN.format(1): tuple(range(12, 48))}
    assert plan.method["notes"] == [
        "ffn: 8 zeroed units stay, so that all 2 groups keep 36 of 48, as the class of the model needs it"
    ]
    same_logits(model, shrink(model, plan, structure=STRUCTURE()))


def test_heads_and_whole_key_value_groups() -> None:
    model = tiny_llama().eval()  # 4 heads in 2 key/value groups
    zero_columns(model, 0, heads=(0, 2))
    zero_columns(model, 1, heads=(1, 3))
    plan = plan_from_zeros(model, STRUCTURE())
    assert {cut.group: cut.keep for cut in plan.cuts} == {HEADS.format(0): (1, 3), HEADS.format(1): (0, 2)}
    small = shrink(model, plan, structure=STRUCTURE())
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 2)
    same_logits(model, small)
    model = tiny_llama().eval()
    zero_columns(model, 0, heads=(0, 1, 2))
    zero_columns(model, 1, heads=(2, 3, 1))
    plan = plan_from_zeros(model, STRUCTURE())
    kept = {cut.group: cut.keep for cut in plan.cuts}
    assert (kept[KV.format(0)], kept[KV.format(1)]) == ((1,), (0,))
    assert (kept[HEADS.format(0)][-1:], kept[HEADS.format(1)][:1]) == ((3,), (0,))
    small = shrink(model, plan, structure=STRUCTURE())
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (1, 1)
    same_logits(model, small)


def test_units_that_cannot_be_cut_evenly_stay() -> None:
    model = tiny_llama().eval()
    zero_columns(model, 0, units=range(12), heads=(0,))
    zero_columns(model, 1, units=range(12))
    plan = plan_from_zeros(model, STRUCTURE())
    assert {cut.group for cut in plan.cuts} == {FFN.format(0), FFN.format(1)}


def test_zero_readers_of_the_residual_stream_are_left_alone() -> None:
    model = tiny_llama(tied=False).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                weight[:, 5] = 0
        model.lm_head.weight[:, 5] = 0
    with pytest.raises(ValueError, match="no unit is zero in all output projections"):
        plan_from_zeros(model, STRUCTURE())


def test_an_empty_block_keeps_one_unit() -> None:
    model = tiny_llama().eval()
    for layer in range(2):
        zero_columns(model, layer, units=range(48))
    small = shrink(model, plan_from_zeros(model, STRUCTURE()), structure=STRUCTURE())
    assert small.config.intermediate_size == 1
    same_logits(model, small)


def test_nothing_zero_says_what_to_do() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"no unit is zero .* granularity Channel .* structured/train_ffn"):
        plan_from_zeros(model, STRUCTURE())
    zero_columns(model, 0, units=range(12))
    with pytest.raises(ValueError, match="12 units are zero, but for every kind some block keeps all"):
        plan_from_zeros(model, STRUCTURE())


def test_transposed_weights_of_gpt2() -> None:
    model = tiny_family("gpt2").eval()
    structure = discover(model)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight[:32] = 0
    small = shrink(model, plan_from_zeros(model, structure), structure=structure)
    assert small.config.n_inner == 96
    same_logits(model, small)
