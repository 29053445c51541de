"""Tiny models of several architectures, and plans that leave their blocks in different shapes."""

import functools
import random

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.structure import Structure
from tests.tiny_models import VOCAB

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gpt_neox", "gpt2", "opt")
SKIP = ((0, "attention"), (2, "mlp"))

_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {**_IDS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
_GATED = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 2}


def tiny(name: str, **changes: object) -> PreTrainedModel:
    """Return a model of four blocks with large random weights, biases and norms included."""
    torch.manual_seed(0)
    kinds = {
        "llama": (LlamaForCausalLM, LlamaConfig, _GATED),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GATED),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_GATED, "head_dim": 8}),
        "mistral": (MistralForCausalLM, MistralConfig, {**_GATED, "sliding_window": None}),
        "phi": (PhiForCausalLM, PhiConfig, {**_SIZES, "intermediate_size": 24}),
        "phi3": (Phi3ForCausalLM, Phi3Config, _GATED),
        "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {**_SIZES, "intermediate_size": 24}),
        "gpt2": (
            GPT2LMHeadModel,
            GPT2Config,
            {**_IDS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 24, "n_positions": 64},
        ),
        "opt": (OPTForCausalLM, OPTConfig, {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32}),
    }
    model_class, config_class, values = kinds[name]
    model = model_class(config_class(**{**values, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = None  # so that generation goes on to the asked length
    return model


@functools.cache
def parent(name: str) -> tuple[PreTrainedModel, Structure]:
    """Return a model and what can be cut from it; shared by the tests, so leave it as it is."""
    model = tiny(name)
    return model, discover(model)


def ragged(
    structure: Structure, *, layers: tuple[int, ...] | None = None, skip: tuple[tuple[int, str], ...] = ()
) -> Plan:
    """Return a plan by which every block keeps another FFN width, and blocks 1 and 3 fewer heads."""
    order = random.Random(0)
    cuts = []
    for group in structure.groups.values():
        if group.layer is None:
            continue
        if group.kind == "ffn":
            cuts.append(Cut(group.key, tuple(sorted(order.sample(range(group.num_units), 22 - 3 * group.layer)))))
        elif group.layer % 2 and group.kind == "kv_groups":
            cuts.append(Cut(group.key, (1,)))
        elif group.layer % 2 and group.kind == "heads" and group.num_parts == 1:
            cuts.append(Cut(group.key, tuple(range(1, group.num_units))))
    return Plan(cuts=tuple(cuts), layers=layers, skip=skip)


def tokens(num_sequences: int = 2, length: int = 12, *, seed: int = 0) -> Tensor:
    """Return ids_NT without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (num_sequences, length), generator=generator)
