"""What is found in real architectures, and what is refused with which reason."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Cut, Member, Plan
from lightning_prune.structured.shrink import masked, shrink
from tests.structured.families import SIZES, build, randomised
from tests.tiny_models import STACKS_EXPERTS, needs_stacked_experts, tiny_llama, tiny_mlp

FOUND = {
    "llama": {"ffn", "heads", "kv_groups", "hidden"},
    "llama, biased, untied": {"ffn", "heads", "kv_groups", "hidden"},
    "llama, one key/value head": {"ffn", "heads", "hidden"},
    "phi3": {"ffn", "heads", "kv_groups", "hidden"},
    "qwen2": {"ffn", "heads", "kv_groups", "hidden"},
    "mistral": {"ffn", "heads", "kv_groups", "hidden"},
    "gemma2": {"ffn", "heads", "kv_groups", "hidden"},
    "olmo2": {"ffn", "heads", "kv_groups", "hidden"},
    "qwen3_moe": {"ffn", "heads", "hidden", "experts"} if STACKS_EXPERTS else {"ffn", "heads", "hidden"},
    "mamba": {"channels", "hidden"},
    "gpt2": {"ffn"},
    "gpt_neox": {"ffn"},
    "opt": {"ffn"},
    "bert": {"ffn"},
}


@pytest.mark.parametrize("name", FOUND)
def test_every_kind_found_is_cut_exactly_and_layers_can_go(name: str) -> None:
    model = randomised(build(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    structure = discover(model)
    assert {group.kind for group in structure.groups.values()} == FOUND[name]
    inputs = probe_inputs(model)
    for kind in FOUND[name]:
        groups = structure.of_kind(kind)
        plan = Plan(cuts=tuple(Cut(g.key, tuple(range(1, g.num_units, 2)) or (0,)) for g in groups if g.num_units > 1))
        if kind == "heads" and groups[0].num_parts > 1:
            plan = Plan(cuts=tuple(Cut(g.key, (0, 2)) for g in groups))
        small = shrink(model, plan, structure=structure)
        with masked(model, structure, plan):
            torch.testing.assert_close(outputs(small, inputs), outputs(model, inputs), atol=1e-5, rtol=0)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert structure.stack is not None
    assert structure.stack.removable
    layers = tuple(range(structure.stack.num_layers))[:-1]
    small = shrink(model, Plan(layers=layers), structure=structure)
    with masked(model, structure, Plan(layers=layers)):
        torch.testing.assert_close(outputs(small, inputs), outputs(model, inputs), atol=1e-5, rtol=0)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_groups_of_llama_are_those_of_its_equations() -> None:
    structure = discover(tiny_llama(layers=4))
    ffn = structure.groups["model.layers.3.mlp:ffn"]
    assert ffn.num_units == 48
    assert ffn.layer == 3
    assert ffn.fields == {"intermediate_size": 1}
    assert set(ffn.members) == {
        Member("model.layers.3.mlp.gate_proj.weight", 0, ((0, 1),), "out"),
        Member("model.layers.3.mlp.up_proj.weight", 0, ((0, 1),), "out"),
        Member("model.layers.3.mlp.down_proj.weight", 1, ((0, 1),), "in"),
    }
    groups = structure.groups["model.layers.2.self_attn:kv_groups"]
    assert groups.num_units == 2
    assert groups.fields == {"num_key_value_heads": 1, "num_attention_heads": 2}
    assert set(groups.members) == {
        Member("model.layers.2.self_attn.q_proj.weight", 0, ((0, 16),), "out"),
        Member("model.layers.2.self_attn.k_proj.weight", 0, ((0, 8),), "out"),
        Member("model.layers.2.self_attn.v_proj.weight", 0, ((0, 8),), "out"),
        Member("model.layers.2.self_attn.o_proj.weight", 1, ((0, 16),), "in"),
    }
    heads = structure.groups["model.layers.0.self_attn:heads"]
    assert heads.num_units == 4
    assert heads.num_parts == 2
    assert heads.pins == {"head_dim": 8}


def test_the_order_of_units_in_fused_tensors_is_found() -> None:
    structure = discover(randomised(build("phi3")))
    members = {member.name: member for member in structure.groups["model.layers.0.mlp:ffn"].members}
    assert members["model.layers.0.mlp.gate_up_proj.weight"].runs == ((0, 1), (48, 1))
    members = {member.name: member for member in structure.groups["model.layers.0.self_attn:kv_groups"].members}
    # query heads of a group: 2 of size 8; then all keys, then all values
    assert members["model.layers.0.self_attn.qkv_proj.weight"].runs == ((0, 16), (32, 8), (48, 8))


def test_an_unlikely_order_is_found_by_trying() -> None:
    """GPT-OSS lays gate and up of one unit side by side, unlike everybody else."""
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=2)
    structure = discover(randomised(GptOssForCausalLM(config)), kinds=("ffn",))
    members = {member.name: member for member in structure.groups["model.layers.0.mlp.experts.1:ffn"].members}
    assert members["model.layers.0.mlp.experts.gate_up_proj"].runs == ((0, 2),)
    assert members["model.layers.0.mlp.experts.gate_up_proj_bias"].runs == ((0, 2),)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("gpt2", "heads", "the head size is not a field of its own"),
        ("gpt_neox", "hidden", "subtracts the mean over all channels"),
        ("mamba", "ffn", "no field of the configuration counts FFN units"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(name: str, kind: str, reason: str) -> None:
    structure = discover(randomised(build(name)))
    with pytest.raises(ValueError, match=reason) as error:
        structure.of_kind(kind)
    assert "what can be cut" in str(error.value)


def test_vision_encoders_read_pixels() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = randomised(ViTForImageClassification(config))
    structure = discover(model)
    assert "ffn" in structure.kinds
    assert "layers" in structure.kinds
    plan = Plan(cuts=tuple(Cut(g.key, tuple(range(24))) for g in structure.of_kind("ffn")), layers=(0, 2))
    small = shrink(model, plan, structure=structure)
    assert small.config.intermediate_size == 24
    assert small.config.num_hidden_layers == 2


def test_alike_blocks_are_proven_on_two_of_them() -> None:
    few, many = discover(tiny_llama(layers=3)), discover(tiny_llama(layers=7))
    assert many.stack is not None
    assert many.stack.removable == tuple(range(7))
    assert len(many.groups) - 1 == 7 * (len(few.groups) - 1) // 3
    hidden = many.groups["residual:hidden"]
    assert {member.name for member in hidden.members} == set(tiny_llama(layers=7).state_dict())


def test_a_model_without_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no configuration"):
        discover(tiny_mlp(), {"input": torch.zeros(1, 8)})


def test_a_model_that_is_not_what_its_configuration_says_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match="does not describe the model"):
        discover(model)


def test_a_probe_that_sees_nothing_proves_nothing() -> None:
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    structure = discover(model)
    assert "ffn" not in structure.kinds
    assert "nothing that the probe can see" in structure.refused["ffn"]


def test_position_dependent_blocks_are_only_removable_where_that_is_exact() -> None:
    model = randomised(GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k})))
    structure = discover(model)
    assert structure.stack is not None
    with pytest.raises(ValueError, match="ascending numbers from 0 to 2"):
        shrink(model, Plan(layers=(1, 0)), structure=structure)
    fixed = dataclasses.replace(structure, stack=dataclasses.replace(structure.stack, kept_always={1: "it is special"}))
    with pytest.raises(ValueError, match="layer 1 cannot be removed: it is special"):
        shrink(model, Plan(layers=(0, 2)), structure=fixed)


def test_only_the_kinds_asked_for_are_looked_for() -> None:
    structure = discover(tiny_llama(layers=3), kinds=("ffn",))
    assert structure.kinds == ("ffn",)
    assert structure.groups.keys() == {f"model.layers.{layer}.mlp:ffn" for layer in range(3)}
    with pytest.raises(ValueError, match="layers were not looked for"):
        shrink(tiny_llama(layers=3), Plan(layers=(0, 1)), structure=structure)


@needs_stacked_experts
def test_removed_experts_get_no_tokens() -> None:
    """The masked model equals one whose router never chooses the removed experts, worked by hand."""
    model = randomised(build("qwen3_moe"))
    structure = discover(model, kinds=("experts",))
    group = structure.of_kind("experts")[0]
    assert group.num_units == 4
    plan = Plan(cuts=tuple(Cut(g.key, (0, 2, 3)) for g in structure.of_kind("experts")))
    hidden_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    router = model.model.layers[0].mlp.gate
    with masked(model, structure, plan), torch.no_grad():
        _, weights_TK, chosen_TK = router(hidden_TD)
    logits_TE = hidden_TD @ router.weight.T
    logits_TE[:, 1] = -torch.inf
    share_TK, expected_TK = logits_TE.softmax(-1).topk(2, dim=-1)
    assert torch.equal(chosen_TK, expected_TK)
    del weights_TK, share_TK
    small = shrink(model, plan, structure=structure)
    assert small.config.num_experts == 3


class PlacedConfig(LlamaConfig):
    model_type = "placed_llama"
    window: int = 20
    stripe: int = 2


class Placed(LlamaForCausalLM):
    """Every `stripe`-th block, by its place, sees the last `window` tokens alone; nothing in the blocks says so."""

    config_class = PlacedConfig

    def __init__(self, config: PlacedConfig) -> None:
        super().__init__(config)
        for idx, layer in enumerate(self.model.layers):
            if idx % config.stripe == config.stripe - 1:
                layer.self_attn.register_forward_pre_hook(windowed(config), with_kwargs=True)


def windowed(config: PlacedConfig) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = kwargs["hidden_states"].shape[1]
        back = torch.arange(size)[:, None] - torch.arange(size)[None]
        hidden = (back < 0) | (back >= config.window)
        kwargs["attention_mask"] = torch.zeros(size, size).masked_fill(hidden, -1e9)[None, None]
        return args, kwargs

    return hook


@pytest.mark.parametrize(("stripe", "removable"), [(2, (4,)), (3, (3, 4))])
def test_blocks_that_differ_by_their_place_stay(stripe: int, removable: tuple[int, ...]) -> None:
    """A window shows only in a text that is longer; a stripe of three only in more blocks than stand for all."""
    config = PlacedConfig(**(SIZES | {"num_hidden_layers": 5}), stripe=stripe)
    structure = discover(randomised(Placed(config)), kinds=("layers",))
    assert structure.stack is not None
    assert structure.stack.removable == removable
    assert all("computes something else" in reason for reason in structure.stack.kept_always.values())


@pytest.mark.parametrize("kind", ["norms over heads too", "norms of the stream alone"])
def test_only_constants_of_norms_over_the_stream_change(kind: str) -> None:
    """The norms over queries and keys of a Qwen 3 have the same constant, which is to stay as it is."""
    torch.manual_seed(0)
    is_shared = kind == "norms over heads too"
    sizes = SIZES | {"head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)) if is_shared else LlamaForCausalLM(LlamaConfig(**sizes))
    structure = discover(randomised(model), kinds=("hidden",))
    (group,) = structure.of_kind("hidden")
    assert group.epsilons == (() if is_shared else ("rms_norm_eps",))
    small = shrink(model, Plan(cuts=(Cut(group.key, tuple(range(16))),)), structure=structure)
    assert small.config.rms_norm_eps == model.config.rms_norm_eps * (1 if is_shared else 2)


class Initialised(LlamaForCausalLM):
    """A class with an `initialize_weights` of its own."""

    def initialize_weights(self) -> None:
        super().initialize_weights()


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Initialised])
def test_classes_are_left_as_they_were(model_class: type[LlamaForCausalLM]) -> None:
    before = dict(vars(model_class))
    model = randomised(model_class(LlamaConfig(**SIZES)))
    discover(model, kinds=("ffn",))
    assert dict(vars(model_class)) == before
    with pytest.raises(ValueError, match="cannot be built"):
        discover(Unbuildable(LlamaConfig(**SIZES), is_first=True))
    assert "initialize_weights" not in vars(Unbuildable)


class Unbuildable(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig, *, is_first: bool = False) -> None:
        super().__init__(config)
        if not is_first:
            raise ValueError("once is enough")


class Tied(LlamaForCausalLM):
    """Runs only at the FFN width that it was written for."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        result = super().forward(input_ids, **kwargs)
        result.logits = result.logits + torch.zeros(48) @ self.model.layers[0].mlp.up_proj.weight.sum(1)
        return result


def test_refusals_name_a_cause_and_no_shapes_of_torch() -> None:
    structure = discover(randomised(Tied(LlamaConfig(**SIZES))), kinds=("ffn",))
    reason = structure.refused["ffn"]
    assert reason.startswith("Tied with half of intermediate_size does not run (RuntimeError)")
    assert "48" not in reason
    assert len(reason) < 300


def test_a_model_whose_outputs_are_undefined_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(ValueError, match="LlamaForCausalLM gives infinite or undefined outputs on the probe"):
        discover(model, kinds=("ffn",))


def test_a_field_that_counts_nothing_is_forgotten_once_another_is_found() -> None:
    class Config(LlamaConfig):  # type: ignore[misc]
        def to_dict(self) -> dict[str, Any]:
            return {"dim": 7} | super().to_dict()

    structure = discover(randomised(LlamaForCausalLM(Config(**SIZES))), kinds=("hidden",))
    assert structure.kinds == ("hidden",)
    assert "hidden" not in structure.refused
