"""The merged map against the same map in a hook, exact cases, and golden perplexities of a trained model."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from lightning_prune.structured.depth.bypass import bypassed
from lightning_prune.structured.depth.criteria import NextTokenLoss
from lightning_prune.structured.depth.influence import block_streams, run_distance
from lightning_prune.structured.depth.replace import ReplaceMe, fit_map, merge_map, output_projection
from lightning_prune.structured.groups import Group, Member
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import (
    family_groups,
    llama_groups,
    padded_batches,
    sampled,
    shake,
    stories3m,
    structure_of,
    tiny_model,
)
from tests.tiny_models import VOCAB, tiny_llama

BATCHES = padded_batches(6)
PROJECTIONS = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "bloom": "mlp.dense_4h_to_h",
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCHES[0], use_cache=False).logits


def test_map_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    m_ND = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y_ND = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    expected = torch.linalg.lstsq(m_ND, y_ND).solution
    assert torch.allclose(fit_map(m_ND.T @ m_ND, m_ND.T @ y_ND, ridge=0), expected, atol=1e-12)
    assert torch.allclose(fit_map(m_ND.T @ m_ND, m_ND.T @ m_ND, ridge=0), torch.eye(5).double(), atol=1e-12)
    gram = m_ND.T @ m_ND
    added = 0.1 * gram.diagonal().mean() * torch.eye(5)
    assert torch.allclose(fit_map(gram, gram, ridge=0.1), (gram + added).inverse() @ gram, atol=1e-12)


def test_singular_system_needs_a_ridge() -> None:
    gram = torch.zeros(2, 2, dtype=torch.float64)
    gram[0, 0] = 1
    with pytest.raises(ValueError, match="do not span all 2 channels"):
        fit_map(gram, gram, ridge=0)
    assert fit_map(gram, gram, ridge=1e-9)[0, 0].item() == pytest.approx(1)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_merged_map_equals_the_map_in_a_hook(family: str) -> None:
    model = tiny_model(family)
    projection = find_blocks(model)[0].get_submodule(PROJECTIONS[family])
    map_DD = torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 6
    handle = projection.register_forward_hook(lambda module, args, output: output @ map_DD.float())
    hooked = logits(model)
    handle.remove()
    assert not torch.allclose(logits(model), hooked, atol=1e-2)
    merge_map(projection, map_DD)
    assert torch.allclose(logits(model), hooked, atol=1e-5)


def test_only_linear_layers_take_a_map() -> None:
    with pytest.raises(ValueError, match="into a linear layer, got Embedding"):
        merge_map(nn.Embedding(3, 3), torch.eye(3))


def four_blocks() -> PreTrainedModel:
    model = tiny_llama(layers=4)
    shake(model)
    return model.eval()


def test_only_the_projection_before_the_run_changes() -> None:
    model = four_blocks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = ReplaceMe(num_blocks=1, start=2).plan(model, structure_of(llama_groups(model)), BATCHES)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert plan.layers == (0, 1, 3)
    assert plan.method["name"] == "ReplaceMe"
    assert plan.method["start"] == 2


def test_stream_after_the_cut_is_the_best_fit() -> None:
    model = four_blocks()
    intact_outputs = [block_streams(model, batch) for batch in BATCHES]
    plan = ReplaceMe(num_blocks=2, start=1, ridge=0).plan(model, structure_of(llama_groups(model)), BATCHES)
    fitted, deleted = 0.0, 0.0
    for batch, (_, outputs, mask) in zip(BATCHES, intact_outputs, strict=True):
        _, new, _ = block_streams(model, batch)
        fitted += (new[0][mask] - outputs[2][mask]).double().square().sum().item()
        deleted += (outputs[0][mask] - outputs[2][mask]).double().square().sum().item()
    assert plan.method["unexplained"] == pytest.approx(fitted / deleted, rel=1e-3)
    assert 0 < plan.method["unexplained"] < 1


def test_run_that_is_linear_in_the_update_is_replaced_exactly() -> None:
    # the run adds A u to the stream, with u the update before it: a block that reads u alone does that
    class Adds(nn.Module):
        def __init__(self, *, reads_update: bool) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
            self.reads_update = reads_update

        def forward(self, stream_BTW: Tensor) -> Tensor:  # channels 0-5 the stream, 6-11 the last update
            stream, update = stream_BTW[..., :6], stream_BTW[..., 6:]
            new = update @ self.up.weight[:6] if self.reads_update else self.down(self.up(stream).relu())
            return torch.cat([stream + new, new], -1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 6)
            self.layers = nn.ModuleList([Adds(reads_update=False), Adds(reads_update=True)])

        def forward(self, input_ids: Tensor) -> Any:
            stream = self.embed(input_ids)
            stream = torch.cat([stream, torch.zeros_like(stream)], -1)
            for layer in self.layers:
                stream = layer(stream)
            return type("Output", (), {"logits": stream[..., :6]})()

    torch.manual_seed(0)
    model = Model()
    ids = torch.randint(50, (4, 20))
    expected = model(ids).logits
    moments = []
    model.layers[0].down.register_forward_hook(lambda module, args, output: moments.append(output))
    model(ids)
    update = moments[0].reshape(-1, 6).double()
    target = update + update @ model.layers[1].up.weight[:6].double()
    merge_map(model.layers[0].down, fit_map(update.T @ update, update.T @ target, ridge=0))
    with bypassed(model, [], layers=[1]):
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_start_is_the_run_of_smallest_distance_but_never_the_first_block() -> None:
    model = four_blocks()
    distances = run_distance(model, BATCHES, 1)
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    model.model.layers[0].mlp.down_proj.weight.data *= 1e-3  # the first block does next to nothing
    plan = ReplaceMe(num_blocks=1).plan(model, structure_of(llama_groups(model)), BATCHES)
    assert plan.method["distances"] != distances
    assert min(plan.method["distances"]) == plan.method["distances"][0]
    assert plan.method["start"] == 1 + min(range(3), key=lambda i: plan.method["distances"][i + 1])


def _config(kind: type[Any], **more: Any) -> Any:
    return kind(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def _by_hand(model: PreTrainedModel) -> list[Group]:
    return [
        Group(
            f"model.layers.{i}.mlp",
            "ffn",
            i,
            48,
            (Member(f"model.layers.{i}.mlp.down_proj.weight", 1, ((0, 1),), "in"),),
        )
        for i in range(3)
    ]


def test_norm_or_factor_behind_the_projection_is_refused_before_anything_changes() -> None:
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(_config(Gemma2Config))
    granite = GraniteForCausalLM(_config(GraniteConfig, residual_multiplier=0.22))
    for model in (gemma, granite):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="does not write into the residual stream unchanged"):
            ReplaceMe(num_blocks=1).plan(model, structure_of(_by_hand(model)), BATCHES)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_models_that_cannot_be_merged_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="must write its feed-forward update by one linear layer, got none"):
        output_projection(model, family_groups("qwen3_moe", model), 0)
    llama = four_blocks()
    llama.model.layers[1].mlp.down_proj.weight = llama.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ValueError, match="is shared or sharded"):
        output_projection(llama, llama_groups(llama), 0)


def test_wrong_options_are_refused() -> None:
    model = four_blocks()
    groups = llama_groups(model)
    with pytest.raises(ValueError, match="start must be between 1 and 2, got 0"):
        ReplaceMe(num_blocks=2, start=0).plan(model, structure_of(groups), BATCHES)
    with pytest.raises(ValueError, match="ridge must be 0 or more, got -1"):
        ReplaceMe(num_blocks=2, ridge=-1).plan(model, structure_of(groups), BATCHES)
    with pytest.raises(ValueError, match="num_blocks must be between 1 and 3 for 4 blocks, got 4"):
        ReplaceMe(num_blocks=4).plan(model, structure_of(groups), BATCHES)
    with pytest.raises(ValueError, match="42 tokens are too few to fit a map of 32 channels; give at least 64"):
        ReplaceMe(num_blocks=1).plan(model, structure_of(groups), BATCHES[:2])


@pytest.mark.long
@pytest.mark.parametrize(("num_blocks", "start", "deleted", "replaced"), [(1, 2, 17.7, 8.80), (2, 1, 212, 20.5)])
def test_golden_replacement(num_blocks: int, start: int, deleted: float, replaced: float) -> None:
    model = stories3m()
    calibration, test = sampled(model, seed=1), sampled(model, seed=2)
    evaluate = NextTokenLoss().prepare(model, test)
    run = list(range(start, start + num_blocks))

    def perplexity() -> float:
        return math.exp(evaluate(lambda: bypassed(model, [], layers=run)))

    assert perplexity() == pytest.approx(deleted, rel=0.1)
    plan = ReplaceMe(num_blocks=num_blocks).plan(model, structure_of(llama_groups(model)), calibration)
    assert plan.method["start"] == start
    assert perplexity() == pytest.approx(replaced, rel=0.1)
