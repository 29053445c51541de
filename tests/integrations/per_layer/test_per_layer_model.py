"""Models with per-layer shapes compute what the masked parent does, and behave as their stock class in all else."""

import copy
import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_prune.integrations.per_layer import per_layer_build, per_layer_share
from lightning_prune.integrations.per_layer.per_layer_build import build_per_layer
from lightning_prune.integrations.per_layer.per_layer_model import Nothing
from lightning_prune.integrations.per_layer.per_layer_source import per_layer_classes
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Plan, Share, zeroed
from tests.integrations.per_layer_families import FAMILIES, SKIP, parent, ragged, tiny, tokens
from tests.tiny_models import knows_shapes_per_block, recompute_activations


@functools.cache
def child(name: str, *, skip: bool = True) -> PreTrainedModel:
    """Return a model with blocks of four shapes; shared by the tests, so leave it as it is."""
    model, structure = parent(name)
    small = build_per_layer(model, structure, ragged(structure, skip=SKIP if skip else ()))
    assert isinstance(small, PreTrainedModel)
    return small


def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_have_the_sizes_of_the_plan_and_the_output_of_the_masked_parent(name: str) -> None:
    model, structure = parent(name)
    plan = ragged(structure)
    small = child(name, skip=False)
    shapes = {key: tensor.shape for key, tensor in small.state_dict().items()}
    readers = [group.readers[0] for group in structure.groups.values() if group.kind == "ffn"]
    assert [shapes[reader.name][reader.dim] for reader in readers] == [22, 19, 16, 13]
    with zeroed(model, structure.groups, plan.cuts):
        expected = logits(model, tokens())
    torch.testing.assert_close(logits(small, tokens()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [Plan(skip=SKIP), Plan(share=(Share(1, 0, 3),))], ids=["shapes", "shares"])
def test_blocks_are_proven_over_more_tokens_than_a_window(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral", sliding_window=8)

    class Shortsighted(Blueprint):
        def configuration(self, edits: Any) -> Any:
            return super().configuration({**edits, ("sliding_window",): 7})

    def filled(*args: Any, **kwargs: Any) -> nn.Module:
        shared = fill(*args, **kwargs)
        shared.config.sliding_window = 7
        return shared

    fill = per_layer_share._filled
    build_per_layer(model, None, plan)
    monkeypatch.setattr(per_layer_build, "Blueprint", Shortsighted)
    monkeypatch.setattr(per_layer_share, "_filled", filled)
    with pytest.raises(RuntimeError, match=r"differs from the (masked )?one"):
        build_per_layer(model, None, plan)


ATTENTION_OUT = {
    "gpt_neox": "attention.dense",
    "gpt2": "attn.c_proj",
    "phi": "self_attn.dense",
    "opt": "self_attn.out_proj",
}
MLP_OUT = {"gpt_neox": "mlp.dense_4h_to_h", "gpt2": "mlp.c_proj", "phi": "mlp.fc2", "opt": "fc2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_skipped_parts_equal_output_projections_of_zero(name: str) -> None:
    model, structure = parent(name)
    small = build_per_layer(model, structure, Plan(skip=SKIP))
    zero = tiny(name)
    blocks = zero.get_submodule(structure.stack.containers[0])  # type: ignore[union-attr]
    for block, path in (
        (0, ATTENTION_OUT.get(name, "self_attn.o_proj")),
        (2, MLP_OUT.get(name, "mlp.down_proj")),
    ):
        for parameter in blocks[block].get_submodule(path).parameters():  # type: ignore[index]
            nn.init.zeros_(parameter)
    torch.testing.assert_close(logits(small, tokens()), logits(zero, tokens()), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_parameter_is_without_gradient(name: str) -> None:
    small = build_per_layer(*parent(name), Plan(skip=SKIP))
    small(input_ids=tokens(), labels=tokens()).loss.backward()
    assert [n for n, p in small.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_without_parts_keeps_nothing_but_what_all_blocks_share(name: str) -> None:
    small = build_per_layer(*parent(name), Plan(skip=((1, "attention"), (1, "mlp"))))
    ids = tokens()
    small(input_ids=ids, labels=ids).loss.backward()
    assert [n for n, p in small.named_parameters() if p.grad is None] == []
    stack = parent(name)[1].stack
    assert stack is not None
    assert not list(small.get_submodule(f"{stack.containers[0]}.1").parameters())
    again = type(small)(type(small.config).from_dict(small.config.to_dict())).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(logits(again, ids), logits(small, ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_cache_equals_generation_without(name: str) -> None:
    small = child(name)
    mask = torch.ones_like(tokens())
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with_cache = small.generate(tokens(), use_cache=True, **options)
    assert with_cache.shape == (2, 20)
    assert torch.equal(with_cache, small.generate(tokens(), use_cache=False, **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_in_two_chunks_equals_reading_at_once(name: str) -> None:
    small, ids = child(name), tokens()
    with torch.no_grad():
        first = small(input_ids=ids[:, :5], use_cache=True)
        second = small(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    both = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(both, logits(small, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_does_not_change_what_is_generated(name: str) -> None:
    small, ids = child(name), tokens(1, 7)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = small.generate(ids, attention_mask=torch.ones_like(ids), **options)
    other = tokens(1, 11, seed=5)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1), other])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    together = small.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[0, 11:], alone[0, 7:])


def test_beam_search_and_eager_attention_agree_with_the_uncached_and_fused_forms() -> None:
    small = build_per_layer(*parent("llama"), ragged(parent("llama")[1], skip=SKIP))
    ids, options = tokens(), {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with_cache = small.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(with_cache, small.generate(ids, attention_mask=mask, use_cache=False, **options))
    fused = logits(small, ids)
    small.set_attn_implementation("eager")
    attentions = [m for m in small.modules() if hasattr(m, "layer_idx")]
    assert {module.config._attn_implementation for module in attentions} == {"eager"}
    torch.testing.assert_close(logits(small, ids), fused, rtol=1e-4, atol=1e-4)


def test_attentions_that_are_left_take_the_first_places_in_the_cache() -> None:
    small = build_per_layer(*parent("llama"), Plan(skip=((0, "attention"), (2, "attention"))))
    places = [getattr(block.self_attn, "layer_idx", None) for block in small.model.layers]
    assert places == [None, 0, None, 1]
    assert isinstance(small.model.layers[0].self_attn, Nothing)


def test_places_in_the_cache_are_handed_out_within_each_type_of_attention() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    model = tiny("qwen2", layer_types=types, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    structure = discover(model)
    small = build_per_layer(model, structure, Plan(skip=((0, "attention"),)))
    assert [getattr(block.self_attn, "layer_idx", None) for block in small.model.layers] == [None, 1, 0, 3]
    with torch.no_grad():
        first = small(input_ids=tokens()[:, :7], use_cache=True)
        second = small(input_ids=tokens()[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    both = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(both, logits(small, tokens()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no attention of type sliding_attention is left"):
        build_per_layer(model, structure, Plan(skip=((0, "attention"), (2, "attention"))))


def test_layers_and_parts_go_in_one_plan() -> None:
    model, structure = parent("llama")
    small = build_per_layer(model, structure, ragged(structure, layers=(0, 1, 3), skip=((0, "attention"), (3, "mlp"))))
    assert small.config.num_hidden_layers == 3
    assert small.config.skipped(0) == ["attention"]
    assert small.config.skipped(2) == ["mlp"]
    assert [small.config.per_layer_config[i].intermediate_size for i in (0, 1)] == [22, 19]
    assert small.config.to_dict()["per_layer_config"]["2"]["intermediate_size"] is None


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("opt", marks=pytest.mark.slow)]
)
def test_a_pruned_model_can_be_pruned_again(name: str) -> None:
    small = child(name)
    structure = discover(small)
    assert structure.stack is not None
    assert structure.stack.removable == (0, 1, 2, 3)
    widths = {group.layer: group for group in structure.groups.values() if group.kind == "ffn"}
    assert {layer: group.num_units for layer, group in widths.items()} == {0: 22, 1: 19, 3: 13}
    cuts = (Cut(widths[0].key, tuple(range(20))), Cut(widths[3].key, tuple(range(5, 13))))
    again = build_per_layer(small, structure, Plan(cuts=cuts, layers=(0, 2, 3), skip=((2, "attention"),)))
    assert again.config.skipped(0) == ["attention"]
    assert again.config.skipped(1) == ["attention", "mlp"]
    found = {group.layer: group.num_units for group in discover(again).groups.values() if group.kind == "ffn"}
    assert found == {0: 20, 2: 8}


class ReadsPerLayer(LlamaForCausalLM):
    """Builds each block from the configuration that Transformers' own `per_layer_config` gives for it."""

    def __init__(self, config: LlamaConfig) -> None:
        values = {name: value for name, value in config.to_dict().items() if name != "per_layer_config"}
        super().__init__(LlamaConfig.from_dict(values))
        self.config = config
        self.model.layers = nn.ModuleList(
            LlamaDecoderLayer(config.per_layer_config[layer], layer) for layer in range(config.num_hidden_layers)
        )


@knows_shapes_per_block
def test_a_class_that_reads_shapes_per_block_stays_what_it_is() -> None:
    model = ReadsPerLayer(tiny("llama").config).eval()
    structure = discover(model)
    cuts = tuple(Cut(group.key, tuple(range(5 + group.layer))) for group in structure.of_kind("ffn"))
    small = build_per_layer(model, structure, Plan(cuts=cuts))
    assert type(small) is ReadsPerLayer
    assert small.config.to_dict()["per_layer_config"] == {str(i): {"intermediate_size": 5 + i} for i in range(4)}


def test_embeddings_can_be_resized_and_training_goes_on() -> None:
    small = build_per_layer(*parent("llama"), ragged(parent("llama")[1], skip=SKIP)).train()
    before = logits(small, tokens())
    small.resize_token_embeddings(70)
    assert small.config.vocab_size == 70
    torch.testing.assert_close(logits(small, tokens())[..., :64], before)
    twin = copy.deepcopy(small)
    recompute_activations(small)
    ids = tokens()
    losses = []
    for model in (small, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    recomputed, kept = losses[:5], losses[5:]
    assert recomputed == pytest.approx(kept, abs=1e-6)
    assert kept == sorted(kept, reverse=True)


def test_adapters_go_on_top() -> None:
    small = build_per_layer(*parent("llama"), ragged(parent("llama")[1], skip=SKIP))
    before = logits(small, tokens())
    adapted = get_peft_model(small, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    assert torch.equal(logits(adapted, tokens()), before)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * (3 + 3)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), tokens()), before)


def test_a_configuration_survives_its_dictionary() -> None:
    config = child("llama").config
    again = type(config).from_dict(config.to_dict())
    assert again.layer_overrides == config.layer_overrides
    assert again.to_dict() == config.to_dict()
    fewer = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 2, "per_layer_index": [1, 3]})
    assert fewer.layer_overrides == {0: config.layer_overrides[1], 1: config.layer_overrides[3]}


def test_head_counts_need_not_divide_the_hidden_size() -> None:
    config_class, model_class = per_layer_classes(type(parent("llama")[0]))
    fields = parent("llama")[0].config.to_dict() | {"block_lists": ["layers"], "num_key_value_heads": 3}
    fields = {name: value for name, value in fields.items() if name != "model_type"}
    model = model_class(config_class.from_dict({**fields, "num_attention_heads": 3}))
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (24, 32)
    again = config_class.from_dict(model.config.to_dict())
    if hasattr(again, "validate"):  # in Transformers 5
        again.validate()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(cuts=(Cut("model.layers.0.mlp:ffn", ()),)), "nothing of model.layers.0.mlp:ffn would be left"),
        (Plan(cuts=(Cut("model.layers.9.mlp:ffn", (0,)),)), "the model has no group"),
        (Plan(skip=((4, "mlp"),)), "skip must name a block from 0 to 3"),
        (Plan(skip=((0, "norm"),)), "one of attention, mlp"),
        (Plan(skip=tuple((layer, "attention") for layer in range(4))), "no attention is left"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_per_layer(*parent("llama"), plan)


def test_a_configuration_with_entries_for_missing_blocks_is_refused() -> None:
    config = child("llama").config
    with pytest.raises(ValueError, match="per_layer_config is of blocks"):
        type(config).from_dict({**config.to_dict(), "per_layer_index": None, "num_hidden_layers": 2})


def test_copies_and_static_caches_work() -> None:
    small = copy.deepcopy(child("llama"))
    assert torch.equal(logits(small, tokens()), logits(child("llama"), tokens()))
    options = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 6, "do_sample": False}
    expected = small.generate(tokens(), **options)
    assert torch.equal(small.generate(tokens(), cache_implementation="static", **options), expected)
    small.set_attn_implementation("eager")
    assert child("llama").model.layers[1].self_attn.config._attn_implementation == "sdpa"
