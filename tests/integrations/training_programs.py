"""Plain training programs that know nothing of pruning, recipes for them, and ways to compare what they leave."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

LIGHTNING = """
import argparse
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))

    def training_step(self, batch, batch_idx):
        print("step", self.global_step, flush=True)
        features, wanted = batch
        return torch.nn.functional.mse_loss(self.layers(features), wanted)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--resume")
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    saving = ModelCheckpoint(dirpath=args.out, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [saving]
    trainer = lightning.Trainer(
        max_steps=24, accelerator="cpu", devices=args.devices, callbacks=callbacks, **quiet
    )
    network = Network()
    batch = (torch.randn(8, 16), torch.randn(8, 8))
    loader = torch.utils.data.DataLoader([batch] * 6, batch_size=None)
    trainer.fit(network, loader, ckpt_path=args.resume)
    if trainer.is_global_zero:
        torch.save(network.state_dict(), args.out + "/final.pt")
"""

TRANSFORMERS = """
import argparse
import os
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

class TrainerOfMine(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--resume")
    parser.add_argument("--no_train", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1, bos_token_id=1, eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (48, 12))]
    arguments = TrainingArguments(
        args.out, max_steps=24, per_device_train_batch_size=4, learning_rate=0.01, save_steps=4, logging_steps=1,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )
    callbacks = []
    trainer = TrainerOfMine(model, arguments, None, data, callbacks=callbacks)
    print("callbacks", *[type(callback).__name__ for callback in trainer.callback_handler.callbacks])
    if not args.no_train:
        last = get_last_checkpoint(args.out) if args.resume == "last" and os.path.isdir(args.out) else args.resume
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(args.out + "/final")
"""

_RECIPE = """
prune:
  targets: {{include: ["{include}"]}}
  scorer: Taylor
  schedule: {{class_path: Linear, init_args: {{sparsity: 0.5, start: 0, end: 16, interval: 3}}}}
seed: 0
"""
LIGHTNING_RECIPE = _RECIPE.format(include="layers.*.weight")
TRANSFORMERS_RECIPE = _RECIPE.format(include="*_proj.weight")


def with_callback(program: str, adapter: str, recipe: Path) -> str:
    """Return a program that passes the pruning callback itself."""
    return program.replace(
        "    callbacks = [",
        f"    from {adapter} import PruningCallback\n    callbacks = [PruningCallback({str(recipe)!r}), ",
    )


def run(*command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command line with one thread per process, and return what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def exec_command(recipe: Path, *program: object) -> tuple[object, ...]:
    return ("-m", "lightning_prune", "exec", "--recipe", recipe, "--", *program)


def zeros(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of zeros of every matrix."""
    return {name: (weight == 0).double().mean().item() for name, weight in weights.items() if weight.ndim == 2}


def differences(left: object, right: object, path: str = "") -> list[str]:
    """List where two nests of dicts, lists and tensors are not equal bit for bit."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        if list(left) != list(right):
            return [f"{path}: keys {list(left)} and {list(right)}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for idx, (one, other) in pairs for found in differences(one, other, f"{path}.{idx}")]
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [path]
    return [] if left == right else [f"{path}: {left!r} and {right!r}"]
