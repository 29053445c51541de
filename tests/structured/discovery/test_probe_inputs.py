"""What is made up for a model to read."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs, probes, spans
from tests.structured.families import SIZES, randomised
from tests.tiny_models import tiny_llama

VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_llava() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=LlamaConfig(**SIZES, head_dim=8),
        image_token_index=63,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return randomised(LlavaForConditionalGeneration(config))


def test_the_long_probe_is_longer_than_any_window() -> None:
    (alone,) = probes(tiny_llama())
    assert alone["input_ids"].shape == (2, 6)
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=40))
    short, long = probes(windowed)
    assert short["input_ids"].shape == (2, 6)
    assert long["input_ids"].shape == (1, 42)
    limited = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4096, max_position_embeddings=64))
    assert probes(limited)[1]["input_ids"].shape == (1, 64)
    assert len(probes(windowed, {"input_ids": torch.zeros(1, 50, dtype=torch.long)})) == 1
    given = probes(windowed, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    assert [batch["input_ids"].shape[1] for batch in given] == [5, 42]


def test_logits_of_a_long_probe_are_compared_at_some_places() -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=300))
    long = probes(model)[1]
    assert outputs(model, long).shape == (1, 64, 64)
    assert long["logits_to_keep"][[0, -1]].tolist() == [0, 301]


def test_spans_are_numbers_of_tokens() -> None:
    config = MistralConfig(**SIZES, sliding_window=40)
    config.chunk_size, config.local_rope_theta, config.max_window_layers, config.use_window = 7, 10000, 28, True
    assert spans(config) == {("sliding_window",): 40, ("chunk_size",): 7}


def test_what_no_probe_can_be_made_up_for_is_refused() -> None:
    model = tiny_llama()
    model.main_input_name = "input_features"
    with pytest.raises(ValueError, match="LlamaForCausalLM reads 'input_features', for which no probe can be made up"):
        probe_inputs(model)


def test_both_sides_of_a_model_read() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    inputs = probe_inputs(model)
    assert inputs.keys() == {"input_ids", "decoder_input_ids"}
    assert outputs(model, inputs).shape == (2, 6, 64)


def test_an_image_lies_among_the_tokens_of_a_model_that_takes_one() -> None:
    model = tiny_llava()
    inputs = probe_inputs(model)
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert (inputs["input_ids"] == 63).sum() == 4  # patches
    other = outputs(model, inputs | {"pixel_values": inputs["pixel_values"] + 1})
    assert not torch.equal(outputs(model, inputs), other)


def test_residual_channels_of_a_wrapper_need_an_image_in_the_probe() -> None:
    model = tiny_llava()
    found = discover(model).of_kind("hidden")[0]
    assert any(member.name.startswith("model.multi_modal_projector.linear_2") for member in found.members)
    assert found.epsilons == ("text_config.rms_norm_eps",)
    text = discover(model, {"input_ids": torch.arange(4, 12)[None]})
    assert "ffn" in text.kinds
    with pytest.raises(ValueError, match=r"the probe does not reach model\.vision_tower.*pass `inputs`"):
        text.of_kind("hidden")
