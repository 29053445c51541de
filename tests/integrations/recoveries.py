"""Trainings that recover, in either trainer, from the sections of a recipe."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as TransformersCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from tests.integrations.trainings import TinyModule, hf_trainer, lightning_trainer, loader
from tests.tiny_models import tiny_llama

PRUNE = {"schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5}}}
LORA = {"form": "masked", "config": {"r": 4}}


def recipe(recover: dict[str, Any], out: Path, **sections: Any) -> dict[str, Any]:
    """Return a recipe that prunes half at once, recovers as these options say and exports below a folder."""
    export = {"format": "huggingface", "dir": str(out / "export")}
    return {"prune": PRUNE, "recover": recover, "export": export} | sections


def with_transformers(content: dict[str, Any], out: Path, *, resume: Path | None = None, **options: Any) -> Any:
    """Train a tiny Llama under a Hugging Face Trainer; return the callback and the model."""
    callback = TransformersCallback(content)
    trainer = hf_trainer(options.pop("model", None) or tiny_llama(), out, [callback], **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return callback, trainer.model


def with_lightning(content: dict[str, Any], *, resume: Path | None = None, callbacks: Any = (), **options: Any) -> Any:
    """Train a tiny Llama under Lightning; return the callback and the model."""
    callback = LightningCallback(content)
    module = TinyModule()
    trainer = lightning_trainer([callback, *callbacks], **({"enable_checkpointing": bool(callbacks)} | options))
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return callback, module.model


def weights(folder: Path) -> dict[str, Tensor]:
    """Return what was exported below a folder."""
    return dict(AutoModelForCausalLM.from_pretrained(folder / "export").named_parameters())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two models hold the same weights, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
