"""Models whose blocks share matrices: stored once, trained in every trainer, opened without this package."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_prune.integrations.folders.hf_shrink import replay_plan, run_shrink
from lightning_prune.integrations.per_layer.per_layer_build import build_per_layer
from lightning_prune.integrations.per_layer.per_layer_export import export_per_layer
from lightning_prune.integrations.text.calibration_text import Text
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.depth.share import share_blocks
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Plan, Share
from lightning_prune.structured.shrink import shrink
from tests.integrations.per_layer.test_per_layer_export import READER, run_isolated
from tests.integrations.per_layer_families import FAMILIES, parent, tiny, tokens
from tests.integrations.trainings import TinyModule, hf_trainer, lightning_trainer, loader
from tests.model_folders import TEXT, character_tokenizer
from tests.structured.depth_models import padded_batches, shake
from tests.tiny_models import tiny_llama

SHARES = (Share(1, 0, 3), Share(2, 3, 3))
PLAN = Plan(share=SHARES)
READ = ("llama", "gpt2", "opt")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


@pytest.fixture(autouse=True)
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_gives_what_blocks_that_share_in_place_give(name: str, tmp_path: Path) -> None:
    model, structure = parent(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = build_per_layer(model, structure, PLAN)
    in_place = copy.deepcopy(model)
    share_blocks(in_place, SHARES, width=32)
    assert torch.allclose(logits(small), logits(in_place), atol=1e-5)
    assert small.state_dict().keys() == in_place.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    out = export_per_layer(model, PLAN, tmp_path / "out", structure=structure)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert torch.equal(logits(loaded), logits(small))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = loaded.generate(tokens(), **options)
    assert torch.equal(cached, loaded.generate(tokens(), use_cache=False, **options))


def test_matrices_are_stored_once(tmp_path: Path) -> None:
    model, structure = parent("llama")
    out = export_per_layer(model, PLAN, tmp_path / "out", structure=structure)
    written = load_file(out / "model.safetensors")
    assert not [
        name for name in written if name.startswith(("model.layers.1.", "model.layers.2.")) and "_proj.w" in name
    ]
    matrices = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (24, 32), "up": (24, 32)}
    matrices["down"] = (32, 24)
    saved = sum(rows * columns - 3 * (rows + columns) for rows, columns in matrices.values()) - 2 * 32
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert sum(value.numel() for value in written.values()) == dense - 2 * saved
    note = json.loads((out / "lightning_prune.json").read_text())
    assert note["num_parameters"] == dense - 2 * saved
    assert note["form"] == "own class"
    assert "cannot express" in note["reason"]
    assert Plan.from_dict(note["plan"]) == PLAN
    config = json.loads((out / "config.json").read_text())
    assert config["per_layer_config"] == {
        "1": {"num_attention_heads": None, "share_rank": 3, "share_with": 0},
        "2": {"num_attention_heads": None, "share_rank": 3, "share_with": 3},
    }
    assert "lightning_prune" not in (out / "modeling_pruned_llama.py").read_text()


@pytest.mark.long
def test_folders_open_and_train_without_the_package(tmp_path: Path) -> None:
    batches = [{"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}]
    for name in READ:
        model, structure = parent(name)
        export_per_layer(model, PLAN, tmp_path / name, structure=structure, batches=batches)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        torch.save((tokens(), logits(loaded)), tmp_path / f"{name}.pt")
    done = run_isolated(READER, tmp_path, str(tmp_path), *READ)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.partition("RESULTS")[2])
    for name in READ:
        assert results[name][:3] == [0.0, True, 0.0], name


def shared_llama() -> PreTrainedModel:
    model = tiny_llama(layers=3)
    shake(model)
    return build_per_layer(model, None, Plan(share=(Share(1, 0, 2),)))


def trained_names(before: dict[str, torch.Tensor], model: PreTrainedModel) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_both_trainers_train_factors_and_shared_matrices_alike(tmp_path: Path) -> None:
    by_hf, by_lightning = shared_llama().train(), shared_llama().train()
    before = {name: value.clone() for name, value in by_hf.state_dict().items()}
    trainer = hf_trainer(by_hf, tmp_path / "hf", [], save_strategy="steps", save_steps=4, max_steps=4)
    trainer.train()
    module = TinyModule(by_lightning)
    lightning_trainer([], max_steps=4).fit(module, loader(), loader())
    for model in (by_hf, by_lightning):
        changed = trained_names(before, model)
        assert {
            "model.layers.1.mlp.up_proj.factor_a",
            "model.layers.1.mlp.up_proj.factor_b",
            "model.layers.1.update_norm.scale",
            "model.layers.0.mlp.up_proj.weight",
        } <= changed
        donor = model.model.layers[1].mlp.up_proj.donor[0]
        assert donor is model.model.layers[0].mlp.up_proj
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(by_hf.parameters(), by_lightning.parameters(), strict=True)
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "checkpoint-4", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(by_hf))
    fresh = TinyModule(shared_llama())
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(logits(fresh.model), logits(by_lightning))


def test_only_what_makes_sense_is_cut_afterwards() -> None:
    model = shared_llama()
    structure = discover(model)
    small = shrink(model, Plan(layers=(0, 1)), structure=structure)
    assert small.config.layer_overrides == {1: {"share_with": 0, "share_rank": 2}}
    with pytest.raises(ValueError, match="block 1 shares with block 0, which is not among"):
        shrink(model, Plan(layers=(1, 2)), structure=structure)
    for plan in (Plan(skip=((1, "mlp"),)), Plan(share=(Share(2, 0, 2),))):
        with pytest.raises(ValueError, match="block 1 shares the matrices of block 0, so its shapes cannot become"):
            build_per_layer(model, structure, plan)


def test_plans_that_share_do_nothing_else() -> None:
    model, structure = parent("llama")
    with pytest.raises(ValueError, match="cuts nothing else; cut first, and share in a second run"):
        build_per_layer(model, structure, Plan(share=SHARES, skip=((0, "mlp"),)))
    with pytest.raises(ValueError, match="block 0 gives up its own matrices"):
        build_per_layer(model, structure, Plan(share=(Share(0, 3, 2), Share(1, 0, 2))))
    config = build_per_layer(model, structure, PLAN).config
    config.layer_overrides[0] = {"share_with": 3, "share_rank": 2}
    with pytest.raises(ValueError, match="block 1 shares with block 0, which has no matrices of its own"):
        type(build_per_layer(model, structure, PLAN))(config)


def test_a_consumed_parent_lends_its_tensors() -> None:
    model, structure = parent("llama")
    expected = logits(build_per_layer(model, structure, PLAN))
    copied = copy.deepcopy(model)
    small = build_per_layer(copied, structure, PLAN, consume=True)
    assert small.model.layers[0].mlp.up_proj.weight.data_ptr() == copied.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert torch.equal(logits(small), expected)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("consume", [True, False])
def test_the_head_is_the_embedding_where_it_was(is_tied: bool, consume: bool) -> None:
    model = tiny("llama", tie_word_embeddings=is_tied)
    small = build_per_layer(model, None, PLAN, consume=consume)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) is is_tied


def test_the_recipe_writes_a_normalised_folder_and_its_plan_repeats_it(tmp_path: Path) -> None:
    model = tiny_llama(layers=4)
    shake(model)
    model.save_pretrained(tmp_path / "parent")
    character_tokenizer().save_pretrained(tmp_path / "parent")
    (tmp_path / "text.txt").write_text(TEXT)
    text = Text(data=str(tmp_path / "text.txt"), num_sequences=8, sequence_length=16, batch_size=4)
    recipe = Recipe.load("structured/flexigpt", overrides=["shrink.method.rank=2"])
    options = {"model": str(tmp_path / "parent"), "text": text, "device": "cpu"}
    metrics = run_shrink(recipe, out=str(tmp_path / "one"), **options)  # type: ignore[arg-type]
    assert metrics["parameters"]["after"] < metrics["parameters"]["before"]  # type: ignore[operator]
    replay_plan(str(tmp_path / "one"), out=str(tmp_path / "two"), **options)  # type: ignore[arg-type]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    scales = [value for name, value in one.items() if name.endswith("update_norm.scale")]
    assert len(scales) == 2
    assert all((scale - 1).abs().max() > 0.01 for scale in scales)
    stock = Recipe.load("structured/flexigpt", overrides=["shrink.method.rank=2", "export.format=huggingface"])
    with pytest.raises(ValueError, match=r"cannot express; export with format per_layer; no model was written"):
        run_shrink(stock, out=str(tmp_path / "three"), **options)  # type: ignore[arg-type]


def test_shares_are_normalised_on_real_tokens_only(tmp_path: Path) -> None:
    model, structure = parent("llama")
    results = []
    for filler in (0, 9):
        batches = copy.deepcopy(padded_batches(2))
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = filler
        out = export_per_layer(model, PLAN, tmp_path / str(filler), structure=structure, batches=batches)
        results.append(load_file(out / "model.safetensors"))
    one, two = results
    assert all(torch.allclose(value, two[name], atol=1e-5) for name, value in one.items())
