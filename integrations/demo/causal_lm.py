"""A small language model to train with Lightning: a Llama from scratch, or any Hugging Face causal model.

Usable from YAML: `class_path: lightning_prune.integrations.causal_lm.CausalLM`. Text for it comes from `TextData`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_prune.integrations.demo.muon_adamw import MuonAdamW
from lightning_prune.integrations.models.hf_open import open_model, predicts_next_token
from lightning_prune.integrations.text.text_data import TextData

__all__ = ["CausalLM", "LlamaSize", "TextData", "learning_rate_factor"]


@dataclass(frozen=True, kw_only=True)
class LlamaSize:
    """Shape of a Llama with tied embeddings; the defaults give 1.05 million parameters."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 2
    context: int = 128

    def build(self) -> LlamaForCausalLM:
        """Return the model with fresh weights from torch's random state."""
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_heads,
                num_key_value_heads=self.num_key_value_heads,
                max_position_embeddings=self.context,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )


def learning_rate_factor(step: int, *, warmup: int, total: int, decay: Literal["linear", "cosine"]) -> float:
    """Return what the learning rate is multiplied with.

    Args:
        step: optimizer steps taken.
        warmup: optimizer steps until 1 is reached.
        total: optimizer steps until 0 is reached.
        decay: the way down.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def _opened(name: str) -> PreTrainedModel:
    """Open a causal language model.

    Raises:
        ValueError: if it cannot be opened, or is another kind of model.
    """
    model = open_model(name)
    if not predicts_next_token(model):
        raise ValueError(
            f"{name} is a {type(model).__name__}, which does not predict the next token; CausalLM trains causal "
            "language models"
        )
    return model


class CausalLM(LightningModule):
    """Next-token training with warm-up and decay over the whole training.

    Logs `train_loss`, `val_loss` and `val_ppl`, all per token.

    Args:
        model: folder or hub id of a causal model; None builds a Llama of `size`.
        size: shape of the Llama, of no use when `model` is given.
        learning_rate: the highest, after warm-up.
        weight_decay: of matrices; vectors have none, nor have embeddings under `muon`.
        warmup_steps: optimizer steps of linear warm-up.
        decay: how the learning rate falls to zero.
        optimizer: `adamw`, or `muon` for the matrices of linear layers and AdamW for the rest; see `MuonAdamW`.
    """

    def __init__(
        self,
        model: str | None = None,
        size: LlamaSize | None = None,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 30,
        decay: Literal["linear", "cosine"] = "linear",
        optimizer: Literal["adamw", "muon"] = "adamw",
    ) -> None:
        super().__init__()
        if model is not None and size is not None:
            raise ValueError(f"size has no effect on the model loaded from {model!r}; give model or size, not both")
        self.model = (size or LlamaSize()).build() if model is None else _opened(model)
        self.model.train()  # from_pretrained gives evaluation mode
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.optimizer = optimizer

    def setup(self, stage: str | None = None) -> None:
        """Check that the tokens of the data fit the model.

        Args:
            stage: Lightning's name for what follows; not used.

        Raises:
            ValueError: if the data's tokenizer knows more tokens, or its windows are longer, than the model.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TextData):
            return
        for name, needed, given in (
            ("vocabulary", len(data.tokenizer), self.model.config.vocab_size),
            ("window", data.window, getattr(self.model.config, "max_position_embeddings", data.window)),
        ):
            if needed > given:
                raise ValueError(f"the data has a {name} of {needed}, the model takes {given}; make the two equal")

    def forward(self, **batch: Tensor) -> Any:
        """Return the model's output.

        Args:
            batch: `input_ids`, and what else the model takes.
        """
        return self.model(**batch, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch.

        Args:
            batch: `input_ids` and `labels`.
            batch_idx: not used.
        """
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss of one held-out batch.

        Args:
            batch: `input_ids` and `labels`.
            batch_idx: not used.
        """
        size = len(batch["input_ids"])
        self.log("val_loss", self(**batch).loss, prog_bar=True, sync_dist=True, batch_size=size)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity of all held-out tokens."""
        self.log("val_ppl", self.trainer.callback_metrics["val_loss"].exp(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and the learning rate's way."""
        optimizer = self._muon() if self.optimizer == "muon" else self._adamw()
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, warmup=self.warmup_steps, total=total, decay=self.decay),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _adamw(self) -> torch.optim.AdamW:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))

    def _muon(self) -> MuonAdamW:
        head = self.model.get_output_embeddings()
        layers = [module for module in self.modules() if isinstance(module, nn.Linear) and module is not head]
        linear = {id(layer.weight) for layer in layers}
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return MuonAdamW(
            [p for p in parameters if id(p) in linear],
            [p for p in parameters if id(p) not in linear],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
        )
