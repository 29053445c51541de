"""A small LightningModule without a language model in it, for what trainers do around a training step."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 8


class Net(LightningModule):
    """Three residual layers of 16, learning a sum of inputs."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lr = 0.05
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.out = nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + torch.tanh(block(inputs))
        out: Tensor = self.out(inputs)
        return out

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - batch[0].sum(1, keepdim=True)).pow(2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def data(batch_size: int = 8) -> DataLoader[Any]:
    """Return eight batches that differ, the same ones at every call, in order."""
    inputs = torch.randn(8 * BATCHES, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs), batch_size=batch_size)


def cubic(sparsity: float = 0.5, **prune: Any) -> dict[str, Any]:
    """Return a recipe that prunes the blocks between the start and three quarters of the training."""
    schedule = {"class_path": "Cubic", "init_args": {"sparsity": sparsity, "start": 0.0, "end": 0.75, "interval": 4}}
    return {"prune": {"schedule": schedule} | prune}


def net_trainer(*callbacks: Any, **options: Any) -> Trainer:
    """Return a quiet Trainer of four epochs."""
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **(settings | options))


def zeros(module: nn.Module) -> float:
    """Return the share of zeros in the blocks of a net."""
    weights = [weight for name, weight in module.named_parameters() if "blocks" in name and weight.ndim > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
