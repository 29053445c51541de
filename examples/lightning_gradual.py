"""Prune 70 % of a small language model while PyTorch Lightning trains it."""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_prune.lightning import PruningCallback


def windows(length: int = 64) -> Tensor:
    """Return ids_NT: bytes of the standard library's own sources."""
    text = Path(argparse.__file__).read_bytes()
    return torch.tensor(list(text[: len(text) // length * length])).view(-1, length)


class LanguageModel(pl.LightningModule):
    """Any LightningModule; it knows nothing of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of the next byte."""
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train, prune, and count the zeros."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    pl.seed_everything(0)
    pruning = PruningCallback("train/gradual_magnitude")
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[pruning],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(LanguageModel(), DataLoader(windows(), batch_size=8, shuffle=True))
    print(f"sparsity of the targets: {pruning.run.report().sparsity:.3f}")


if __name__ == "__main__":
    main()
