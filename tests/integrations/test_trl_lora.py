"""Recover through TRL's own fine-tuning program, unmodified, with the LoRA that its own options make."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prune import Once, Sparsifier
from lightning_prune.cli import command as cli
from lightning_prune.integrations.lora.peft_lora import open_adapter
from tests.integrations.test_trl_sft import command, folder

DATA = os.environ.get("LIGHTNING_PRUNE_DATA")
pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="needs trl"),
    pytest.mark.skipif(DATA is None, reason="needs the folder of models and text that LIGHTNING_PRUNE_DATA names"),
]
__all__ = ["folder"]

RECIPE = """
recover:
  lora: {form: masked}
  learning_rate: {warmup: 2, decay: linear, final: 0.0}
export: {format: huggingface, dir: %s}
"""
LORA_OPTIONS = (
    "--use_peft",
    "--lora_r",
    4,
    "--lora_alpha",
    8,
    "--lora_target_modules",
    "q_proj",
    "v_proj",
    "down_proj",
)


@pytest.mark.slow
def test_sft_with_its_own_lora_keeps_the_zeros_of_a_pruned_model(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(Path(str(DATA), "models", "stories260K"))
    sparsifier = Sparsifier(schedule=Once(sparsity=0.5))
    sparsifier.prune_once(model, progress=False)
    model.save_pretrained(folder / "pruned")
    AutoTokenizer.from_pretrained(model.name_or_path).save_pretrained(folder / "pruned")
    (folder / "recipe.yaml").write_text(RECIPE % (folder / "merged"))
    out = folder / "out"
    options = [*LORA_OPTIONS, "--model_name_or_path", folder / "pruned"]
    assert cli.main(command(folder, out, *options)) == 0
    assert "lora_dropout 0.05 is set to 0: form masked has none" in "".join(capfd.readouterr())

    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    found = dict(merged.named_parameters())
    assert all(torch.equal(found[name] != 0, keep) for name, keep in sparsifier.masks.items())
    changed = {name.split(".")[-2] for name, keep in model.named_parameters() if not torch.equal(found[name], keep)}
    assert changed == {"q_proj", "v_proj", "down_proj"}

    pruned = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    opened = open_adapter(pruned, out).eval()
    ids = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, opened(input_ids=ids).logits, rtol=0, atol=1e-5)
