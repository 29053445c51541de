"""Folders of models with per-layer shapes open without this package, with the same outputs to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lightning_prune.export.folder import PLAN_NAME
from lightning_prune.export.plan_note import read_plan
from lightning_prune.integrations.per_layer.per_layer_build import build_per_layer
from lightning_prune.integrations.per_layer.per_layer_export import export_per_layer
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Plan, Share
from lightning_prune.structured.shrink import shrink
from tests.integrations.per_layer_families import FAMILIES, SKIP, parent, ragged, tiny, tokens
from tests.model_folders import character_tokenizer
from tests.tiny_models import knows_shapes_per_block

# Opens folders where this package cannot be imported; prints what happened as JSON.
READER = """
import json, sys
sys.modules["lightning_prune"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

results = {}
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    ids, expected = torch.load(f"{folder}.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        gap = (model(input_ids=ids).logits - expected).abs().max().item()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    generated = model.generate(ids, use_cache=True, **options)
    same = generated.equal(model.generate(ids, use_cache=False, **options))
    ids = ids.clone()
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    model.eval().save_pretrained(f"{folder}_trained")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}_trained", trust_remote_code=True).eval()
    with torch.no_grad():
        gap_again = (again(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(input_ids=ids).last_hidden_state.shape
    labels = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    results[name] = [gap, same, gap_again, list(hidden), type(model).__name__, labels.num_labels]
print("RESULTS", json.dumps(results))
"""
WITHOUT_TRUST = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
CLASS_NAMES = {"gpt2": "PrunedGPT2LMHeadModel", "opt": "PrunedOPTForCausalLM"}
READ = ("llama", "gpt2", "opt")


class FakeTokenizer:
    """Writes one file, as a tokenizer would."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def run_isolated(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that sees no checkout and keeps its copies of modelling files in this folder."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, stdin=subprocess.DEVNULL, check=False
    )


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("plan", [Plan(share=(Share(1, 0, 3),)), Plan(skip=SKIP)], ids=["shared", "skipped"])
def test_the_tokenizer_opens_without_the_modelling_file(name: str, plan: Plan, tmp_path: Path) -> None:
    model, structure = parent(name)
    out = export_per_layer(model, plan, tmp_path / "out", structure=structure, tokenizer=character_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert tokenizer("abc").input_ids == character_tokenizer()("abc").input_ids
    pytest.importorskip("transformers.integrations.heterogeneity")  # older ones read no entries of single blocks
    with pytest.raises(Exception, match=r"per-layer attribute|None"):  # the stock class would invent weights
        type(model).from_pretrained(out)


@pytest.mark.slow
def test_folders_open_without_the_package(tmp_path: Path) -> None:
    for name in READ:
        model, structure = parent(name)
        plan = ragged(structure, skip=SKIP)
        export_per_layer(model, plan, tmp_path / name, structure=structure)
        with torch.no_grad():
            expected = build_per_layer(model, structure, plan)(input_ids=tokens()).logits
        torch.save((tokens(), expected), tmp_path / f"{name}.pt")
    done = run_isolated(READER, tmp_path, str(tmp_path), *READ)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.partition("RESULTS")[2])
    for name in READ:
        class_name = CLASS_NAMES.get(name, f"Pruned{name.capitalize()}ForCausalLM")
        assert results[name] == [0.0, True, 0.0, [2, 12, 32], class_name, 3], name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_alone_gives_the_same_outputs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, structure = parent(name)
    out = export_per_layer(model, ragged(structure), tmp_path / "out", structure=structure)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    small = build_per_layer(model, structure, ragged(structure))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=tokens()).logits, small(input_ids=tokens()).logits)


def test_nothing_opens_it_as_a_full_model(tmp_path: Path) -> None:
    model, structure = parent("llama")
    out = export_per_layer(model, Plan(skip=((1, "mlp"),)), tmp_path / "out", structure=structure)
    done = run_isolated(WITHOUT_TRUST, tmp_path, str(out))
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


@knows_shapes_per_block
def test_its_stock_class_does_not_open_it_as_a_full_model(tmp_path: Path) -> None:
    model, structure = parent("llama")
    out = export_per_layer(model, Plan(skip=((1, "mlp"),)), tmp_path / "out", structure=structure)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        LlamaForCausalLM.from_pretrained(out)


def test_configuration_uses_the_schema_of_transformers(tmp_path: Path) -> None:
    model, structure = parent("llama")
    out = export_per_layer(model, ragged(structure, skip=SKIP), tmp_path / "out", structure=structure)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "pruned_llama"
    assert config["architectures"] == ["PrunedLlamaForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_pruned_llama.PrunedLlamaForCausalLM"
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 22, "num_attention_heads": None, "num_key_value_heads": None, "skip": ["attention"]},
        "1": {"intermediate_size": 19, "num_attention_heads": 2, "num_key_value_heads": 1},
        "2": {"intermediate_size": None, "skip": ["mlp"]},
        "3": {"intermediate_size": 13, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    assert "lightning_prune" not in (out / "modeling_pruned_llama.py").read_text()


def test_plan_parent_and_kept_units_are_recorded_and_can_be_replayed(tmp_path: Path) -> None:
    model, structure = parent("llama")
    plan = ragged(structure, skip=SKIP)
    out = export_per_layer(model, plan, tmp_path / "out", structure=structure, tokenizer=FakeTokenizer())
    assert (out / "tokenizer.json").exists()
    assert (out / "generation_config.json").exists()
    note = json.loads((out / PLAN_NAME).read_text())
    assert note["form"] == "own class"
    assert note["parent"]["class"] == "LlamaForCausalLM"
    assert note["parent"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert note["kept"]["model.layers.1.self_attn:kv_groups"] == [1]
    assert note["kept"]["model.layers.1.self_attn:heads"] == [2, 3]
    replayed = build_per_layer(model, structure, read_plan(out)[0]).state_dict()
    written = load_file(out / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()}.items() <= {
        name: tensor.shape for name, tensor in replayed.items()
    }.items()
    assert all(torch.equal(replayed[name], tensor) for name, tensor in written.items())
    assert note["num_parameters"] == sum(tensor.numel() for tensor in written.values())


def test_equal_blocks_make_a_stock_folder(tmp_path: Path) -> None:
    model, structure = parent("llama")
    plan = Plan(cuts=tuple(Cut(group.key, tuple(range(7))) for group in structure.of_kind("ffn")))
    out = export_per_layer(model, plan, tmp_path / "out", structure=structure)
    assert json.loads((out / PLAN_NAME).read_text())["form"] == "stock"
    assert sorted(path.suffix for path in out.iterdir() if path.suffix == ".py") == []
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is LlamaForCausalLM
    with torch.no_grad():
        expected = shrink(model, plan, structure=structure)(input_ids=tokens()).logits
        assert torch.equal(loaded.eval()(input_ids=tokens()).logits, expected)


def test_blocks_that_are_made_equal_again_make_a_stock_folder(tmp_path: Path) -> None:
    model, structure = parent("llama")
    widths = tuple(Cut(group.key, tuple(range(10 + group.layer))) for group in structure.of_kind("ffn"))
    small = build_per_layer(model, structure, Plan(cuts=widths))
    found = discover(small)
    plan = Plan(cuts=tuple(Cut(group.key, tuple(range(10))) for group in found.of_kind("ffn")))
    out = export_per_layer(small, plan, tmp_path / "out", structure=found)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert [block.mlp.down_proj.in_features for block in loaded.model.layers] == [10] * 4


def test_a_model_in_memory_is_saved_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, structure = parent("gpt2")
    small = build_per_layer(model, structure, ragged(structure, skip=SKIP))
    small.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    found = discover(loaded.eval())
    cuts = tuple(Cut(group.key, (0, 2, 4)) for group in found.of_kind("ffn") if group.layer == 0)
    again = export_per_layer(loaded, Plan(cuts=cuts), tmp_path / "again", structure=found)
    config = json.loads((again / "config.json").read_text())
    assert config["per_layer_config"]["0"] == {"n_head": None, "n_inner": 3, "skip": ["attention"]}
    assert (again / "modeling_pruned_gpt2.py").read_text() == (tmp_path / "saved/modeling_pruned_gpt2.py").read_text()


def test_a_parent_that_is_consumed_gives_the_same_folder(tmp_path: Path) -> None:
    model, structure = parent("llama")
    plan = ragged(structure, skip=SKIP)
    kept = export_per_layer(model, plan, tmp_path / "kept", structure=structure)
    doomed = tiny("llama")
    consumed = export_per_layer(doomed, plan, tmp_path / "consumed", structure=structure, consume=True)
    for name in ("model.safetensors", PLAN_NAME, "config.json"):
        assert (kept / name).read_bytes() == (consumed / name).read_bytes(), name
    assert doomed.model.layers[3].mlp.up_proj.weight.numel() == 0


def test_a_folder_in_use_and_an_empty_group_are_refused(tmp_path: Path) -> None:
    model, structure = parent("llama")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    with pytest.raises(ValueError, match="is not empty; nothing was overwritten"):
        export_per_layer(model, ragged(structure), tmp_path / "used", structure=structure)
    with pytest.raises(ValueError, match="would be left"):
        export_per_layer(model, Plan(cuts=(Cut("model.layers.0.mlp:ffn", ()),)), tmp_path / "out", structure=structure)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
