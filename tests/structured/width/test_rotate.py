"""A rotated model computes the same, a narrow one keeps the strongest directions, and what cannot rotate is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.width.norm_readers import norm_of_readers
from lightning_prune.structured.width.rotate import principal_directions, rotate_and_slice, stream_moments
from lightning_prune.structured.width.subclone import subclone
from tests.processes import Processes
from tests.structured.depth_models import sampled, stories3m
from tests.structured.width_models import calibration, family, logits
from tests.tiny_models import CHECKS_SIZES, needs_stacked_experts, tiny_family


def narrowed(model: Any, size: int, **options: Any) -> tuple[Any, dict[str, Any]]:
    return rotate_and_slice(model, size, options.pop("batches", calibration()), progress=False, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_all_directions_give_the_same_outputs(name: str, tied: bool) -> None:
    model = family(name, tied=tied)
    before = copy.deepcopy(model.state_dict())
    expected = logits(model)
    rotated, description = narrowed(model, 32)
    assert float((logits(rotated) - expected).abs().max()) < 1e-3
    # it is another model: its embedding has turned, and its norms weigh nothing any more
    assert not torch.allclose(rotated.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=1e-2)
    assert rotated.model.norm.weight.unique().tolist() == [0.0 if name == "gemma" else 1.0]
    assert description["was_tied"] is tied
    assert rotated.config.tie_word_embeddings is False
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_a_narrow_model_is_saved_and_loaded_as_a_plain_one(name: str, tmp_path: Path) -> None:
    model = family(name, tied=True)
    small, description = narrowed(model, 24)
    assert (small.config.hidden_size, small.config.head_dim) == (24, 8)
    assert description["hidden_size"] == 24
    assert 0 < description["kept_energy"] < 1
    assert json.loads(json.dumps(description)) == description
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(small))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt = calibration(1, seed=3)[0]["input_ids"]
    cached = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
    plain = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_directions_that_are_never_used_can_go() -> None:
    # all of the stream lies in 20 of 32 dimensions, turned at random so that every channel is used
    model = family("llama")
    basis_DD = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(5)))[0]
    inside_DD = basis_DD[:, :20] @ basis_DD[:, :20].T
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.copy_(parameter @ inside_DD)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(inside_DD @ parameter)
    small, description = narrowed(model, 20)
    torch.testing.assert_close(logits(small), logits(model), atol=1e-3, rtol=1e-3)
    assert description["kept_energy"] == pytest.approx(1)
    narrower, _ = narrowed(model, 16)
    assert float((logits(narrower) - logits(model)).abs().max()) > 0.1


@pytest.mark.parametrize("signal", ["normalised", "raw"])
def test_moments_are_those_of_the_norms_inputs_without_padding(signal: Any) -> None:
    model = family("llama")
    group = discover(model).of_kind("hidden")[0]
    ids = calibration(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    got_DD, num_tokens = stream_moments(model, group, [{"input_ids": ids, "attention_mask": mask}], signal=signal)
    layers = model.model.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    expected_DD = torch.zeros(32, 32, dtype=torch.float64)
    seen: list[Tensor] = []
    handles = [n.register_forward_hook(lambda m, args, out: seen.append(args[0])) for n in [*norms, model.model.norm]]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    for x in seen:
        x_TD = x[mask.bool()].double()
        x_TD = x_TD if signal == "raw" else x_TD / x_TD.pow(2).mean(1, keepdim=True).sqrt()
        expected_DD += x_TD.T @ x_TD
    torch.testing.assert_close(got_DD, expected_DD, rtol=1e-5, atol=1e-4)
    assert num_tokens == 5 * 58


def test_directions_are_orthogonal_and_strongest_first() -> None:
    moments_DD = torch.tensor([[5.0, 4.0], [4.0, 5.0]])  # 9 along (1, 1), 1 along (1, -1)
    directions_DD, energy_D = principal_directions(moments_DD)
    assert energy_D.tolist() == pytest.approx([9, 1])
    assert directions_DD[:, 0].abs().tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    torch.testing.assert_close(directions_DD.T @ directions_DD, torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="infinite or undefined"):
        principal_directions(torch.full((2, 2), torch.nan))


def test_norms_are_matched_with_what_reads_them() -> None:
    model = family("llama")
    found = norm_of_readers(model, discover(model).of_kind("hidden")[0], probe_inputs(model))
    layer = "model.layers.1."
    assert found[f"{layer}self_attn.k_proj.weight"] == f"{layer}input_layernorm.weight"
    assert found[f"{layer}mlp.up_proj.weight"] == f"{layer}post_attention_layernorm.weight"
    assert found["lm_head.weight"] == "model.norm.weight"
    assert len(found) == 2 * 5 + 1


@needs_stacked_experts
def test_experts_and_their_router_turn_along() -> None:
    model = tiny_family("qwen3_moe").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    rotated, _ = narrowed(model, 32)
    torch.testing.assert_close(logits(rotated), logits(model), atol=1e-4, rtol=1e-3)
    small, _ = narrowed(model, 24)
    assert small.model.layers[1].mlp.experts.gate_up_proj.shape == (4, 32, 24)
    assert small.model.layers[1].mlp.gate.weight.shape == (4, 24)


def test_bfloat16_stays_bfloat16() -> None:
    model = family("llama", dtype=torch.bfloat16)
    small, _ = narrowed(model, 24, structure=discover(family("llama")))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma2", "post_attention_layernorm.weight feeds no weight.*inside the residual branch"),
        ("olmo2", "post_attention_layernorm.weight feeds no weight.*inside the residual branch"),
        ("gpt_neox", "hidden cannot be cut: .*layernorm.weight .* subtracts the mean"),
    ],
)
def test_what_does_not_commute_with_a_rotation_is_refused(name: str, message: str) -> None:
    model = tiny_family(name) if name == "gpt_neox" else family(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        narrowed(model, 24)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gpt2_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden cannot be cut: .*ln_1\.weight .* subtracts the mean"):
        narrowed(tiny_family("gpt2"), 24)


def test_a_scale_on_the_stream_is_noticed_by_the_numbers() -> None:
    # a factor per channel that no table of norms knows of: the rotated copy computes something else
    model = family("llama")
    structure = discover(model)
    factor_D = torch.linspace(0.5, 2, 32)
    block = type(model.model.layers[0].mlp)
    original = block.forward
    block.forward = lambda self, x: original(self, x) * factor_D
    try:
        with pytest.raises(ValueError, match="computes something else when its residual stream is rotated"):
            narrowed(model, 24, structure=structure)
    finally:
        block.forward = original


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "hidden_size must be from 1 to the model's own 32, got 0"),
        (33, {}, "hidden_size must be from 1 to the model's own 32, got 33"),
        pytest.param(
            22,
            {},
            "LlamaForCausalLM cannot have hidden_size=22: .*multiple of the number of attention",
            marks=pytest.mark.skipif(not CHECKS_SIZES, reason="Transformers 4 builds sizes that do not fit"),
        ),
        (24, {"batches": []}, "the directions come from calibration batches, got none"),
        (24, {"signal": "norm"}, "signal must be normalised or raw, got 'norm'"),
    ],
)
def test_wrong_requests_say_what_is_possible(size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        narrowed(family("llama"), size, **options)


def moments_of_share() -> Tensor:
    """Return the moments from every second batch, in one of two processes."""
    model = family("llama")
    group = discover(model).of_kind("hidden")[0]
    return stream_moments(model, group, calibration()[dist.get_rank() :: 2], signal="normalised")[0]


@pytest.mark.long
def test_two_processes_with_half_of_the_batches_each_see_the_moments_of_all() -> None:
    model = family("llama")
    whole_DD, _ = stream_moments(model, discover(model).of_kind("hidden")[0], calibration(), signal="normalised")
    with Processes() as processes:
        for part_DD in processes.run(moments_of_share):
            torch.testing.assert_close(part_DD, whole_DD, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def perplexity(model: Any, batches: list[dict[str, Tensor]]) -> float:
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.long
def test_perplexities_of_a_trained_model_are_the_measured_ones() -> None:
    # 7.83 < 9.05 < 17.9 measured before by independent code, on other samples of the same model
    model = stories3m()
    structure = discover(model)
    batches, test = sampled(model, 1), sampled(model, 2)
    principal = perplexity(narrowed(model, 168, batches=batches, structure=structure)[0], test)
    raw = perplexity(narrowed(model, 168, batches=batches, structure=structure, signal="raw")[0], test)
    plan = subclone(model, {"hidden_size": 168}, batches, structure=structure, progress=False)
    selected = perplexity(shrink(model, plan, structure=structure), test)
    drawn = []
    for seed in range(3):
        keep = torch.randperm(192, generator=torch.Generator().manual_seed(seed))[:168].sort().values.tolist()
        cut = Cut("residual:hidden", tuple(keep))
        drawn.append(perplexity(shrink(model, Plan(cuts=(cut,)), structure=structure), test))
    assert perplexity(model, test) == pytest.approx(3.62, rel=0.03)
    assert principal == pytest.approx(7.83, rel=0.1)
    assert raw == pytest.approx(9.05, rel=0.1)
    assert selected == pytest.approx(17.9, rel=0.1)
    assert principal < raw < selected < min(drawn)  # random draws spread from 30 to thousands: no value is fixed
