"""Train a model that chooses a third of its FFN units from the instruction, and take out the small model of one."""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_prune import Recipe
from lightning_prune.hf import PruningCallback
from lightning_prune.integrations.instruction.serving import InstructionModel

TASKS = {"copy: ": lambda text: text, "backwards: ": lambda text: text[::-1], "shout: ": str.upper}


def rows(length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Return rows of instruction and answer, in bytes; the instruction has no labels."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    pieces = [text[start : start + length] for start in range(0, 384 * length, length)]
    pieces = [piece for piece in pieces if piece.isascii()]
    found = []
    for number, piece in enumerate(pieces):
        prompt, answer = list(TASKS.items())[number % len(TASKS)]
        start = f"{prompt:>12}{piece}\n".encode()
        ids = torch.tensor([*start, *answer(piece).encode()])
        labels = ids.clone()
        labels[: len(start)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def main() -> None:
    """Train with the callback alone, then serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "condition.start={num_sequences: 48, num_clusters: 3, num_steps: 50}",
            "condition.guard={every: 50, num_sequences: 24}",
            "export.format=conditional",
            f"export.dir={folder}/model",
        ]
        recipe = Recipe.load("instruction/sft", overrides=overrides)
        args = TrainingArguments(
            f"{folder}/run", max_steps=steps, learning_rate=3e-3, use_cpu=True, report_to=[], save_strategy="no"
        )
        trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows(), callbacks=[PruningCallback(recipe)])
        trainer.train()
        served = InstructionModel.from_pretrained(f"{folder}/model", device="cpu")
        small = served.select(torch.tensor([list(b"     shout: hello\n")]))
    print(f"FFN units: {served.model.config.intermediate_size} -> {small.config.intermediate_size}")


if __name__ == "__main__":
    main()
