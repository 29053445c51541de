"""Prune half of a model by Wanda, train a LoRA inside the zeros, and merge it without filling one."""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_prune import Once, Recipe, Sparsifier
from lightning_prune.hf import PruningCallback
from lightning_prune.scorers.wanda import Wanda


def rows(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return bytes of the standard library's own sources as rows of a data set."""
    text = Path(argparse.__file__).read_bytes()
    ids = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    """Prune once, recover, and compare the zeros."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    model, data = LlamaForCausalLM(config), rows()
    calibration = [{"input_ids": torch.stack([row["input_ids"] for row in data[:32]])}]
    Sparsifier(schedule=Once(sparsity=0.5), scorer=Wanda()).prune_once(model, calibration, progress=False)
    zeros = model.model.layers[0].mlp.up_proj.weight == 0
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["recover.lora.config={r: 4, lora_alpha: 8}", f"export.dir={folder}/recovered"]
        recipe = Recipe.load("recovery/mask_lora", overrides=overrides)
        args = TrainingArguments(
            f"{folder}/run", max_steps=steps, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no"
        )
        Trainer(model, args, train_dataset=data, callbacks=[PruningCallback(recipe)]).train()
        recovered = AutoModelForCausalLM.from_pretrained(f"{folder}/recovered")
    weight = recovered.model.layers[0].mlp.up_proj.weight
    print(f"zeros after the merge: {(weight == 0).float().mean():.3f}, all kept: {not weight[zeros].any()}")


if __name__ == "__main__":
    main()
