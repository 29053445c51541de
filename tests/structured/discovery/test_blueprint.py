"""What a configuration builds and what its fields change; shapes of a Llama worked by hand."""

import pytest

from lightning_prune.structured.discovery.blueprint import Blueprint, edited, leaves
from lightning_prune.structured.discovery.fields import Fields
from lightning_prune.structured.discovery.layouts import layouts
from lightning_prune.structured.discovery.roles import Dimension, Roles, partition
from tests.structured.families import build
from tests.tiny_models import CHECKS_SIZES, tiny_family, tiny_llama, tiny_mlp


def test_doubling_the_ffn_width_changes_three_tensors_of_a_block() -> None:
    blueprint = Blueprint(tiny_llama(layers=1))
    change = blueprint.change({("intermediate_size",): 96})
    assert change == {
        ("model.layers.0.mlp.gate_proj.weight", 0): (48, 96),
        ("model.layers.0.mlp.up_proj.weight", 0): (48, 96),
        ("model.layers.0.mlp.down_proj.weight", 1): (48, 96),
    }
    assert set(change.per_unit(48, 2).values()) == {1}
    assert blueprint.change({("vocab_size",): 64}) == {}


@pytest.mark.skipif(not CHECKS_SIZES, reason="Transformers 4 builds sizes that do not fit")
def test_what_builds_nothing_says_why() -> None:
    blueprint = Blueprint(tiny_llama())
    assert blueprint.shapes_with({("num_attention_heads",): 5}) is None
    assert "multiple of the number of attention" in blueprint.why_not({("num_attention_heads",): 5})


def test_a_model_without_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="no configuration it is built from"):
        Blueprint(tiny_mlp())


def test_nested_values() -> None:
    values = {"a": 1, "text": {"b": 2, "names": {0: "x"}}}
    assert dict(leaves(values)) == {("a",): 1, ("text", "b"): 2}
    assert edited(values, {("text", "b"): 3})["text"]["b"] == 3
    assert values["text"] == {"b": 2, "names": {0: "x"}}


def test_an_unset_ffn_width_is_read_off_the_shapes() -> None:
    counts = {count.name: count.value for count in Fields(Blueprint(tiny_family("gpt2"))).counts()}
    assert counts["n_inner"] == 128  # four times 32


def test_the_head_size_is_pinned_where_the_class_knows_it() -> None:
    llama, gpt2 = Fields(Blueprint(tiny_llama())), Fields(Blueprint(tiny_family("gpt2")))
    assert llama.all_pins() == {("head_dim",): 8}
    assert gpt2.all_pins() == {}


def test_norms_are_known_by_what_they_do() -> None:
    assert Roles(tiny_llama()).norm("model.norm.weight") == ("rms", 0.0)
    assert Roles(build("gemma2")).norm("model.norm.weight") == ("rms", 1.0)
    assert Roles(tiny_family("gpt2")).norm("transformer.ln_f.weight") == ("mean", 0.0)
    assert Roles(build("qwen2")).norm("model.layers.0.self_attn.q_proj.bias") == (None, 0.0)


def test_dimensions_are_told_apart_by_module() -> None:
    roles = Roles(tiny_family("gpt2"))
    assert roles.role("transformer.h.0.mlp.c_fc.weight", 1) == "out"  # stored as (in, out)
    assert roles.role("transformer.h.0.mlp.c_fc.weight", 0) == "in"
    assert roles.role("transformer.wte.weight", 1) == "out"
    assert Roles(tiny_llama()).role("model.layers.0.mlp.down_proj.weight", 1) == "in"


def test_modules_that_read_and_write_are_split_as_far_as_possible() -> None:
    def dimension(name: str, role: str) -> Dimension:
        return Dimension(name, 0, 1, 0, role)

    experts = [
        dimension(f"mlp.experts.{i}.{leaf}.weight", role)
        for i in (0, 1)
        for leaf, role in (("up", "out"), ("down", "in"))
    ]
    found = dict(partition([*experts, dimension("shared.up.weight", "out"), dimension("shared.down.weight", "in")]))
    assert set(found) == {"mlp.experts.0", "mlp.experts.1", "shared"}
    block = [
        dimension("layer.fc1.weight", "out"),
        dimension("layer.fc1.bias", "vector"),
        dimension("layer.fc2.weight", "in"),
    ]
    assert list(dict(partition(block))) == ["layer"]
    assert dict(partition(block[:2])) == {}


def test_orders_of_units_in_fused_tensors() -> None:
    gate_up = Dimension("gate_up", 0, 2, 0, "out")
    assert list(layouts(gate_up, 5, parts_first=True)) == [((0, 1), (5, 1)), ((0, 2),)]
    assert list(layouts(gate_up, 5, parts_first=False)) == [((0, 2),), ((0, 1), (5, 1))]
    qkv = Dimension("qkv", 0, 8, 0, "out")  # of each key/value group: 4 query entries, 2 key, 2 value
    first = next(layouts(qkv, 3, parts_first=False, query_size=4))
    assert first == ((0, 4), (12, 2), (18, 2))
