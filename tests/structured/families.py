"""Tiny models of the families that structured tests cut, with every parameter random."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.tiny_models import tiny_family, tiny_llama

__all__ = ["SIZES", "build", "randomised"]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Draw every parameter anew, so that norms and biases matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise) if parameter.ndim == 1 else parameter.copy_(0.1 * noise)
    return model.eval()


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "phi3":
        return Phi3ForCausalLM(Phi3Config(**SIZES))
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES))
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=8))
    if name == "olmo2":
        return Olmo2ForCausalLM(Olmo2Config(**SIZES))
    if name == "opt":
        sizes = {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "num_key_value_heads")}
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32))
    if name == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4))
    if name == "llama, biased, untied":
        config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
        return LlamaForCausalLM(config)
    if name == "llama, one key/value head":
        return LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_key_value_heads": 1})))
    if name == "llama":
        return tiny_llama(layers=3)
    return tiny_family(name)
