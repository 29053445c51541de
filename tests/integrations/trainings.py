"""The tiny training of `tests.loops` in each trainer, on the same fixed batches."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from packaging.version import Version
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from tests.loops import BATCH, NUM_STEPS
from tests.tiny_models import TokenDataset, tiny_llama, token_windows

resumes_in_place = pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.6"), reason="Lightning 2.4 repeats batches after a resume"
)
RECOMPUTE = next(  # the option's name changed in Transformers 5
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


def dataset() -> TokenDataset:
    """Return the sequences of `tests.loops.batches`."""
    return TokenDataset(token_windows(BATCH * NUM_STEPS))


class InOrderTrainer(Trainer):
    """A Trainer that neither shuffles nor divides the loss by its own token count, as the bare loop does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not hasattr(self, "_loss_shifts_labels"):  # Transformers 4 counts the first label too, which no loss reads
            batch_samples = [batch | {"labels": batch["labels"][..., 1:]} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def hf_trainer(model: PreTrainedModel, out: Path, callbacks: list[Any], **options: Any) -> Trainer:
    """Return a Trainer that steps as the bare loop does."""
    settings: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return InOrderTrainer(
        model=model,
        args=TrainingArguments(str(out), **(settings | options)),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        callbacks=callbacks,
    )


class TinyModule(LightningModule):
    """A plain LightningModule around a tiny Llama."""

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model = tiny_llama() if model is None else model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


def lightning_trainer(callbacks: list[Any], **options: Any) -> LightningTrainer:
    """Return a Trainer that steps as the bare loop does."""
    settings: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "accelerator": "cpu",
        "devices": 1,
        "gradient_clip_val": 1.0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return LightningTrainer(callbacks=callbacks, **(settings | options))


class ResumableLoader:
    """The batches of `tests.loops.batches` in order; a resume goes on after the batches already seen."""

    def __init__(self) -> None:
        self.loader: DataLoader[dict[str, Tensor]] = DataLoader(dataset(), batch_size=BATCH)
        self.num_seen = 0
        self.num_to_skip = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.num_seen, skip, self.num_to_skip = self.num_to_skip, self.num_to_skip, 0
        for batch in itertools.islice(self.loader, skip, None):
            self.num_seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches were seen."""
        return {"num_seen": self.num_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches already seen."""
        self.num_to_skip = state["num_seen"]


def loader() -> ResumableLoader:
    """Return the batches of `tests.loops.batches` in order."""
    return ResumableLoader()
