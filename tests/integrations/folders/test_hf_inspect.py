"""What a recipe would prune is listed, and nothing is changed."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_prune.integrations.folders.hf_inspect import inspect_targets
from lightning_prune.recipe.recipe import Recipe
from tests.tiny_models import tiny_family, tiny_llama

PRUNE = {
    "scorer": "Magnitude",
    "schedule": {"class_path": "Cubic", "init_args": {"sparsity": 0.5, "start": 2, "end": 6, "interval": 2}},
}


def recipe(**prune: object) -> Recipe:
    return Recipe.load({"prune": PRUNE | prune})


def test_targets_and_what_is_left_out_are_listed_with_reasons(tmp_path: Path) -> None:
    tiny_llama(tied=False).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    (targets, left_out), sentence = inspect_targets(recipe(), str(tmp_path), total_steps=10)
    assert len(targets) == 1 + 14
    assert targets[1] == ("model.layers.0.self_attn.q_proj.weight", "32 x 32", "(out, in)", "32 x 32")
    assert left_out[1:] == [
        ("model.embed_tokens.weight", "64 x 32", "embedding"),
        ("lm_head.weight", "64 x 32", "output head"),
    ]
    assert sentence.startswith("pruning 0.5 from step 2 to step 6, every 2, of 10 of 14 weights of ")
    assert all((before[name] == tensor).all() for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_without_steps_the_ramp_is_left_out(tmp_path: Path) -> None:
    tiny_family("gpt2").save_pretrained(tmp_path)
    tables, sentence = inspect_targets(recipe(targets={"include": ["*.c_fc.weight"]}), str(tmp_path))
    assert tables[0][1] == ("transformer.h.0.mlp.c_fc.weight", "32 x 128", "(in, out)", "128 x 32")
    assert ("transformer.h.0.mlp.c_proj.weight", "128 x 32", "not included") in tables[1]
    assert sentence.startswith("2 weights of 8.19 k parameters, ")


def test_a_recipe_without_pruning_and_steps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no section prune"):
        inspect_targets(Recipe.load("structured/sleb"), str(tmp_path))
    with pytest.raises(ValueError, match="beyond the 3 steps"):
        inspect_targets(recipe(), str(tmp_path), total_steps=3)
