"""Train LoRA adapters over sparse weights, merge them in every way there is, and look at the zeros."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_prune import NM, Once, Sparsifier, Unstructured
from lightning_prune.integrations.lora.peft_lora import (
    add_lora,
    check_config,
    lora_layers,
    open_adapter,
    take_over_lora,
)
from lightning_prune.integrations.lora.peft_merge import (
    base_state,
    check_merge,
    export_adapter,
    merge,
    merged_state,
    write_beside,
)
from lightning_prune.recovery.lora_options import LoraForm
from tests.structured.families import build
from tests.tiny_models import recompute_activations

FORMS: tuple[LoraForm, ...] = ("masked", "scaled")
FAMILIES = ("llama", "gpt2", "qwen2", "opt", "llama, one key/value head")
IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def pruned(family: str = "llama", *, is_nm: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Return a tiny model, half of it pruned, and its masks."""
    model = build(family)
    sparsifier = Sparsifier(schedule=Once(sparsity=0.5), granularity=NM(n=2, m=4) if is_nm else Unstructured())
    sparsifier.prune_once(model, progress=False)
    return model, dict(sparsifier.masks)


def train(model: nn.Module, *, num_steps: int = 4) -> list[float]:
    """Take steps that are large enough to see."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def train_by_hand(model: nn.Module, wrapped: nn.Module, masks: dict[str, Tensor], form: LoraForm) -> list[float]:
    """Take the steps of `train` with every weight written out, from the factors that the adapters start with."""
    weights, factors, layers = {}, [], dict(lora_layers(wrapped))
    for name, layer in layers.items():
        pair = [side["default"].weight.detach().clone().requires_grad_() for side in (layer.lora_A, layer.lora_B)]
        factors += pair
        weights[f"{name.removeprefix('base_model.model.')}.weight"] = (layer, *pair)
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    losses = []
    for _ in range(4):
        effective = {}
        for name, (layer, down_RI, up_OR) in weights.items():
            product_OI = up_OR @ down_RI
            product = product_OI.T if layer.fan_in_fan_out else product_OI
            base = layer.get_base_layer().weight.detach()
            added = base + layer.scaling["default"] * torch.where(masks[name], product, 0.0)
            effective[name] = base * product if form == "scaled" else added
        loss = torch.func.functional_call(model, effective, kwargs={"input_ids": IDS, "labels": IDS}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def zeros_are_masks(weights: Iterable[tuple[str, Tensor]], masks: dict[str, Tensor]) -> bool:
    found = dict(weights)
    return all(torch.equal(found[name] != 0, keep) for name, keep in masks.items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_unmerged_and_zeros_are_the_masks(family: str, form: LoraForm) -> None:
    model, masks = pruned(family)
    before, twin = logits(model), copy.deepcopy(model)
    wrapped = add_lora(model, form=form, config={"r": 4}, masks=masks)
    assert torch.allclose(logits(wrapped), before, atol=1e-6)
    by_hand = train_by_hand(twin, wrapped, masks, form)
    assert train(wrapped) == pytest.approx(by_hand, abs=1e-5)
    trained = logits(wrapped)
    assert not torch.allclose(trained, before, atol=1e-3)
    merged = merge(wrapped)
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    assert zeros_are_masks(merged.named_parameters(), masks)
    assert not lora_layers(merged)


@pytest.mark.parametrize("form", FORMS)
def test_peft_itself_merges_without_filling_zeros(form: LoraForm) -> None:
    model, masks = pruned(is_nm=True)
    wrapped = add_lora(model, form=form, config={"r": 4}, masks=masks)
    train(wrapped)
    trained = logits(wrapped)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    assert zeros_are_masks(merged.named_parameters(), masks)
    quadruples = merged.get_parameter("model.layers.0.mlp.up_proj.weight").reshape(-1, 4)
    assert ((quadruples != 0).sum(1) == 2).all()


@pytest.mark.parametrize("form", FORMS)
def test_merging_can_be_undone_and_the_adapter_switched_off(form: LoraForm) -> None:
    model, masks = pruned("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    wrapped = add_lora(model, form=form, config={"r": 4}, masks=masks)
    train(wrapped)
    trained = logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), trained, rtol=0, atol=1e-5)
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), trained)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), plain)
    left = wrapped.unload().state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in before.items())


def test_a_weight_that_is_zero_but_kept_is_trained_under_its_mask() -> None:
    model, masks = pruned()
    name = "model.layers.0.mlp.up_proj.weight"
    row, column = masks[name].nonzero()[0].tolist()
    with torch.no_grad():
        model.get_parameter(name)[row, column] = 0.0
    wrapped = add_lora(model, form="masked", config={"r": 4}, masks=masks)
    train(wrapped)
    assert merge(wrapped).get_parameter(name)[row, column] != 0


def test_plain_lora_on_zeros_refuses_to_merge() -> None:
    model, masks = pruned()
    wrapped = add_lora(model, form="plain", config={"r": 4}, masks=masks)
    for action in (
        lambda: merge(wrapped),
        lambda: check_merge(wrapped),
        wrapped.merge_and_unload,
        wrapped.merge_adapter,
    ):
        with pytest.raises(ValueError, match=r"fill .*zeros.*(masked|form)"):
            action()
    with pytest.raises(ValueError, match="would fill"):
        merged_state(wrapped, wrapped.state_dict())


def test_plain_lora_on_a_dense_model_is_pefts_own() -> None:
    one, other = build("llama"), build("llama")
    torch.manual_seed(3)
    ours = add_lora(one, form="plain", config={"r": 4, "target_modules": ["q_proj", "down_proj"]})
    torch.manual_seed(3)
    theirs = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"]))
    assert train(ours) == train(theirs)
    assert torch.equal(logits(ours.merge_and_unload()), logits(theirs.merge_and_unload()))


def test_a_single_zero_of_a_dense_weight_is_no_mask() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] = 0.0
    wrapped = add_lora(model, form="plain", config={"r": 4})
    train(wrapped)
    trained = logits(wrapped)
    found = merged_state(wrapped, wrapped.state_dict())
    merged = merge(wrapped)
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    assert all(torch.equal(value, found[name]) for name, value in merged.state_dict().items())
    assert found["model.layers.0.self_attn.q_proj.weight"][0, 0] != 0


def test_bfloat16_weights_are_merged_in_float32() -> None:
    model, masks = pruned()
    model.to(torch.bfloat16)
    wrapped = add_lora(model, form="masked", config={"r": 4}, masks=masks)
    train(wrapped)
    layer: Any = dict(lora_layers(wrapped))["base_model.model.model.layers.0.mlp.up_proj"]
    down_RI, up_OR = (getattr(layer, f"lora_{side}")["default"].weight.float() for side in "AB")
    keep = masks["model.layers.0.mlp.up_proj.weight"]
    wanted = (layer.get_base_layer().weight.float() + 8.0 * (up_OR @ down_RI) * keep).to(
        torch.bfloat16
    )  # alpha 32, r 4
    assert torch.equal(merge(wrapped).get_parameter("model.layers.0.mlp.up_proj.weight"), wanted)


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_the_merged_state_is_that_of_the_merged_model(form: LoraForm) -> None:
    model, masks = pruned("qwen2") if form != "plain" else (build("qwen2"), {})
    names = set(model.state_dict())
    wrapped = add_lora(
        model, form=form, config={"r": 4, "bias": "all"}, masks=masks or None, modules_to_save=["model.norm"]
    )
    train(wrapped)
    found = merged_state(wrapped, wrapped.state_dict())
    assert set(found) == names
    wanted = merge(wrapped).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in names)
    assert not torch.equal(found["model.norm.weight"], build("qwen2").state_dict()["model.norm.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_adapter_opens_here_and_is_refused_by_stock_peft(form: LoraForm, tmp_path: Path) -> None:
    model, masks = pruned()
    model.save_pretrained(tmp_path / "base")
    wrapped = add_lora(model, form=form, config={"r": 4}, masks=masks)
    train(wrapped)
    trained = logits(wrapped)
    export_adapter(wrapped, str(tmp_path / "adapter"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"no plain LoRA; open it with lightning_prune.*open_adapter"):
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    opened = open_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(opened), trained)
    merged = merge(opened)
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    assert zeros_are_masks(merged.named_parameters(), masks)


def test_an_opened_adapter_knows_the_masks_it_was_trained_with(tmp_path: Path) -> None:
    model, masks = pruned()
    name = "model.layers.0.mlp.up_proj.weight"
    row, column = masks[name].nonzero()[0].tolist()
    with torch.no_grad():
        model.get_parameter(name)[row, column] = 0.0
    model.save_pretrained(tmp_path / "base")
    wrapped = add_lora(model, form="masked", config={"r": 4}, masks=masks)
    train(wrapped)
    export_adapter(wrapped, str(tmp_path / "adapter"))
    opened = open_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(opened), logits(wrapped))


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_that_a_program_made_is_taken_over(form: LoraForm) -> None:
    model, masks = pruned()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, config)
    parameters = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    take_over_lora(theirs, form=form, masks=masks)
    assert {name: id(p) for name, p in theirs.named_parameters() if p.requires_grad} == {
        name: id(p) for name, p in parameters.items()
    }
    assert theirs.peft_config["default"].lora_dropout == 0.0
    train(theirs.train())
    trained = logits(theirs)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    assert zeros_are_masks(merged.named_parameters(), masks)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "unknown target module 'v_prj'; did you mean 'v_proj'"),
        ({"r": 33}, r"r = 33 is larger than .*q_proj, which is 32 x 32; use at most 32"),
        ({"rank": 4}, "unknown key 'recover.lora.config.rank'"),
        ({"lora_dropout": 0.1}, "no place for lora_dropout"),
        ({"use_dora": True}, "no place for use_dora"),
        ({"init_lora_weights": "pissa"}, "start of its own"),
    ],
)
def test_what_cannot_be_trained_is_refused(config: dict[str, Any], message: str) -> None:
    model, masks = pruned()
    with pytest.raises(ValueError, match=message):
        add_lora(model, form="masked", config=config, masks=masks)


def test_other_adapters_are_refused() -> None:
    model, masks = pruned()
    vera = peft.get_peft_model(model, peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    with pytest.raises(ValueError, match=r"takes over the LoRA of this program, but .*VeraConfig"):
        take_over_lora(vera, form="masked", masks=masks)
    dora = peft.get_peft_model(build("llama"), peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with torch.no_grad():
        dora.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight[0] = 0.0
    with pytest.raises(ValueError, match="whose zeros form masked cannot keep"):
        take_over_lora(dora, form="masked")


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of masked, scaled, plain, got 'dense'"):
        check_config("dense", {})


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        open_adapter(build("llama"), tmp_path)


def test_two_adapters_at_once_are_refused() -> None:
    model, masks = pruned()
    wrapped = add_lora(model, form="masked", config={"r": 4}, masks=masks)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one adapter at a time"):
        logits(wrapped)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_adapter_is_not_merged_into_what_the_first_has_made(form: LoraForm) -> None:
    model, masks = pruned()
    wrapped = add_lora(model, form=form, config={"r": 4, "target_modules": ["q_proj"]}, masks=masks)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer: Any = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"merges one adapter, got \['default', 'second'\]"):
        layer.merge(adapter_names=["default", "second"])
    assert torch.equal(layer.base_layer.weight, before)
    layer.merge(adapter_names=["default"])
    merged = layer.base_layer.weight.clone()
    with (
        pytest.warns(UserWarning, match="additionally merging second"),
        pytest.raises(ValueError, match=r"merges one adapter, got \['default', 'second'\]"),
    ):
        layer.merge(adapter_names=["second"])
    assert torch.equal(layer.base_layer.weight, merged)
    assert layer.merged_adapters == ["default"]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_gradient_checkpointing_and_copies_work() -> None:
    model, masks = pruned()
    wrapped = add_lora(model, form="masked", config={"r": 4}, masks=masks)
    twin = copy.deepcopy(wrapped)
    twin.enable_input_require_grads()
    recompute_activations(twin.base_model.model, use_reentrant=False)
    assert train(wrapped.train()) == pytest.approx(train(twin.train()), abs=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_an_accelerator_gives_what_the_processor_gives(form: LoraForm) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("needs an accelerator")
    found = {}
    for place in ("cpu", device.type):
        model, masks = pruned()
        torch.manual_seed(0)
        wrapped = add_lora(model, form=form, config={"r": 4}, masks=masks).to(place)
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        wrapped(input_ids=IDS.to(place), labels=IDS.to(place)).loss.backward()
        optimizer.step()
        merged = merge(wrapped).cpu()
        assert zeros_are_masks(merged.named_parameters(), masks)
        found[place] = logits(merged)
    torch.testing.assert_close(found["cpu"], found[device.type], rtol=0, atol=1e-4)


def test_the_base_is_what_it_was_before_adapters() -> None:
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    wrapped = peft.get_peft_model(model, config)
    base, weights = base_state(wrapped, wrapped.state_dict())
    assert base is wrapped.get_base_model()
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], value) for name, value in before.items())


def test_adapters_beside_a_folder_name_it_as_their_base(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    write_beside(wrapped, tmp_path / "adapter", base_folder="some/folder", state=wrapped.state_dict())
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.base_model_name_or_path == "some/folder"
    assert wrapped.peft_config["default"].base_model_name_or_path != "some/folder"
