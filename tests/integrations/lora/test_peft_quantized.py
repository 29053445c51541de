"""Train a LoRA beside a 4-bit or 8-bit pruned weight and merge it into the unquantized one."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lightning_prune import Once, Sparsifier
from lightning_prune.integrations.lora.peft_lora import add_lora, open_adapter
from lightning_prune.integrations.lora.peft_merge import merge
from lightning_prune.integrations.lora.peft_quantized import is_quantized, mask_quantized
from lightning_prune.integrations.runs.pruning_run import PruningRun
from tests.structured.families import SIZES, build

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
FORMS = {
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8 bit": {"load_in_8bit": True},
}


def wide() -> LlamaForCausalLM:
    """Return a model whose rows are as long as the blocks that bitsandbytes quantizes together."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"hidden_size": 64, "intermediate_size": 128})))


class Stored(nn.Module):
    """A layer whose weight is kept as bytes, as quantizing libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)


def test_bytes_are_quantized_and_floats_are_not() -> None:
    assert is_quantized(Stored())
    assert not is_quantized(nn.Linear(2, 2).to(torch.bfloat16))


def test_a_quantized_model_under_the_callback_is_refused() -> None:
    model = build("llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"the model is quantized.*add_lora"):
        PruningRun({"recover": {"lora": {}}}).prepare(model)


def test_another_variant_of_lora_is_refused() -> None:
    wrapped = add_lora(build("llama"), form="plain", config={"use_dora": True, "r": 2, "target_modules": ["q_proj"]})
    layer: Any = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match="DoRA"):
        mask_quantized(layer, adapter="default")


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.train()(input_ids=ids).logits  # in evaluation mode bitsandbytes computes in bfloat16
    return found


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about kernels
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_a_quantized_model_merges_into_the_unquantized_one(form: str, tmp_path: Path) -> None:
    model = wide()
    sparsifier = Sparsifier(schedule=Once(sparsity=0.5))
    sparsifier.prune_once(model, progress=False)
    model.save_pretrained(tmp_path / "pruned")
    options = {"quantization_config": BitsAndBytesConfig(**FORMS[form]), "device_map": "cpu"}
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **options)
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    before = logits(small, ids)
    wrapped = add_lora(small, form="masked", config={"r": 4, "target_modules": names})
    torch.testing.assert_close(logits(wrapped, ids), before)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(wrapped, ids)
    assert not torch.allclose(trained, before, atol=0.01)
    with pytest.raises(ValueError, match="merging into a quantized weight"):
        wrapped.merge_adapter()
    wrapped.save_pretrained(tmp_path / "adapter")

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for name, module in small.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(module):
            weight = dequantize_module_weight(copy.deepcopy(module))
            whole.get_submodule(name.removesuffix(".base_layer")).weight.data = weight.to(torch.float32)
    merged = merge(open_adapter(whole, tmp_path / "adapter"))
    found = dict(merged.named_parameters())
    assert all(torch.equal(found[name] != 0, keep) for name, keep in sparsifier.masks.items())
    # At 8 bits the inputs are rounded as well.
    torch.testing.assert_close(logits(merged, ids), trained, rtol=0, atol=1e-4 if form == "4 bit" else 0.05)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_multiplying_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path / "model")
    options = {"quantization_config": BitsAndBytesConfig(**FORMS["4 bit"]), "device_map": "cpu"}
    with pytest.raises(ValueError, match="form masked if they are quantized"):
        add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options), form="scaled", config={"r": 2})


def test_the_update_inside_the_mask_is_added_to_the_quantized_product() -> None:
    torch.manual_seed(0)
    stack = nn.ModuleDict({"proj": nn.Linear(4, 3)})
    base: Any = stack["proj"]
    with torch.no_grad():
        base.weight[:, ::2] = 0.0
    layer: Any = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["proj"], init_lora_weights=False), stack
    )["proj"]
    mask_quantized(layer, adapter="default")
    inputs_TI = torch.randn(5, 4)
    update_OI = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (base.weight != 0)
    expected = inputs_TI @ (base.weight + update_OI).T + base.bias
    assert update_OI.abs().max() > 0.1
    torch.testing.assert_close(layer(inputs_TI), expected)
