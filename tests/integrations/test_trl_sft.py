"""Prune through TRL's own fine-tuning program, unmodified, offline, with a trained model and real text."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_prune.cli import command as cli
from tests.integrations.training_programs import TRANSFORMERS_RECIPE, differences, zeros

DATA = os.environ.get("LIGHTNING_PRUNE_DATA")
pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="needs trl"),
    pytest.mark.skipif(DATA is None, reason="needs the folder of models and text that LIGHTNING_PRUNE_DATA names"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process to kill in /proc"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a dataset of stories and a recipe; the hub is out of reach."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    text = Path(str(DATA), "text", "tinystories_v2_train.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if len(story) > 200][:48]
    (tmp_path / "stories").mkdir()
    lines = [json.dumps({"text": story}) + "\n" for story in stories]
    (tmp_path / "stories" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(TRANSFORMERS_RECIPE.replace("end: 16", "end: 9"))
    return tmp_path


def command(folder: Path, out: Path, *options: object) -> list[str]:
    program = {
        "model_name_or_path": Path(str(DATA), "models", "stories260K"),
        "dataset_name": folder / "stories",
        "output_dir": out,
        "max_steps": 12,
        "save_steps": 4,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags = [str(part) for name, value in program.items() for part in (f"--{name}", value)]
    start = ["exec", "--recipe", str(folder / "recipe.yaml"), "--", "-m", "trl.scripts.sft", "--use_cpu"]
    return [*start, *flags, *map(str, options)]


def run_and_kill(folder: Path, out: Path, moment: Path) -> None:
    """Start the same command in a process of its own, and kill the training process when a path appears."""
    arguments = [sys.executable, "-m", "lightning_prune", *command(folder, out)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not moment.exists() and parent.poll() is None:
            time.sleep(0.001)
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        _, errors = parent.communicate(timeout=60)
        assert parent.returncode == 128 + signal.SIGKILL, errors


@pytest.mark.long
def test_sft_is_pruned_and_survives_a_kill(folder: Path) -> None:
    whole, killed = folder / "whole", folder / "killed"
    assert cli.main(command(folder, whole)) == 0
    run_and_kill(folder, killed, killed / "checkpoint-8" / "model.safetensors")
    assert not (killed / "model.safetensors").exists()

    complete = [path.parent for path in killed.glob("checkpoint-*/trainer_state.json")]
    last = max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    assert last.name in ("checkpoint-4", "checkpoint-8")
    moved = last.rename(folder / last.name)
    assert cli.main(command(folder, killed, "--resume_from_checkpoint", moved)) == 0

    expected, weights = (load_file(out / "model.safetensors") for out in (whole, killed))
    assert {name for name, share in zeros(weights).items() if share == 0.5} == {
        name for name in weights if name.endswith("_proj.weight")
    }
    assert differences(expected, weights) == []
    ends = [out / "checkpoint-12" for out in (whole, killed)]
    assert differences(*(torch.load(end / "optimizer.pt", weights_only=True) for end in ends)) == []
    one, other = (torch.load(end / "lightning_prune.pt", weights_only=True)["run"]["sparsifier"] for end in ends)
    for state in (one, other):
        del state["history"], state["digest"]  # the history holds what TRL logs: it counts tokens anew after a resume
    assert differences(one, other) == []
    assert one["step"] == 12
