"""Tiny models and data for the tests: real architectures, random weights, no network."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 64
STACKS_EXPERTS = CHECKS_SIZES = int(transformers.__version__.partition(".")[0]) >= 5
needs_stacked_experts = pytest.mark.skipif(not STACKS_EXPERTS, reason="Transformers 4 keeps experts in a list")
knows_shapes_per_block = pytest.mark.skipif(
    not hasattr(transformers.PretrainedConfig, "per_layer_config"),
    reason="Transformers 4 has no per_layer_config: it fills in what a folder lacks, and warns",
)


def recompute_activations(model: PreTrainedModel, **how: Any) -> None:
    """Let a model recompute its blocks in the backward pass; the method's name changed in Transformers 5."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(how or None)


def tiny_llama(*, tied: bool = True, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """Return a Llama of about 20,000 parameters with grouped-query attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tiny_family(name: str) -> PreTrainedModel:
    """Return a tiny model of an architecture: llama, gpt2, gpt_neox, qwen3_moe, t5 or bert."""
    torch.manual_seed(0)
    if name == "llama":
        return tiny_llama()
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    if name == "gpt_neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
            )
        )
    if name == "qwen3_moe":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=48,
                moe_intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_experts=4,
                num_experts_per_tok=2,
                head_dim=16,
            )
        )
    if name == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB,
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        )
    if name == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
            )
        )
    raise ValueError(f"no tiny model called {name!r}")


def token_windows(num_sequences: int = 16, length: int = 16, *, seed: int = 0) -> Tensor:
    """Return ids_NT: random walks over the vocabulary, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (num_sequences, length), generator=generator)
    return (steps.cumsum(1) + torch.randint(0, VOCAB, (num_sequences, 1), generator=generator)) % VOCAB


class TokenDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The same windows as a map dataset of dicts, as a Trainer wants them."""

    def __init__(self, ids_NT: Tensor) -> None:
        self.ids_NT = ids_NT

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids_NT[index], "labels": self.ids_NT[index]}


def tiny_mlp(*, seed: int = 0) -> nn.Sequential:
    """Return a plain two-layer network: 8 -> 16 -> 4."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
