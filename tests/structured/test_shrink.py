"""Cutting, saving, loading and using smaller models; what is refused leaves the model as it was."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from lightning_prune.structured.build import build_smaller, check_whole
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.in_place import cut_in_place
from lightning_prune.structured.shrink import masked, promised, shrink
from lightning_prune.structured.structure import Structure
from tests.structured.families import SIZES, build, randomised
from tests.tiny_models import tiny_llama

FAMILIES = (
    "llama",
    "llama, biased, untied",
    "llama, one key/value head",
    "qwen2",
    "mistral",
    "phi3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "opt",
)


def some_of_everything(structure: Structure) -> Plan:
    """Cut a third of the FFN units, one query head of every key/value group, and the middle block."""
    cuts = []
    for group in structure.groups.values():
        size = group.num_units // group.num_parts
        if group.kind == "ffn":
            cuts.append(Cut(group.key, tuple(unit for unit in range(group.num_units) if unit % 3)))
        if group.kind == "heads" and size > 1:
            keep = tuple(unit for unit in range(group.num_units) if unit % size or size == 4)
            cuts.append(Cut(group.key, keep if size < 4 else (1, 3)))
    return (
        Plan(cuts=tuple(cuts), layers=(0, 2))
        if structure.stack and structure.stack.num_layers > 2
        else Plan(tuple(cuts))
    )


@pytest.fixture(params=FAMILIES)
def parent(request: pytest.FixtureRequest) -> PreTrainedModel:
    return randomised(build(request.param))


@torch.no_grad()
def logits(model: PreTrainedModel, ids_NT: Tensor, **more: object) -> Tensor:
    return model(input_ids=ids_NT, **more).logits


def test_saved_and_loaded_it_computes_and_generates_the_same(parent: PreTrainedModel, tmp_path: Path) -> None:
    structure = discover(parent)
    plan = Plan.from_dict(json.loads(json.dumps(some_of_everything(structure).as_dict())))
    small = shrink(parent, plan, structure=structure)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_NT = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    assert type(loaded) is type(parent)
    assert torch.equal(logits(loaded, ids_NT), logits(small, ids_NT))
    with masked(parent, structure, plan):
        torch.testing.assert_close(logits(small, ids_NT), logits(parent, ids_NT), atol=1e-5, rtol=0)

    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    cached = loaded.generate(ids_NT, **options)
    assert torch.equal(cached, loaded.generate(ids_NT, use_cache=False, **options))
    padded_NT = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids_NT], dim=1)
    mask_NT = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids_NT)], dim=1)
    assert torch.equal(loaded.generate(padded_NT, attention_mask=mask_NT, **options)[:, 3:], cached)

    first = loaded(input_ids=ids_NT[:, :5], use_cache=True)
    second = loaded(input_ids=ids_NT[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    chunked = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(chunked, logits(loaded, ids_NT), atol=1e-4, rtol=0)


def test_keeping_everything_is_refused(parent: PreTrainedModel) -> None:
    structure = discover(parent)
    everything = tuple(Cut(group.key, tuple(range(group.num_units))) for group in structure.groups.values())
    with pytest.raises(ValueError, match=f"removes nothing: all units of the {len(everything)} groups"):
        shrink(parent, Plan(cuts=everything), structure=structure)


def test_the_smaller_model_can_be_trained_resized_and_cut_again() -> None:
    parent = randomised(build("llama"))
    small = shrink(parent, Plan(layers=(0, 2)))
    ids_NT = torch.randint(4, 64, (2, 9))
    small.resize_token_embeddings(70)
    small.train()
    small(input_ids=ids_NT, labels=ids_NT).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    small.eval()
    structure = discover(small)
    again = shrink(
        small, Plan(tuple(Cut(g.key, tuple(range(16))) for g in structure.of_kind("ffn"))), structure=structure
    )
    assert again.config.intermediate_size == 16
    assert again.config.vocab_size == 70


def test_consuming_gives_the_same_model_and_frees_the_parent() -> None:
    parent = randomised(build("llama"))
    structure = discover(parent)
    plan = some_of_everything(structure)
    expected = shrink(parent, plan, structure=structure).state_dict()
    small = shrink(parent, plan, structure=structure, consume=True)
    assert all(torch.equal(value, expected[name]) for name, value in small.state_dict().items())
    kept = {name for name in parent.state_dict() if not name.startswith("model.layers.1.")}
    assert all(value.numel() == 0 for name, value in parent.state_dict().items() if name in kept)


@pytest.mark.parametrize("consume", [False, True])
def test_a_wrong_cut_is_noticed_also_where_the_parent_is_consumed(consume: bool) -> None:
    """A structure that claims a wrong order of units is caught by the comparison with the masked model."""
    parent = randomised(build("phi3"))
    structure = discover(parent, kinds=("ffn",))
    wrong = {
        key: dataclasses.replace(
            group,
            members=tuple(
                dataclasses.replace(member, runs=((0, 2),)) if "gate_up" in member.name else member
                for member in group.members
            ),
        )
        for key, group in structure.groups.items()
    }
    plan = Plan(cuts=tuple(Cut(key, tuple(range(24))) for key in wrong))
    with pytest.raises(RuntimeError, match=r"differs from the masked one by .* over 6 tokens"):
        shrink(parent, plan, structure=Structure(wrong, structure.stack), consume=consume)


def test_a_cut_is_proven_over_more_tokens_than_a_window() -> None:
    """A structure that says the blocks of a windowed model may go in any order is caught beyond the window."""
    parent = randomised(build("gemma2"))  # windows of 8 tokens in every other block
    structure = discover(parent, kinds=("layers",))
    assert structure.stack is not None
    fixed = dataclasses.replace(structure.stack, lists=())
    types = parent.config.layer_types
    parent.config.layer_types = [*types[:2], types[0]]
    with pytest.raises((RuntimeError, ValueError), match=r"over 10 tokens|layer_types"):
        shrink(parent, Plan(layers=(1, 2)), structure=Structure({}, fixed))


def test_what_is_promised_is_simulated_block_by_block() -> None:
    parent = randomised(build("llama"))
    structure = discover(parent)
    plan = some_of_everything(structure)
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    seen: list[tuple[float, float]] = []  # is a removed unit of each of two blocks zero while block 0 runs?
    up = [parent.model.layers[idx].mlp.up_proj.weight for idx in (0, 2)]
    watch = parent.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: seen.append(tuple(float(weight[0].detach().abs().sum()) for weight in up))
    )
    ids = {"input_ids": torch.arange(4, 14)[None]}
    (got,) = promised(parent, structure, plan, [ids])
    watch.remove()
    assert seen[0][0] == 0
    assert seen[0][1] > 0
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())
    with masked(parent, structure, plan):
        assert torch.equal(got, logits(parent, ids["input_ids"], use_cache=False))
    broken = parent.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        promised(parent, structure, plan, [ids])
    broken.remove()
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())


def test_heads_of_removed_key_value_groups_go_with_them() -> None:
    parent = randomised(build("qwen2"))
    structure = discover(parent)
    attention = [group.name for group in structure.of_kind("kv_groups")]
    plan = Plan(cuts=tuple(Cut(f"{name}:kv_groups", (1,)) for name in attention))
    both = Plan(cuts=plan.cuts + tuple(Cut(f"{name}:heads", (1, 2)) for name in attention))
    assert shrink(parent, plan, structure=structure).config.num_attention_heads == 2
    small = shrink(parent, both, structure=structure)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (1, 1, 8)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((Cut("model.layers.0.mlp:ffn", ()),), "nothing of model.layers.0.mlp:ffn would be left"),
        ((Cut("model.layers.0.mlp:ffn", (0, 0)),), "each at most once"),
        ((Cut("model.layers.0.mlp:ffn", (48,)),), "units 0 to 47"),
        ((Cut("model.layers.0.mlp:heads", (0,)),), "it has model.layers.0.mlp:ffn"),
        ((Cut("model.layers.0.self_attn:heads", (0, 1)),), r"equally many .* got \[2, 0\]"),
        ((Cut("model.layers.0.mlp:ffn", tuple(range(8))),), "one value for all.*uniform budget"),
    ],
)
def test_plans_that_do_not_fit_are_refused(cuts: tuple[Cut, ...], message: str) -> None:
    parent = randomised(build("llama"))
    before = copy.deepcopy(parent.state_dict())
    with pytest.raises(ValueError, match=message):
        shrink(parent, Plan(cuts=cuts))
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())


def test_head_counts_that_the_class_does_not_take_are_refused() -> None:
    parent = randomised(build("llama"))  # hidden size 32
    structure = discover(parent)
    three = tuple(Cut(group.key, (0, 1, 2)) for group in structure.of_kind("heads"))
    with pytest.raises(ValueError, match="equally many"):
        shrink(parent, Plan(cuts=three), structure=structure)


def test_sub_blocks_need_per_layer_shapes() -> None:
    with pytest.raises(ValueError, match="export with per-layer shapes"):
        shrink(tiny_llama(), Plan(skip=((0, "attention"),)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_cannot_be_cut_are_refused() -> None:
    compiled = torch.compile(tiny_llama())
    with pytest.raises(ValueError, match="compile the result"):
        check_whole(compiled)
    with torch.device("meta"):
        empty = tiny_llama()
    with pytest.raises(ValueError, match="meta device"):
        check_whole(empty)
    quantized = tiny_llama()
    weight = quantized.model.layers[0].mlp.up_proj.weight.data
    quantized.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight is quantized \(torch.int8\)"):
        check_whole(quantized)
    adapted = tiny_llama()
    adapted.peft_config = {"default": None}
    with pytest.raises(ValueError, match="merge_and_unload"):
        check_whole(adapted)


def test_half_precision_models_keep_their_dtype() -> None:
    parent = randomised(build("llama")).to(torch.bfloat16)
    structure = discover(parent)
    small = build_smaller(parent, structure, Plan(layers=(0,)))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


def test_a_rounded_parent_is_compared_with_exact_frequencies() -> None:
    """Over a window, frequencies rounded by a cast differ more from exact ones than any rounding explains."""
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, head_dim=8, sliding_window=500, max_position_embeddings=600)
    parent = randomised(MistralForCausalLM(config)).to(torch.bfloat16)
    structure = discover(parent, kinds=("layers",))
    with torch.no_grad():
        for layer in parent.model.layers:
            layer.self_attn.q_proj.weight *= 30
            layer.self_attn.o_proj.weight *= 10
    small = shrink(parent, Plan(layers=(0, 1)), structure=structure)
    assert small.config.num_hidden_layers == 2


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize(
    ("plan", "kept"),
    [
        (Plan(), "it cuts no units"),
        (Plan(layers=(0, 1, 2)), "it cuts no units"),
        (Plan(cuts=(Cut("model.layers.0.mlp:ffn", tuple(range(48))),)), "all units of the 1 groups that it names stay"),
    ],
    ids=["empty", "all blocks", "all units"],
)
def test_a_plan_that_removes_nothing_is_refused(plan: Plan, kept: str, consume: bool) -> None:
    model = tiny_llama(layers=3)
    structure = discover(model, kinds=("ffn", "layers"))
    for attempt in (
        lambda: shrink(model, plan, structure=structure, consume=consume),
        lambda: cut_in_place(model, plan, structure=structure),
    ):
        with pytest.raises(ValueError, match=f"the plan removes nothing: {kept}, no block goes and no part"):
            attempt()
    assert model(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()
