"""Prune 60 % of a small language model while a `Trainer` trains it; the folder opens with the stock class."""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_prune import Recipe
from lightning_prune.hf import PruningCallback


def rows(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return bytes of the standard library's own sources as rows of a data set."""
    text = Path(argparse.__file__).read_bytes()
    ids = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    """Train, prune, save, and count the zeros in what was saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    recipe = Recipe.load("train/gradual_magnitude", overrides=["prune.schedule.sparsity=0.6"])
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows(), callbacks=[PruningCallback(recipe)])
        trainer.train()
        trainer.save_model(f"{folder}/pruned")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/pruned")
    weight = model.model.layers[0].mlp.up_proj.weight
    print(f"zeros in a saved weight: {(weight == 0).float().mean():.3f}")


if __name__ == "__main__":
    main()
