import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_prune.conditional.instruction import Instruction, InstructionCondition, Predictor
from lightning_prune.integrations.instruction.folder import (
    is_conditional,
    open_any,
    open_conditional,
    read_tasks,
    save_conditional,
)
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.encoder import Fresh
from lightning_prune.structured.groups import sealed
from lightning_prune.structured.structure import Stack
from tests.model_folders import character_tokenizer
from tests.tiny_models import VOCAB, tiny_llama


def conditioned(**options: Any) -> InstructionCondition:
    torch.manual_seed(0)
    options = {"budget": Budget(keep=0.5), **options}
    condition = Instruction(**options).insert(tiny_llama().eval(), Stack((), "num_hidden_layers", (), 2))
    nn.init.normal_(condition.predictor.head.outer.bias)
    condition.predictor.num_steps.fill_(7)
    return condition


def prompts() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return save_conditional(conditioned(), tmp_path / "model", tokenizer=character_tokenizer())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": Budget(keep=0.75, keep_from=0.25), "kinds": ("ffn", "kv_groups")},
        {"predictor": Predictor(encoder=Fresh(width=16, num_heads=2), hidden=8), "start": None, "guard": None},
    ],
)
def test_what_is_opened_is_what_was_saved(tmp_path: Path, options: dict[str, Any]) -> None:
    condition = conditioned(**options)
    expected = condition.model(**prompts()).logits
    save_conditional(condition, tmp_path / "model", tokenizer=character_tokenizer())
    model, again, tokenizer = open_conditional(tmp_path / "model", device="cpu")
    assert again.options == condition.options
    assert again.predictor.keep == condition.predictor.keep
    assert int(again.predictor.num_steps) == 7
    assert tokenizer("abc")["input_ids"] == character_tokenizer()("abc")["input_ids"]
    torch.testing.assert_close(model(**prompts()).logits, expected, rtol=0, atol=0)


def test_the_parent_opens_without_the_library(written: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    condition = conditioned()
    with condition.whole():
        expected = condition.model(**prompts()).logits
    torch.testing.assert_close(model(**prompts()).logits, expected)
    assert is_conditional(written)
    assert not is_conditional(written / "instruction")


def test_gathered_tensors_are_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    condition = conditioned()
    state = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in whole(condition).items()}
    save_conditional(condition, tmp_path / "model", state=state)
    model, again, _ = open_conditional(tmp_path / "model", device="cpu")
    for name, tensor in whole(again).items():
        assert torch.equal(tensor, state[name]), name
    assert model is again.model
    with pytest.raises(ValueError, match="saved without its predictor"):
        save_conditional(condition, tmp_path / "other", state={"lm_head.weight": torch.zeros(1)})
    assert not (tmp_path / "other").exists()


def whole(condition: InstructionCondition) -> dict[str, Tensor]:
    return dict(condition.model.state_dict())


def test_a_folder_that_is_taken_stays(written: Path) -> None:
    with pytest.raises(ValueError, match="is not empty"):
        save_conditional(conditioned(), written)


def test_scores_of_named_tasks_are_kept(tmp_path: Path) -> None:
    scores = [torch.rand(48), torch.rand(48)]
    save_conditional(conditioned(), tmp_path / "model", tasks={"sums/easy": scores, "prose": scores[::-1]})
    found = read_tasks(tmp_path / "model")
    assert set(found) == {"sums/easy", "prose"}
    for one, expected in zip(found["sums/easy"], scores, strict=True):
        assert torch.equal(one, expected)


def test_no_tasks_are_no_error(written: Path) -> None:
    assert read_tasks(written) == {}


def test_a_plain_folder_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no instruction/instruction.json"):
        open_conditional(tmp_path)


def test_other_weights_beside_the_predictor_are_refused(written: Path) -> None:
    tiny_llama(seed=1).save_pretrained(written)
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that was written"):
        open_conditional(written)


def test_a_damaged_predictor_is_refused(written: Path) -> None:
    file = written / "instruction" / "predictor.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"predictor.safetensors is not the file"):
        open_conditional(written)
    file.unlink()
    with pytest.raises(ValueError, match=r"predictor.safetensors is missing"):
        open_conditional(written)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: {**about, "keep": {}}, "is damaged: its checksum"),
        (lambda about: sealed({**about, "format": 2}), "has format 2, and this version reads 1"),
        (lambda about: [], "has format None"),
    ],
)
def test_an_altered_description_is_refused(written: Path, change: Any, said: str) -> None:
    file = written / "instruction" / "instruction.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=said):
        open_conditional(written)
    file.write_text(file.read_text()[:-4] + "]")
    with pytest.raises(ValueError, match=r"is damaged|has format"):
        open_conditional(written)


def test_evaluation_opens_either_kind_of_folder(written: Path, tmp_path: Path) -> None:
    model, tokenizer = open_any(str(written), device="cpu")
    assert hasattr(model, "mask_predictor")
    assert tokenizer is not None
    tiny_llama().save_pretrained(tmp_path / "plain")
    model, tokenizer = open_any(str(tmp_path / "plain"), device="cpu")
    assert not hasattr(model, "mask_predictor")
    untrained = conditioned()
    untrained.predictor.num_steps.zero_()
    untrained.predictor.head.outer.bias.data.zero_()
    folder = save_conditional(untrained, tmp_path / "untrained")
    with pytest.raises(ValueError, match="was not trained"):
        open_any(str(folder), device="cpu")
