"""Units that are masked in training are cut in the export; the model in training keeps its shape, in both trainers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as HFCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from tests.integrations.trainings import TinyModule, dataset, hf_trainer, lightning_trainer
from tests.loops import BATCH, adamw, assert_same_weights, recipe, train
from tests.tiny_models import tiny_family, tiny_llama, token_windows

FFN = {"targets": {"include": ["*.mlp.down_proj.weight"]}, "granularity": "Channel"}
HEADS = {
    "targets": {"include": ["*.self_attn.o_proj.weight"]},
    "granularity": {"class_path": "Channel", "init_args": {"width": 8}},
}
NUM_DENSE = sum(parameter.numel() for parameter in tiny_llama().parameters())
NUM_SMALL = NUM_DENSE - 2 * 3 * 12 * 32  # a quarter of 48 units, three matrices, in two blocks


def job(out: Path, what: dict[str, Any] | None = None, *, sparsity: float = 0.25, **options: Any) -> dict[str, Any]:
    wanda = {"class_path": "Wanda", "init_args": {"scope": "tensor"}}
    sections = {"shrink": {"zeros": True}, "export": {"format": "huggingface", "dir": str(out)}} | options
    return recipe(sparsity, scorer=wanda, **(FFN if what is None else what)) | sections


def in_hf(source: dict[str, Any], folder: Path) -> tuple[PreTrainedModel, PruningRun]:
    callback = HFCallback(source)
    trainer = hf_trainer(tiny_llama(), folder, [callback])
    trainer.train()
    return trainer.model, callback.run


def in_lightning(source: dict[str, Any], folder: Path) -> tuple[PreTrainedModel, PruningRun]:
    callback = LightningCallback(source)
    module = TinyModule()
    trainer = lightning_trainer([callback], default_root_dir=folder, limit_val_batches=0)
    trainer.fit(module, DataLoader(dataset(), batch_size=BATCH), DataLoader(dataset(), batch_size=BATCH))
    return module.model, callback.run


def same_logits(masked: PreTrainedModel, small: PreTrainedModel) -> None:
    ids_NT = token_windows(2, 8)
    with torch.no_grad():
        expected = masked.eval()(input_ids=ids_NT).logits
        torch.testing.assert_close(small.eval()(input_ids=ids_NT).logits, expected, rtol=0, atol=1e-5)


def test_both_trainers_export_the_same_smaller_model(tmp_path: Path) -> None:
    small = {}
    for name, fit in (("hf", in_hf), ("lightning", in_lightning)):
        out, page = tmp_path / name, tmp_path / f"{name}_page"
        model, run = fit(job(out, report={"dir": str(page)}), tmp_path / f"{name}_run")
        assert model.config.intermediate_size == 48
        assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 48)
        small[name] = AutoModelForCausalLM.from_pretrained(out)
        assert small[name].config.intermediate_size == 36
        same_logits(model, small[name])
        said = f"shrunk: {NUM_DENSE} parameters before, {NUM_SMALL} after"
        assert run.report().notes == (said,)
        assert said in json.loads((page / "report.json").read_text())["report"]["notes"]
        note = json.loads((out / "lightning_prune.json").read_text())
        assert note["metrics"]["parameters"] == {"before": NUM_DENSE, "after": NUM_SMALL}
        assert {key: len(keep) for key, keep in note["plan"]["cuts"].items()} == {
            "model.layers.0.mlp:ffn": 36,
            "model.layers.1.mlp:ffn": 36,
        }
    assert_same_weights(small["hf"], small["lightning"])
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
        tmp_path / "lightning" / "model.safetensors"
    ).read_bytes()


def test_masked_heads_are_cut(tmp_path: Path) -> None:
    """Whole key/value groups, of two query heads each, so that as many stay in every block."""
    whole_groups = HEADS | {"granularity": {"class_path": "Channel", "init_args": {"width": 16}}}
    model, _ = in_hf(job(tmp_path / "out", whole_groups, sparsity=0.5), tmp_path / "run")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert small.config.head_dim == 8
    same_logits(model, small)


def test_one_shot_masks_are_cut_too(tmp_path: Path) -> None:
    once = {"class_path": "Once", "init_args": {"sparsity": 0.25}}
    source = job(tmp_path / "out") | {"prune": FFN | {"schedule": once}}
    model = tiny_llama().eval()
    PruningRun(source).prune_once(model, [], tokenizer=None)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.config.intermediate_size == 36
    same_logits(model, small)


def start(source: dict[str, Any], model: torch.nn.Module) -> PruningRun:
    run = PruningRun(source)
    run.start(model, [adamw(model)], total_steps=12, tokenizer=None, log=lambda metrics: None)
    return run


def test_masks_that_cut_nothing_are_refused_before_training(tmp_path: Path) -> None:
    queries = FFN | {"targets": {"include": ["*.q_proj.weight"]}}
    narrow = HEADS | {"granularity": "Channel"}
    fused = {"targets": {"include": ["*.attn.c_proj.weight"]}, "granularity": HEADS["granularity"]}
    cases: list[tuple[dict[str, Any], Any, str]] = [
        (queries, tiny_llama(), "q_proj.weight leave behind: it reads no units that can be cut"),
        (narrow, tiny_llama(), "are 8 columns wide, masks of granularity Channel 1; set prune.granularity.width to 8"),
        (fused, tiny_family("gpt2"), "c_proj.weight leave behind: .*heads: no shape follows n_head alone"),
        (FFN, get_peft_model(tiny_llama(), LoraConfig(r=2)), "merge them first"),
    ]
    for what, model, message in cases:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            start(job(tmp_path / "out", what), model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_cut_in_the_end_is_exported_whole(tmp_path: Path) -> None:
    source = job(tmp_path / "out", report={"dir": str(tmp_path / "page")})
    source["prune"]["schedule"]["init_args"] |= {"start": 10, "end": 12}
    model = tiny_llama()
    optimizer = adamw(model)
    run = PruningRun(source)
    run.start(model, [optimizer], total_steps=12, tokenizer=None, log=lambda metrics: None)
    train(model, optimizer, last=4)  # stopped before anything was masked
    with pytest.raises(ValueError, match=r"no unit is zero .*out holds the masked model in its full shape"):
        run.finish()
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    notes = json.loads((tmp_path / "page" / "report.json").read_text())["report"]["notes"]
    assert any(note.startswith("not shrunk: no unit is zero") for note in notes)


def test_recipes_that_cannot_run_in_a_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no section prune .* run it with lightning-prune oneshot"):
        HFCallback("structured/sleb")
    with pytest.raises(ValueError, match=r"shrink.zeros has no effect without a folder .* set export.dir"):
        LightningCallback(job(tmp_path / "out") | {"export": None})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(ValueError, match="is not empty; nothing was overwritten"):
        hf_trainer(tiny_llama(), tmp_path / "run", [HFCallback(job(tmp_path / "out"))]).train()
