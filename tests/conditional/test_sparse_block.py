from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.conditional.skip_layer import SkipLayer
from tests.conditional.inserted import decoded, insert, model_of, tokens

DECODERS = ("llama", "qwen2", "gemma2", "gpt2", "opt", "phi3", "mistral", "gpt_neox", "qwen3_moe", "olmo2")


def inserted(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a model whose routers pick about half of the tokens."""
    model = model_of(name)
    condition = insert(SkipLayer(offset=0.0), model)
    generator = torch.Generator().manual_seed(seed)
    for router in condition.routers:
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        router.sparse.least = 1
    return model, condition


@contextmanager
def mixing(condition: Any) -> Iterator[None]:
    """Compute every token and mix."""
    for router in condition.routers:
        router.sparse.is_sparse = False
    try:
        yield
    finally:
        for router in condition.routers:
            router.sparse.is_sparse = True


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_leaving_tokens_out_gives_what_mixing_gives(name: str) -> None:
    model, condition = inserted(name)
    assert all(router.sparse.is_sparse for router in condition.routers)
    ids = tokens(3, 20)  # longer than the windows of mistral and gemma2
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :11] = 0, 0
    runs = [
        lambda: model(input_ids=ids, use_cache=False).logits,
        lambda: model(input_ids=ids, attention_mask=mask).logits,
        lambda: decoded(model, ids, ends=(9, 12, 13, 14, 18, 19, 20)),
        lambda: decoded(model, ids, mask, ends=(9, 12, 13, 14, 18, 19, 20)),
        lambda: decoded(model, ids[:1], ends=(9, 10, 11, 12, 13, 14)),
    ]
    for run in runs:
        sparse = run()
        with mixing(condition):
            dense = run()
        torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-5)


@torch.no_grad()
def test_eager_attention_leaves_out_as_well() -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    condition = insert(SkipLayer(offset=0.0), model)
    assert all(router.sparse.is_sparse for router in condition.routers)


@contextmanager
def rows_of(module: nn.Module) -> Iterator[list[int]]:
    """Note how many tokens each call of a module computes."""
    seen: list[int] = []
    forward = module.forward
    module.forward = lambda inputs: (seen.append(inputs.shape[:-1].numel()), forward(inputs))[1]
    try:
        yield seen
    finally:
        del vars(module)["forward"]


@torch.no_grad()
def test_tokens_that_skip_reach_keys_and_values_only() -> None:
    model, condition = inserted("llama")
    ids = tokens(1, 16)
    block = model.model.layers[1]
    wanted = []
    block.register_forward_pre_hook(
        lambda _, args: wanted.append(int((condition.routers[1].logits(args[0]).argmax(-1) == 1).sum()))
    )
    attention, mlp = block.self_attn, block.mlp
    names = {attention.q_proj: "some", attention.o_proj: "some", mlp.up_proj: "some", mlp.down_proj: "some"}
    for module in (*names, attention.k_proj, attention.v_proj):
        with rows_of(module) as seen:
            model(input_ids=ids)
        assert 0 < wanted[-1] < 16
        assert seen == [wanted[-1] if module in names else 16]


@torch.no_grad()
def test_a_token_that_skips_at_decoding_computes_keys_and_values_only() -> None:
    model, condition = inserted("llama")
    block = model.model.layers[0]
    prompt = model(input_ids=tokens(1, 4), use_cache=True)
    with torch.no_grad():
        condition.routers[0].weight.zero_()  # a tie skips
    attention = block.self_attn
    with rows_of(block.mlp.up_proj) as ffn, rows_of(attention.q_proj) as queries, rows_of(attention.k_proj) as keys:
        model(input_ids=tokens(1, 1), past_key_values=prompt.past_key_values)
    assert (ffn, queries, keys) == ([], [], [1])
    assert prompt.past_key_values.get_seq_length() == 5


@torch.no_grad()
def test_a_fused_projection_is_computed_once() -> None:
    model, condition = inserted("gpt2")
    with rows_of(model.transformer.h[0].attn.c_attn) as seen:
        model(input_ids=tokens(1, 16))
    assert seen == [16]
    assert condition.routers[0].sparse.shared == ("ln_1", "attn.c_attn")


def test_what_leads_where_is_found() -> None:
    sparse = inserted("llama")[1].routers[0].sparse
    assert sparse.query_only == ("self_attn.q_proj",)
    assert sparse.keys_only == ("self_attn.k_proj", "self_attn.v_proj")
    assert sparse.shared == ("input_layernorm",)


@torch.no_grad()
@pytest.mark.parametrize(("least", "num_computed"), [(1, [4]), (16, [8]), (4, [4]), (5, [8])])
def test_few_tokens_that_skip_are_computed_beside_the_others(least: int, num_computed: list[int]) -> None:
    model, condition = inserted("llama")
    sparse = condition.routers[0].sparse
    sparse.least = least
    half = torch.arange(8)[None] % 2 == 0
    model.model.layers[0].forward = lambda *args, **kwargs: sparse(half, args, kwargs)
    with rows_of(model.model.layers[0].mlp.up_proj) as seen:
        model(input_ids=tokens(1, 8))
    assert seen == num_computed


def test_a_state_in_place_of_keys_is_mixed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("mamba")
    condition = insert(SkipLayer(), model)
    assert not any(router.sparse.is_sparse for router in condition.routers)
    assert "its blocks hand no keys and values to a cache" in caplog.text


def test_what_does_not_give_the_same_is_not_relied_on(caplog: pytest.LogCaptureFixture) -> None:
    condition = insert(SkipLayer(), model_of("bert"))  # no mask means that all see all
    assert not any(router.sparse.is_sparse for router in condition.routers)
    assert "BertForMaskedLM computes tokens that blocks skip all the same" in caplog.text
