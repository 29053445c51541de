from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_prune.conditional.instruction import NAME, Instruction, InstructionCondition
from lightning_prune.export.huggingface import export_huggingface
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.predictors.sub_model import Selection, SubModels
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.structure import Stack
from tests.tiny_models import VOCAB, needs_stacked_experts, tiny_family, tiny_llama

STACK = Stack((), "num_hidden_layers", (), 2)


def small_family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    gated = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, **common}
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **gated))
    if name == "gemma":
        return GemmaForCausalLM(GemmaConfig(head_dim=16, **gated))
    if name == "phi3":
        return Phi3ForCausalLM(Phi3Config(**gated))
    if name == "opt":
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64}
        return OPTForCausalLM(OPTConfig(**sizes, **common))
    return tiny_family(name)


def conditioned(model: PreTrainedModel, **options: Any) -> InstructionCondition:
    torch.manual_seed(1)
    condition = Instruction(**{"budget": Budget(keep=0.5), **options}).insert(model.eval(), STACK)
    nn.init.normal_(condition.predictor.head.outer.bias)  # scores as spread as those that importance gives
    return condition


def sub_models(condition: InstructionCondition) -> SubModels:
    return SubModels(condition.model, condition.predictor.units.groups, without=NAME)


def prompts(num: int = 2, length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (num, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def masks_of(condition: InstructionCondition, batch: dict[str, Tensor]) -> list[Tensor]:
    return condition.masks_of(condition.prompt(batch))


@pytest.mark.parametrize("is_laid_out", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "opt", "phi3"])
def test_a_gathered_model_computes_what_the_masked_one_does(name: str, is_laid_out: bool) -> None:
    condition = conditioned(small_family(name), choice=SoftTopK(epsilon=1.0))
    made = sub_models(condition)
    batch = prompts()
    masks = masks_of(condition, batch)
    assert any(((mask > 0) & (mask < 0.95)).any() for mask in masks)  # there is something to fold
    expected = condition.model(**batch).logits
    if is_laid_out:
        made.lay_out()
        torch.testing.assert_close(condition.model(**batch).logits, expected)
    for row in range(2):
        selection = Selection.of(masks, condition.predictor.keep, row)
        small = made.gather(selection)
        assert type(small) is type(condition.model)
        found = small(**{key: value[row : row + 1] for key, value in batch.items()}).logits
        torch.testing.assert_close(found[0], expected[row], rtol=0, atol=1e-5)


def test_key_value_groups_are_gathered_beside_ffn_units() -> None:
    condition = conditioned(tiny_llama(), kinds=("ffn", "kv_groups"), choice=SoftTopK(epsilon=1.0))
    batch = prompts(1)
    small = sub_models(condition).gather(Selection.of(masks_of(condition, batch), condition.predictor.keep))
    assert small.config.num_key_value_heads == 1
    assert small.config.num_attention_heads == 2
    torch.testing.assert_close(small(**batch).logits, condition.model(**batch).logits, rtol=0, atol=1e-5)


def test_what_is_not_cut_is_the_parents_own_memory_and_the_rest_is_not() -> None:
    condition = conditioned(tiny_llama())
    parent = condition.model
    made = sub_models(condition)
    masks = masks_of(condition, prompts())
    first, second = (made.gather(Selection.of(masks, condition.predictor.keep, row)) for row in range(2))
    num_shared = 0
    for name, tensor in first.state_dict().items():
        own = parent.state_dict()[name]
        if ".mlp." in name:
            assert tensor.data_ptr() not in (own.data_ptr(), second.state_dict()[name].data_ptr())
            assert 24 in tensor.shape
        else:
            assert tensor.data_ptr() == own.data_ptr()
            num_shared += 1
    assert num_shared
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    assert hasattr(parent, NAME)
    assert not any(NAME in name for name in first.state_dict())
    assert made.num_bytes(Selection.of(masks, condition.predictor.keep)) == 2 * 3 * 24 * 32 * 4


def test_a_second_selection_is_not_built_from_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    condition = conditioned(tiny_llama())
    made = sub_models(condition)
    masks = masks_of(condition, prompts())
    made.gather(Selection.of(masks, condition.predictor.keep, 0))
    monkeypatch.setattr("lightning_prune.predictors.sub_model.build_smaller", None)
    small = made.gather(Selection.of(masks, condition.predictor.keep, 1))
    with condition.fixed([mask[1:] for mask in masks]):
        expected = condition.model(**prompts()).logits
    torch.testing.assert_close(small(**prompts()).logits, expected, rtol=0, atol=1e-5)


def test_keeping_all_units_shares_everything() -> None:
    condition = conditioned(tiny_llama(), budget=Budget(keep=1.0))
    selection = Selection.of(masks_of(condition, prompts()), condition.predictor.keep)
    made = sub_models(condition)
    small = made.gather(selection)
    parent = condition.model.state_dict()
    assert all(tensor.data_ptr() == parent[name].data_ptr() for name, tensor in small.state_dict().items())
    assert made.num_bytes(selection) == 0


def test_an_exported_sub_model_is_a_plain_folder(tmp_path: Path) -> None:
    condition = conditioned(tiny_llama())
    made = sub_models(condition)
    made.lay_out()
    batch = prompts(1)
    small = made.gather(Selection.of(masks_of(condition, batch), condition.predictor.keep))
    export_huggingface(small, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.intermediate_size == 24
    torch.testing.assert_close(again(**batch).logits, small(**batch).logits)


def test_the_version_follows_the_weights() -> None:
    condition = conditioned(tiny_llama())
    made = sub_models(condition)
    before = made.version
    assert made.version == before
    with torch.no_grad():
        condition.model.model.norm.weight.mul_(2)  # shared: a sub-model that was gathered sees it
    assert made.version == before
    with torch.no_grad():
        condition.model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert made.version != before


def test_equal_masks_have_one_digest() -> None:
    mask = torch.tensor([[0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 0.25, 0.0]])
    first, second, third = (Selection.of([mask], [2], row) for row in range(3))
    assert first.units[0].tolist() == [1, 2]
    assert first.scales[0].tolist() == [1.0, 0.5]
    assert first.digest == second.digest != third.digest


@needs_stacked_experts
def test_units_of_experts_are_refused() -> None:
    model = tiny_family("qwen3_moe")
    with pytest.raises(ValueError, match="has experts in"):
        SubModels(model, discover(model, kinds=["ffn"]).of_kind("ffn"))
