"""A model opens as the class its folder names, whole, or not at all."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_prune.integrations.demo.causal_lm import CausalLM
from lightning_prune.integrations.folders.hf_oneshot import run_oneshot
from lightning_prune.integrations.models.hf_open import load_model, open_model, predicts_next_token
from lightning_prune.integrations.runs.pruning_run import PruningRun
from tests.model_folders import character_tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VIT = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "max_position_embeddings")}
MODELS = {
    "causal": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "reward": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)),
    "gpt2 classifier": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0)
    ),
    "masked": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "tagger": lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=5)),
    "encoder": lambda: BertModel(BertConfig(**SIZES)),
    "two-sided": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    ),
    "images": lambda: ViTForImageClassification(ViTConfig(**VIT, image_size=16, patch_size=8)),
}


def saved(model: PreTrainedModel, folder: Path, **changes: Any) -> str:
    model.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return str(folder)


@pytest.mark.parametrize("kind", MODELS)
def test_the_class_that_comes_out_is_the_class_that_went_in(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    opened, tokenizer = load_model(saved(model, tmp_path), device="cpu")
    assert type(opened) is type(model)
    assert tokenizer is None  # Transformers makes up one of five tokens for a BERT without
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    assert predicts_next_token(opened) == (kind in ("causal", "tied"))


@pytest.mark.parametrize(
    ("kind", "named", "message"),
    [
        ("reward", "LlamaForCausalLM", r"lacks weights that LlamaForCausalLM has, .*lm_head\.weight"),
        ("causal", "LlamaModel", r"holds weights that LlamaModel has no place for, .*lm_head\.weight"),
        ("encoder", "BertForMaskedLM", "and 2 more; `architectures`"),
        ("causal", "LlamaForLunch", "names LlamaForLunch; Transformers has no class of this name"),
        ("causal", "LlamaConfig", "names LlamaConfig; Transformers has no class"),
    ],
)
def test_weights_of_another_class_are_refused_by_name(kind: str, named: str, message: str, tmp_path: Path) -> None:
    folder = saved(MODELS[kind](), tmp_path, architectures=[named])
    with pytest.raises(ValueError, match=message) as error:
        open_model(folder)
    assert len(str(error.value)) < 600


def test_a_folder_that_names_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say which class"):
        open_model(saved(MODELS["causal"](), tmp_path, architectures=None))


def test_shapes_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other shapes than LlamaForCausalLM with its config"):
        open_model(saved(MODELS["causal"](), tmp_path, intermediate_size=40))


def test_a_damaged_tokenizer_is_no_missing_one(tmp_path: Path) -> None:
    folder = saved(MODELS["causal"](), tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert load_model(folder, device="cpu")[1] is not None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be opened"):
        load_model(folder, device="cpu")


CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd_llama"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
class OddRewards(OddForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()
"""


def test_code_of_a_folder_runs_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto = {
        "AutoConfig": "modeling_odd.OddConfig",
        "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
        "AutoModelForSequenceClassification": "modeling_odd.OddRewards",
    }
    own = {"model_type": "odd_llama", "architectures": ["OddRewards"], "auto_map": auto}
    model = MODELS["causal"]()
    model.score = nn.Linear(32, 1)
    folder = saved(model, tmp_path / "model", **own)
    (tmp_path / "model" / "modeling_odd.py").write_text(CODE)
    with pytest.raises(ValueError, match="give --trust_remote_code"):
        open_model(folder)
    assert type(open_model(folder, trust_remote_code=True)).__name__ == "OddRewards"
    saved(model, tmp_path / "model", **(own | {"architectures": ["OddTagger"]}))
    with pytest.raises(ValueError, match=r"its auto_map knows modeling_odd\.OddForCausalLM, modeling_odd\.OddRewards"):
        open_model(folder, trust_remote_code=True)


def test_a_classifier_is_not_asked_for_probabilities_of_texts(tmp_path: Path) -> None:
    folder, out = saved(MODELS["reward"](), tmp_path / "model"), tmp_path / "out"
    character_tokenizer().save_pretrained(folder)
    tasks = ["evaluate.tasks=[next_word]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PruningRun, "_harness", staticmethod(lambda: SimpleNamespace(check_tasks=lambda *names: None)))
        with pytest.raises(ValueError, match="LlamaForSequenceClassification gives none; set evaluate: null"):
            run_oneshot("oneshot/magnitude_half", model=folder, out=str(out), overrides=tasks, device="cpu")
    assert not out.exists()


def test_a_classifier_is_not_trained_as_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a LlamaForSequenceClassification, which does not predict the next token"):
        CausalLM(model=saved(MODELS["reward"](), tmp_path))
