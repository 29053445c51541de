import pytest
import torch
from torch import nn

from lightning_prune.conditional.heavy_light import HeavyLight, best_units
from lightning_prune.structured.discovery.discover import discover
from tests.conditional.routed_models import METHODS, inserted, logits, narrowed, stack_of, trained
from tests.tiny_models import tiny_family, token_windows

METHOD = METHODS["heavy_light"]


def ffn(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    """Compute a Llama's feed-forward part from its matrices."""
    return (nn.functional.silu(x @ part.gate_proj.weight.T) * (x @ part.up_proj.weight.T)) @ part.down_proj.weight.T


def test_all_tokens_at_scale_one_are_the_sum_of_both_branches_and_the_dense_part() -> None:
    model, _ = inserted("llama", HeavyLight(light=0.25))
    part, plain = model.model.layers[0].mlp, tiny_family("llama").model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        found = part(x)
        light = part.light[0]
        torch.testing.assert_close(found, ffn(x, light) + ffn(x, part), rtol=0, atol=1e-6)
        torch.testing.assert_close(found, ffn(x, plain), rtol=0, atol=1e-6)
    assert light.up_proj.weight.shape == (12, 32)
    assert int((part.down_proj.weight.abs() < 1e-7).all(0).sum()) == 12
    assert not bool((part.down_proj.weight == 0).any())


def test_the_light_branch_holds_the_units_of_the_largest_norms() -> None:
    model = tiny_family("llama")
    part = model.model.layers[0].mlp
    with torch.no_grad():
        for unit in (3, 17, 40):
            part.down_proj.weight[:, unit] *= 10
        part.gate_proj.weight[9] = 0
        part.down_proj.weight[:, 9] *= 1000  # written by nothing
    group = discover(model, kinds=["ffn"]).of_kind("ffn")[0]
    assert {3, 17, 40} <= set(best_units(model, group, 0.1))
    assert 9 not in best_units(model, group, 0.9)
    assert len(best_units(model, group, 0.1)) == 5


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_left_out_changes_nothing_beside_a_dense_branch_that_is_scaled(family: str) -> None:
    model = trained(family, METHOD)
    first = model.model.layers[0].mlp if family == "llama" else model.bert.encoder.layer[0].intermediate
    x = torch.randn(3, 14, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen_BT, scale_BT = first.token_router(x, None)
        heavy = ffn(x, first) if family == "llama" else bert_ffn(x, model.bert.encoder.layer[0])
        torch.testing.assert_close(first(x), first.light(x) + scale_BT[..., None] * heavy, rtol=0, atol=1e-5)
    assert 0 < int(chosen_BT.sum()) < chosen_BT.numel()
    assert not bool(scale_BT[~chosen_BT].any())


def bert_ffn(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    dense, out = layer.intermediate.dense, layer.output.dense
    return nn.functional.gelu(x @ dense.weight.T + dense.bias) @ out.weight.T + out.bias


def test_the_heavy_branch_computes_chosen_tokens_alone() -> None:
    model, counted = trained("bert", METHOD), list[int]()
    dense = model.bert.encoder.layer[1].intermediate.dense
    dense.register_forward_hook(lambda _, args, output: counted.append(args[0].shape[:-1].numel()))
    ids = token_windows(2, 12)
    mask = (torch.arange(12) < torch.tensor([[12], [5]])).long()
    logits(model, ids, attention_mask=mask)
    assert counted == [5 + 2]  # 0.4 of 12 and of 5, rounded up
    model.train()
    counted.clear()
    model(input_ids=ids, attention_mask=mask)
    assert counted == [6 + 3]  # 9 / 8 as many while it learns


def test_a_branch_that_no_token_enters_is_not_run() -> None:
    model, counted = trained("llama", METHOD), list[int]()
    part = model.model.layers[0].mlp
    part.up_proj.register_forward_hook(lambda _, args, output: counted.append(1))
    part.token_router.estimates[0] = torch.inf
    ids = token_windows(2, 12)
    logits(model, ids)
    assert counted == []
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert not bool(part.up_proj.weight.grad.any())  # there, so that processes reduce the same gradients


def test_what_the_light_branch_learned_goes_back_into_the_part() -> None:
    model, condition = narrowed("gpt2", METHOD)
    part = model.transformer.h[0].mlp
    light, heavy = part.light[0].c_proj, part.c_proj.weight.detach().clone()
    learned_bias = (light.bias + part.c_proj.bias).detach().clone()
    condition.remove()
    difference = part.c_proj.weight - heavy  # units by features in this class
    assert int((difference != 0).any(1).sum()) == light.weight.shape[0]
    torch.testing.assert_close(part.c_proj.bias, learned_bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"share": 1.5}, r"share must be in \(0, 1\], got 1.5"),
        ({"light": 1.0}, r"light must be in \(0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeavyLight(**options)


def test_experts_are_refused() -> None:
    model = tiny_family("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"model\.layers\.0 is 4 experts.*conditional_adapter, which routes whole blocks"
    ):
        METHOD.insert(model, stack_of(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
