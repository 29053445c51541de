"""A block that several places of a model share is one group: its tensors are cut once, for all of them."""

import pytest
import torch
from transformers import PreTrainedModel, ZambaConfig, ZambaForCausalLM

from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.shrink import masked, shrink
from lightning_prune.structured.width.method import Width
from tests.structured.families import randomised

PLACES = ("model.layers.2.shared_transf.feed_forward", "model.layers.4.shared_transf.feed_forward")


@pytest.fixture(scope="module")
def zamba() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 5, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_head_dim": 16, "n_mamba_heads": 2}
    config = ZambaConfig(**sizes, **heads, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1)
    model = randomised(ZambaForCausalLM(config))
    assert model.get_submodule(PLACES[0]).up_proj.weight is model.get_submodule(PLACES[1]).up_proj.weight
    return model


def test_a_shared_block_is_one_group_and_cut_in_all_its_places(zamba: PreTrainedModel) -> None:
    structure = discover(zamba, kinds=("ffn",))
    (group,) = structure.of_kind("ffn")
    assert group.layer is None
    assert {member.name.rpartition(".")[0].rpartition(".")[0] for member in group.members} == set(PLACES)
    plan = Plan(cuts=(Cut(group.key, (1, 2, 5, 7, 11)),))
    small = shrink(zamba, plan, structure=structure)
    first, second = (small.get_submodule(place) for place in PLACES)
    assert first.up_proj.weight is second.up_proj.weight
    assert first.down_proj.weight.shape == (16, 5)
    inputs = probe_inputs(zamba)
    with masked(zamba, structure, plan):
        torch.testing.assert_close(outputs(small, inputs), outputs(zamba, inputs), atol=1e-5, rtol=0)


def test_a_shared_block_is_scored_once_and_not_by_the_inputs_of_one_place(zamba: PreTrainedModel) -> None:
    structure = discover(zamba, kinds=("ffn",))
    mlp = zamba.get_submodule(PLACES[0])
    strength_U = mlp.up_proj.weight.abs().sum(1) + mlp.gate_proj.weight.abs().sum(1) + mlp.down_proj.weight.abs().sum(0)
    best = tuple(sorted(strength_U.topk(9).indices.tolist()))
    batches = [{"input_ids": torch.arange(3, 33)[None]}]
    for options in ({"scorer": Wanda(), "compensate": "none"}, {"scorer": Magnitude()}):
        with pytest.raises(ValueError, match=r"shared_transf\.feed_forward:ffn is used in several places, which see"):
            Width(sparsity={"ffn": 0.25}, **options).plan(zamba, structure, batches, progress=False)
    method = Width(sparsity={"ffn": 0.25}, scorer=Magnitude(), compensate="none")
    plan = method.plan(zamba, structure, [], progress=False)
    assert plan.cuts == (Cut(structure.of_kind("ffn")[0].key, best),)
    assert int(mlp.down_proj.weight.any(0).sum()) == 9
