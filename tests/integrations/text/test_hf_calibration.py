"""Calibration text fills the inputs that a class has, and is refused where it cannot teach."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lightning_prune.integrations.folders.hf_oneshot import run_oneshot
from lightning_prune.integrations.folders.hf_shrink import run_shrink
from lightning_prune.integrations.models.hf_open import open_model
from lightning_prune.integrations.text.calibration_text import Text
from lightning_prune.integrations.text.hf_calibration import text_batches
from lightning_prune.recipe.recipe import Recipe
from tests.integrations.models.test_hf_open import MODELS
from tests.model_folders import TEXT, character_tokenizer

IDS_NT = torch.arange(10).reshape(5, 2)


def folder_of(kind: str, tmp_path: Path) -> str:
    MODELS[kind]().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "model")


def test_language_models_get_labels() -> None:
    batches = text_batches(MODELS["causal"](), IDS_NT, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), IDS_NT)
    assert all(batch.keys() == {"input_ids", "labels"} for batch in batches)


def test_classifiers_get_tokens_alone_and_one_row_where_rows_have_no_end() -> None:
    model = MODELS["reward"]()
    assert [b.keys() for b in text_batches(model, IDS_NT, batch_size=4)] == [{"input_ids"}] * 2
    model.config.pad_token_id = None
    assert [len(b["input_ids"]) for b in text_batches(model, IDS_NT, batch_size=4)] == [1] * 5


def test_decoders_get_their_inputs_shifted() -> None:
    (batch,) = text_batches(MODELS["two-sided"](), IDS_NT, batch_size=8)
    assert torch.equal(batch["decoder_input_ids"][:, 1:], IDS_NT[:, :-1])
    assert not batch["decoder_input_ids"][:, 0].any()
    assert torch.equal(batch["labels"], IDS_NT)


@pytest.mark.parametrize(
    ("kind", "recipe", "message"),
    [
        ("images", "oneshot/wanda_half", "Wanda looks at calibration text, but ViTForImageClassification reads pixel"),
        ("images", "structured/shortgpt", "ShortGPT looks at calibration text, but ViTForImageClassification reads"),
        ("reward", "structured/sleb", "needs the prediction of the next token, and for LlamaForSequenceClass"),
        ("tagger", "taylor", "Taylor needs a loss, and for BertForTokenClassification plain text gives none"),
    ],
)
def test_what_text_cannot_teach_is_refused(kind: str, recipe: str, message: str, tmp_path: Path) -> None:
    folder, out = folder_of(kind, tmp_path), tmp_path / "out"
    given = {"data": str(tmp_path / "text.txt"), "num_sequences": 2, "sequence_length": 8}
    with pytest.raises(ValueError, match=message):
        if recipe.startswith("structured"):
            run_shrink(Recipe.load(recipe), model=folder, out=str(out), text=Text(**given), device="cpu")
        elif recipe == "taylor":
            taylor = ["prune.scorer=Taylor"]
            run_oneshot("oneshot/wanda_half", model=folder, out=str(out), overrides=taylor, device="cpu", **given)
        else:
            run_oneshot(recipe, model=folder, out=str(out), device="cpu", **given)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["reward", "gpt2 classifier", "masked", "tagger", "encoder", "two-sided"])
def test_one_shot_writes_the_class_that_it_read(kind: str, tmp_path: Path) -> None:
    folder, out = folder_of(kind, tmp_path), tmp_path / "out"
    given: dict[str, Any] = {"data": str(tmp_path / "text.txt"), "num_sequences": 4, "sequence_length": 8}
    run_oneshot("oneshot/wanda_half", model=folder, out=str(out), device="cpu", **given)
    before, after = open_model(folder), open_model(str(out))
    assert type(after) is type(before)
    assert json.loads((out / "sparsity.json").read_text())["sparsity"] == pytest.approx(0.5, abs=0.02)
    changed = {n for n, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[n])}
    assert changed
    assert not any(word in name for name in changed for word in ("score", "classifier", "cls", "pooler", "embed"))
    assert len(AutoTokenizer.from_pretrained(out)) == len(character_tokenizer())


def test_cutting_keeps_class_and_head(tmp_path: Path) -> None:
    folder, out = folder_of("reward", tmp_path), tmp_path / "out"
    given = Text(data=str(tmp_path / "text.txt"), num_sequences=16, sequence_length=8)
    metrics = run_shrink(Recipe.load("structured/width_quarter"), model=folder, out=str(out), text=given, device="cpu")
    before, after = open_model(folder), open_model(str(out))
    assert type(after) is type(before)
    assert torch.equal(after.score.weight, before.score.weight)
    assert after.config.intermediate_size < before.config.intermediate_size
    assert metrics["loss"] == {"before": None, "after": None}
