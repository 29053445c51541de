"""Lists with an entry per block are told from lists that only happen to be as long."""

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.stack import candidate_stacks
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.shrink import shrink
from tests.structured.families import SIZES, randomised


def lists_of(model: nn.Module, field: str = "num_hidden_layers") -> tuple[str, ...]:
    return next(stack.lists for stack in candidate_stacks(model, Blueprint(model)) if stack.field == field)


def test_end_tokens_stay_when_as_many_blocks_go() -> None:
    model = randomised(LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=[2, 3, 5])))
    structure = discover(model, kinds=("layers",))
    assert structure.stack is not None
    assert structure.stack.lists == ()
    small = shrink(model, Plan(layers=(0, 2)), structure=structure)
    assert small.config.eos_token_id == [2, 3, 5]


def test_kinds_of_blocks_go_with_them_also_where_all_are_alike() -> None:
    assert lists_of(Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))) == ("layer_types",)
    alike = Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * 3, eos_token_id=[1, 2, 3])
    assert lists_of(Gemma2ForCausalLM(alike)) == ("layer_types",)


def test_numbers_per_block_go_with_them() -> None:
    sizes = {key: value for key, value in SIZES.items() if "key_value" not in key}
    config = LongformerConfig(**sizes, attention_window=[8, 4, 8], max_position_embeddings=64)
    assert lists_of(LongformerForMaskedLM(config)) == ("attention_window",)


def test_suppressed_tokens_are_no_decoder_blocks() -> None:
    config = WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        begin_suppress_tokens=[22, 33],
        suppress_tokens=[7, 8, 9],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    assert lists_of(WhisperForConditionalGeneration(config), "decoder_layers") == ()
    assert lists_of(WhisperForConditionalGeneration(config), "encoder_layers") == ()


def test_rotary_factors_are_no_blocks_and_do_not_keep_these_from_going() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [2.0] * 4}
    config = Phi3Config(
        **(SIZES | {"num_hidden_layers": 4}),
        rope_parameters=rope,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
    )
    torch.manual_seed(0)
    structure = discover(randomised(Phi3ForCausalLM(config)), kinds=("layers",))
    assert structure.stack is not None
    assert structure.stack.lists == ()
    assert structure.stack.removable == (0, 1, 2, 3)
