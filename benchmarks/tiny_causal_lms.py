"""Tiny randomised models of every causal-LM architecture that Transformers maps, for checks over all of them.

    python benchmarks/tiny_causal_lms.py [name ...]

Prints, per architecture, the number of parameters and the seconds it took, or why it can not be made tiny. The sizes
are told apart where the configuration allows it (width 64, feed-forward 96, experts 48 wide, vocabulary 128), and the
layers cover the kinds that the architecture mixes.
"""

import argparse
import functools
import inspect
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, BATCH, LENGTH = 128, 2, 12
DEPTHS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)


def _table(text: str) -> dict[str, Any]:
    """Read lines of 'value: field field ...' into a mapping from field to value."""
    rows = (line.split(":") for line in text.strip().splitlines())
    return {field: int(value) for value, fields in rows for field in fields.split()}


# Set wherever a configuration has the field.
SIZES = _table("""
    64: hidden_size d_model n_embd emb_dim embedding_dim embedding_size dim_model word_embed_proj_dim lru_width
    64: input_embedding_size output_embedding_size hidden_size_global
    96: intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size
    96: feed_forward_size dense_intermediate_size
    4: num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
    4: num_encoder_attention_heads num_decoder_attention_heads
    2: num_key_value_heads num_kv_heads kv_n_heads
    16: head_dim attention_head_size d_head dim_head kv_channels
    128: vocab_size max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length
    128: max_source_positions max_target_positions
    0: pad_token_id
    1: bos_token_id unk_index
    2: eos_token_id sep_token_id start_token_id decoder_start_token_id forced_eos_token_id
    3: mask_token_id cls_token_id
    1: num_codebooks
""")
# Set where the default is neither None nor zero: what an architecture leaves out by default stays out.
PARTS = _table("""
    6: num_experts n_routed_experts num_local_experts moe_num_experts
    2: num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k
    48: moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
    48: shared_experts_intermediate_size moe_shared_expert_intermediate_size
    1: n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers
    1: moe_layer_start_index
    2: n_group num_expert_group
    1: topk_group
    40: q_lora_rank
    20: kv_lora_rank
    8: qk_rope_head_dim rotary_dim
    12: qk_nope_head_dim
    14: v_head_dim
    20: qk_head_dim
    8: sliding_window window_size sliding_window_size local_attention attention_window_size attention_chunk_size
    16: index_head_dim
    4: index_n_heads index_topk
    8: mamba_d_state state_size ssm_state_size
    4: time_step_rank mamba_dt_rank
    8: mamba_n_heads mamba_num_heads
    16: mamba_d_head mamba_head_dim
    2: mamba_n_groups n_groups
    16: mamba_chunk_size chunk_size
    2: linear_num_key_heads
    4: linear_num_value_heads linear_num_heads
    12: linear_key_head_dim linear_value_head_dim linear_head_dim
    2: num_kv_shared_layers max_window_layers
    128: vocab_size_per_layer_input
    24: hidden_size_per_layer_input
    6: laurel_rank
    32: original_max_position_embeddings audio_vocab_size
    8: lora_rank adapter_rank o_lora_rank gated_norm_rank router_hidden_size
    2: o_groups hc_mult hc_count linear_num_groups
    12: hc_lowrank
    16: swa_head_dim swa_v_head_dim rel_extent
""")
# What single configurations need besides, by their model type; None leaves a field to the configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
        }
    },
    "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},  # dbrx reads it though its configuration has no such field
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "swa_q_lora_rank": 36,
        "swa_kv_lora_rank": 28,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 10,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {"global_head_dim": 32, "num_kv_shared_layers": 2},
    "inkling2_text": {"unpadded_vocab_size": VOCAB, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4},
    "inkling_text": {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 112},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
    },
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48], "num_buckets": 4, "hash_seed": 0},
    "roc_bert": {
        "shape_vocab_size": 120,
        "shape_embed_dim": 24,
        "pronunciation_vocab_size": 110,
        "pronunciation_embed_dim": 20,
    },
    "rwkv": {"attention_hidden_size": 64},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"kv_channels": None},
    "zaya": {"num_experts_per_tok": 1},
}
# The kinds of layers of those whose defaults show too few of them, repeated over the layers.
LAYERS: dict[str, dict[str, list[Any]]] = {
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v4": {"layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"], "num_attention_heads_per_layer": [4, 6]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "reformer": {"attn_layers": ["local", "lsh"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}
# Those that no forward of token ids alone runs.
NOT_ALONE = {
    "gemma4_assistant": "needs the hidden states and the keys and values of another model",
    "gemma4_unified_assistant": "needs the hidden states and the keys and values of another model",
}
# Parameters whose values mean time constants: they keep their values, give or take little.
KEEP = ("A_log", "dt_bias", "time_decay", "time_first", "recurrent_param", "A", "D", "decay", "slope")


class Unbuildable(Exception):  # noqa: N818
    """An architecture that can not be made tiny and run on token ids alone; the text is the reason."""


def architectures() -> list[str]:
    """Return the names of all causal-LM architectures of the installed Transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _cover(values: Sequence[Any], size: int, *, is_prefix: bool) -> list[Any]:
    """Shorten a list with an entry per layer to size entries that show every kind of entry."""
    kinds = list(dict.fromkeys(values))
    if is_prefix and len(kinds) <= size:
        return [*kinds, *[kinds[-1]] * (size - len(kinds))]
    if set(values[:size]) == set(kinds) or len(kinds) > size:
        return list(values[:size])
    return list(itertools.islice(itertools.cycle(kinds), size))


def _fields(config: PreTrainedConfig, num_layers: int) -> dict[str, Any]:
    """Return the fields that make a configuration tiny, given an instance with its defaults."""
    fields: dict[str, Any] = {}
    defaults = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depth = next((defaults[name] for name in DEPTHS if isinstance(defaults.get(name), int)), None)
    for name, value in defaults.items():
        if name in DEPTHS:
            fields[name] = num_layers
        elif name in SIZES:
            fields[name] = SIZES[name]
        elif name in PARTS and value:
            fields[name] = PARTS[name]
        elif isinstance(value, PreTrainedConfig):
            fields[name] = type(value)(**_fields(value, num_layers))
        elif isinstance(value, list | tuple) and len(value) == depth and list(value) != list(range(depth)):
            fields[name] = _cover(value, num_layers, is_prefix=name.startswith("mlp"))
    if "is_decoder" in defaults:
        fields["is_decoder"] = True
    if "kv_lora_rank" in defaults:  # multi-head latent attention: keys and values have all heads
        fields |= {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": PARTS["qk_rope_head_dim"]}
    key = config.model_type or config.base_config_key
    for name, kinds in LAYERS.get(key, {}).items():
        fields[name] = list(itertools.islice(itertools.cycle(kinds), num_layers))
    overrides = OVERRIDES.get(key, {})
    fields |= overrides
    if "num_kv_shared_layers" in fields:  # layers before these have to make the keys and values of each kind
        fields["num_kv_shared_layers"] = max(0, min(fields["num_kv_shared_layers"], num_layers - 2))
    return {name: value for name, value in fields.items() if value is not None or name not in overrides}


def model_class(name: str) -> type[PreTrainedModel]:
    """Return the class of an architecture's causal language model."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])


def tiny_config(name: str, num_layers: int = 6) -> PreTrainedConfig:
    """Return a tiny configuration of an architecture: of its text part where the model takes only that."""
    default, wanted = CONFIG_MAPPING[name](), model_class(name).config_class
    if not isinstance(default, wanted):
        default = next((part for part in vars(default).values() if isinstance(part, wanted)), default)
    return type(default)(**_fields(default, num_layers))


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Redraw every floating-point parameter so that none keeps a value that an initialisation gave it."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        noise = torch.randn(weight.shape, generator=generator)
        last = name.rpartition(".")[2]
        if last in KEEP and weight.isfinite().all():
            weight.add_(0.02 * noise)
        elif weight.isfinite().all() and (weight - 1).abs().max() < 0.1:
            weight.copy_(1 + 0.1 * noise)
        elif last.endswith("bias"):
            weight.copy_(0.05 * noise)
        else:
            weight.copy_(0.1 * noise if weight.ndim == 1 else 0.08 * noise)
    for name, value in model.named_buffers():
        if name.endswith("correction_bias"):
            value.copy_(0.05 * torch.randn(value.shape, generator=generator))


def _arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments besides the token ids with which the model takes a plain forward."""
    known = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in known else {}


def token_ids(seed: int = 0) -> torch.Tensor:
    """Return a batch of token ids that avoids the special ones."""
    return torch.randint(4, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a plain forward."""
    return model(input_ids=ids, **_arguments(model)).logits


def _check(model: PreTrainedModel) -> None:
    """Raise unless the model maps token ids to finite logits that depend on them."""
    ids = token_ids(seed=0)
    first, second = logits(model, ids), logits(model, token_ids(seed=1))
    if tuple(first.shape) != (BATCH, LENGTH, VOCAB):
        raise Unbuildable(f"logits of shape {tuple(first.shape)}")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise Unbuildable("logits are not finite")
    if torch.equal(first, second):
        raise Unbuildable("logits do not depend on the token ids")


def build(name: str, *, num_layers: int = 6, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model of an architecture, seeded, in float32 and eval mode, with every parameter random."""
    if name in NOT_ALONE:
        raise Unbuildable(NOT_ALONE[name])
    try:
        config = tiny_config(name, num_layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(name)(config).float().eval()
        randomise(model, torch.Generator().manual_seed(seed))
        _check(model)
    except Unbuildable:
        raise
    except Exception as error:
        text = " ".join(str(error).split()).partition(". ")[0]
        raise Unbuildable(f"{type(error).__name__}: {text[:160]}") from error
    return model


def causal_lms(names: Sequence[str] | None = None) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Yield each architecture's name with a function that builds it."""
    for name in architectures() if names is None else names:
        yield name, functools.partial(build, name)


def main() -> None:
    """Print what can be built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all without one")
    names = parser.parse_args().names or architectures()
    transformers.logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    built, start = 0, time.perf_counter()
    for name, make in causal_lms(names):
        began = time.perf_counter()
        try:
            model = make()
        except Unbuildable as reason:
            print(f"{name:26} {reason}", flush=True)
            continue
        built += 1
        count = sum(weight.numel() for weight in model.parameters())
        print(f"{name:26} ok {count:>10,} {time.perf_counter() - began:6.2f} s", flush=True)
    print(f"{built} of {len(names)} built in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
