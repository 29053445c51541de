"""Tiny models and hand-written groups for the tests of depth pruning."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    set_seed,
)

from lightning_prune.structured.depth.fuse import FuseGPT, FuseTraining
from lightning_prune.structured.depth.replace import ReplaceMe
from lightning_prune.structured.groups import Group, Kind, Member, Role
from lightning_prune.structured.structure import Structure
from tests.tiny_models import VOCAB, tiny_family, tiny_llama, token_windows

DATA = os.environ.get("LIGHTNING_PRUNE_DATA", "")
FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3_moe", "opt", "bloom"]


def tiny_model(name: str) -> PreTrainedModel:
    """Return a tiny model with large random weights, biases and norms included, so that every part matters."""
    if name == "opt":
        model: PreTrainedModel = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            )
        )
    elif name == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0))
    elif name == "mamba":
        model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=4))
    else:
        model = tiny_family(name)
    shake(model)
    return model.eval()


def shake(model: nn.Module, *, seed: int = 0) -> None:
    """Add noise to all weights, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def padded_batches(num: int = 2, *, length: int = 12) -> list[dict[str, Tensor]]:
    """Return batches of two sequences, the second with padding on the right."""
    batches = []
    for seed in range(num):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, length - 3 :] = 0
        batches.append({"input_ids": token_windows(2, length, seed=seed), "attention_mask": mask})
    return batches


def _member(name: str, dim: int, sizes: tuple[tuple[int, int], ...], role: Role) -> Member:
    return Member(name, dim, sizes, role)


def _ffn(name: str, layer: int, num_units: int, outs: list[str], reader: str, *, transposed: bool = False) -> Group:
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    members = [_member(f"{out}.weight", out_dim, ((0, 1),), "out") for out in outs]
    return Group(name, "ffn", layer, num_units, (*members, _member(f"{reader}.weight", in_dim, ((0, 1),), "in")))


def llama_groups(model: PreTrainedModel) -> list[Group]:
    """Return FFN units and key/value groups of a Llama."""
    config = model.config
    head, count = config.head_dim, config.num_key_value_heads
    rows = config.num_attention_heads // count * head
    groups = []
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        attention = (
            _member(f"{block}.self_attn.q_proj.weight", 0, ((0, rows),), "out"),
            _member(f"{block}.self_attn.k_proj.weight", 0, ((0, head),), "out"),
            _member(f"{block}.self_attn.v_proj.weight", 0, ((0, head),), "out"),
            _member(f"{block}.self_attn.o_proj.weight", 1, ((0, rows),), "in"),
        )
        groups.append(Group(f"{block}.self_attn", "kv_groups", layer, count, attention))
        if config.model_type == "llama":
            outs = [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"]
            groups.append(_ffn(f"{block}.mlp", layer, config.intermediate_size, outs, f"{block}.mlp.down_proj"))
    return groups


def structure_of(groups: list[Group]) -> Structure:
    """Return these groups as what can be cut from a model."""
    return Structure({group.key: group for group in groups})


NOTHING = structure_of([])


def _fused(name: str, kind: Kind, layer: int, num_units: int, members: tuple[Member, ...]) -> Group:
    return Group(name, kind, layer, num_units, members)


def family_groups(name: str, model: PreTrainedModel) -> list[Group]:
    """Return groups that name the members of every sub-block."""
    groups: list[Group] = []
    if name in ("llama", "qwen3_moe"):
        groups = llama_groups(model)
    for layer in range(2):
        if name == "qwen3_moe":
            path = f"model.layers.{layer}.mlp"
            experts = (
                _member(f"{path}.experts.gate_up_proj", 0, ((0, 1),), "vector"),
                _member(f"{path}.experts.down_proj", 0, ((0, 1),), "vector"),
                _member(f"{path}.gate.weight", 0, ((0, 1),), "out"),
            )
            groups.append(_fused(path, "experts", layer, 4, experts))
        if name == "gpt2":
            path = f"transformer.h.{layer}"
            heads = (
                _member(f"{path}.attn.c_attn.weight", 1, ((0, 16), (32, 16), (64, 16)), "out"),
                _member(f"{path}.attn.c_proj.weight", 0, ((0, 16),), "in"),
            )
            groups.append(_fused(f"{path}.attn", "heads", layer, 2, heads))
            mlp = f"{path}.mlp"
            groups.append(_ffn(mlp, layer, 128, [f"{mlp}.c_fc"], f"{mlp}.c_proj", transposed=True))
        if name == "gpt_neox":
            path = f"gpt_neox.layers.{layer}"
            heads = (
                _member(f"{path}.attention.query_key_value.weight", 0, ((0, 48),), "out"),
                _member(f"{path}.attention.dense.weight", 1, ((0, 16),), "in"),
            )
            groups.append(_fused(f"{path}.attention", "heads", layer, 2, heads))
            mlp = f"{path}.mlp"
            groups.append(_ffn(mlp, layer, 64, [f"{mlp}.dense_h_to_4h"], f"{mlp}.dense_4h_to_h"))
        if name == "bloom":
            path = f"transformer.h.{layer}"
            heads = (
                _member(f"{path}.self_attention.query_key_value.weight", 0, ((0, 48),), "out"),
                _member(f"{path}.self_attention.dense.weight", 1, ((0, 16),), "in"),
            )
            groups.append(_fused(f"{path}.self_attention", "heads", layer, 2, heads))
            mlp = f"{path}.mlp"
            groups.append(_ffn(mlp, layer, 128, [f"{mlp}.dense_h_to_4h"], f"{mlp}.dense_4h_to_h"))
        if name == "opt":
            path = f"model.decoder.layers.{layer}"
            sides = [_member(f"{path}.self_attn.{x}_proj.weight", 0, ((0, 16),), "out") for x in "qkv"]
            heads = (*sides, _member(f"{path}.self_attn.out_proj.weight", 1, ((0, 16),), "in"))
            groups.append(_fused(f"{path}.self_attn", "heads", layer, 2, heads))
            groups.append(_ffn(path, layer, 48, [f"{path}.fc1"], f"{path}.fc2"))
    return groups


def stories3m() -> PreTrainedModel:
    """Load the trained model of the golden numbers, or skip."""
    if not DATA:
        pytest.skip("LIGHTNING_PRUNE_DATA names no folder with the trained models")
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(Path(DATA) / "models" / "stories3M", dtype=torch.float32).eval()


def sampled(model: PreTrainedModel, seed: int, num: int = 128) -> list[dict[str, Tensor]]:
    """Sample sequences of 128 tokens from a model at temperature 1; batches of 32."""
    set_seed(seed)
    start = torch.ones(128, 1, dtype=torch.long)
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_length=128,
        min_length=128,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=0,
    )
    return [{"input_ids": part} for part in ids[:num].split(32)]


def plan_on_rank(method: Any, num_processes: int, folder: str) -> tuple[dict[str, Any], int]:
    """Plan with every n-th batch on each of n processes; return the plan and the number of forward passes."""
    model = tiny_llama(layers=4)
    shake(model)
    rank = dist.get_rank() if num_processes > 1 else 0
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: passes.append(1))
    batches = padded_batches(4)[rank::num_processes]
    state_file = Path(folder) / f"{rank}.json" if hasattr(method, "stop") else None
    structure = structure_of(llama_groups(model))
    plan = method.plan(model.eval(), structure, batches, state_file=state_file, progress=False)
    return plan.as_dict(), len(passes)


def replace_on_rank(num_processes: int) -> tuple[list[list[float]], dict[str, Any]]:
    """Replace a block with every n-th batch on each of n processes; return the new projection and the plan."""
    model = tiny_llama(layers=4)
    shake(model)
    rank = dist.get_rank() if num_processes > 1 else 0
    batches = padded_batches(8)[rank::num_processes]
    plan = ReplaceMe(num_blocks=1, start=2).plan(model.eval(), structure_of(llama_groups(model)), batches)
    return model.model.layers[1].mlp.down_proj.weight.tolist(), plan.as_dict()


def fuse_on_rank(num_processes: int) -> tuple[list[list[float]], dict[str, Any]]:
    """Fuse a block with one of the two sequences of every batch on each of two processes, or with both on one."""
    model = tiny_llama(layers=4)
    shake(model)
    ids = [token_windows(2, 12, seed=seed) for seed in range(4)]
    if num_processes > 1:
        ids = [both[dist.get_rank() :][:1] for both in ids]
    training = FuseTraining(
        rank=2, epochs=2, batch_size=len(ids[0]), learning_rate=1e-3, coefficient_learning_rate=1e-2
    )
    method = FuseGPT(num_blocks=2, training=training)
    plan = method.plan(model.eval(), NOTHING, [{"input_ids": one} for one in ids], progress=False)
    return torch.cat([block.mlp.down_proj.weight for block in model.model.layers]).tolist(), plan.as_dict()
