"""`lightning-prune run`: LightningCLI with the recipe's pruning, for our classes and the user's own."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lightning_prune.cli import command as cli
from lightning_prune.integrations.instruction.folder import is_conditional
from lightning_prune.recipe.recipe import Recipe
from tests.integrations.trainings import resumes_in_place
from tests.model_folders import TEXT, write_model_folder

OWN_CLASSES = """
import torch
from lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 16, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class Points(LightningDataModule):
    def __init__(self, number: int = 32) -> None:
        super().__init__()
        self.number = number

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(self.number, 8, generator=generator)
        return DataLoader(TensorDataset(points, points[:, :4].argmax(1)), batch_size=8)
"""
RECIPE = """
trainer:
  max_steps: 8
  accelerator: cpu
  devices: 1
  logger: {class_path: CSVLogger, init_args: {save_dir: logs}}
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {every_n_train_steps: 4, save_top_k: -1, dirpath: saved, filename: "{step}"}
model: {class_path: own_classes.Net, init_args: {width: 32}}
data: {class_path: own_classes.Points}
prune:
  targets: {include: ["net.*.weight"]}
  schedule: {class_path: Linear, init_args: {sparsity: 0.5, start: 1, end: 6, interval: 1}}
"""

pytestmark = [
    # lightning 2.6 calls jsonargparse by names that have new ones since 4.49
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4.49:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning:DeprecationWarning"),
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in an empty folder that holds a user's module and recipe."""
    (tmp_path / "own_classes.py").write_text(OWN_CLASSES)
    (tmp_path / "job.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_classes", None)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def share_of_zeros(checkpoint: Path) -> list[float]:
    return [float((value == 0).float().mean()) for name, value in weights(checkpoint).items() if "weight" in name]


def test_users_own_classes_are_trained_and_pruned(workplace: Path) -> None:
    assert cli.main(["run", "--config", "job.yaml"]) == 0
    assert share_of_zeros(workplace / "saved" / "step=8.ckpt") == [0.5, 0.5]
    assert weights(workplace / "saved" / "step=8.ckpt")["net.0.weight"].shape == (32, 8)


def test_every_value_can_be_overridden(workplace: Path) -> None:
    options = ["--model.width=16", "--trainer.max_steps", "4", "--prune.schedule.sparsity=0.25"]
    assert cli.main(["run", "--config", "job.yaml", *options, "--prune.schedule.end=3", "--data.number=16"]) == 0
    assert share_of_zeros(workplace / "saved" / "step=4.ckpt") == [0.25, 0.25]
    assert weights(workplace / "saved" / "step=4.ckpt")["net.0.weight"].shape == (16, 8)


def test_classes_can_be_named_on_the_command_line(workplace: Path) -> None:
    recipe = {key: value for key, value in yaml.safe_load(RECIPE).items() if key not in ("model", "data")}
    (workplace / "bare.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["run", "--config", "bare.yaml", "--model", "own_classes.Net", "--data=own_classes.Points"]) == 0
    assert share_of_zeros(workplace / "saved" / "step=8.ckpt") == [0.5, 0.5]


@resumes_in_place
def test_resume_is_exact_from_the_saved_configuration(workplace: Path) -> None:
    assert cli.main(["run", "--config", "job.yaml", "--prune.schedule.sparsity=0.75"]) == 0
    saved = workplace / "logs" / "lightning_logs" / "version_0" / "config.yaml"
    assert Recipe.load(saved).prune == Recipe.load("job.yaml", overrides=["prune.schedule.sparsity=0.75"]).prune
    whole = weights((workplace / "saved" / "step=8.ckpt").rename(workplace / "whole.ckpt"))
    half = (workplace / "saved" / "step=4.ckpt").rename(workplace / "moved.ckpt")
    assert cli.main(["run", "--config", str(saved), "--ckpt_path", str(half)]) == 0
    resumed = weights(workplace / "saved" / "step=8.ckpt")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert share_of_zeros(workplace / "saved" / "step=8.ckpt") == [0.75, 0.75]


def test_print_config_does_nothing_and_can_be_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_steps=4", "--prune.schedule.end=3", "--model.width=24"]
    assert cli.main(["run", "--config", "job.yaml", *options, "--print_config"]) == 0
    printed = capsys.readouterr().out
    content = yaml.safe_load(printed)
    assert content["trainer"]["max_steps"] == 4
    assert content["trainer"]["max_time"] is None, "defaults are shown too"
    assert content["model"] == {"class_path": "own_classes.Net", "init_args": {"width": 24, "learning_rate": 0.1}}
    assert content["prune"]["schedule"]["init_args"]["end"] == 3
    assert content["prune"]["scorer"] == {"class_path": "Magnitude", "init_args": {"scope": "tensor"}}
    assert sorted(os.listdir(workplace)) == sorted(
        {"job.yaml", "own_classes.py"} | ({"__pycache__"} & set(os.listdir()))
    )
    (workplace / "printed.yaml").write_text(printed)
    assert cli.main(["run", "--config", "printed.yaml"]) == 0
    assert weights(workplace / "saved" / "step=4.ckpt")["net.0.weight"].shape == (24, 8)


def test_a_model_folder_fills_the_language_model(workplace: Path) -> None:
    folder = write_model_folder(workplace / "model")
    (workplace / "text.txt").write_text((TEXT + "\n") * 20)
    data = {"path": "text.txt", "tokenizer": str(folder), "window": 16, "batch_size": 4, "hold_out": 2}
    recipe = yaml.safe_load(RECIPE) | {
        "data": {"class_path": "lightning_prune.integrations.text.text_data.TextData", "init_args": data},
        "prune": {"schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5, "at": 1}}},
    }
    del recipe["model"]
    recipe["trainer"] |= {"max_steps": 4, "limit_val_batches": 1}
    (workplace / "lm.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["run", "--config", "lm.yaml", "--model", str(folder), "--model.warmup_steps=0"]) == 0
    name = "model.model.layers.0.mlp.up_proj.weight"
    trained = weights(workplace / "saved" / "step=4.ckpt")[name]
    assert trained.shape == (48, 32)
    assert int((trained == 0).sum()) == trained.numel() // 2


def test_a_condition_trains_evaluates_on_tasks_of_held_out_text_serves_and_reports(workplace: Path) -> None:
    folder = write_model_folder(workplace / "model")
    (workplace / "texts").mkdir()
    for number in range(4):
        lines = (f"the quick brown fox number {number} jumps over {line} lazy dogs" for line in range(60))
        (workplace / "texts" / f"{number}.txt").write_text("\n".join(lines))
    data = {"path": "texts", "tokenizer": str(folder), "window": 16, "batch_size": 4, "hold_out": 2, "tasks": "tasks"}
    condition = {"budget": {"keep": 0.5}, "reads": {"source": "chunk", "chunk": 4}, "start": None}
    recipe = yaml.safe_load(RECIPE) | {
        "data": {"class_path": "lightning_prune.integrations.text.text_data.TextData", "init_args": data},
        "condition": {
            "class_path": "Instruction",
            "init_args": condition | {"guard": {"every": 2, "num_sequences": 4}},
        },
        "evaluate": {"tasks": ["next_line"], "include_path": "tasks", "limit": 3, "at": ["end"]},
        "export": {"format": "conditional", "dir": "out"},
        "report": {"dir": "report"},
    }
    del recipe["model"], recipe["prune"]
    recipe["trainer"] |= {"max_steps": 4, "limit_val_batches": 1}
    (workplace / "conditioned.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--model", str(folder), "--model.warmup_steps=0", "--condition.guard.every=3", "--condition.ramp=0"]
    assert cli.main(["run", "--config", "conditioned.yaml", *options]) == 0
    record = json.loads((workplace / "report" / "report.json").read_text())
    assert [entry["step"] for entry in record["condition"]["measurements"]] == [3, 4]
    assert 0 <= record["evaluations"][-1]["results"]["next_line"]["acc"] <= 1
    assert record["condition"]["first_token"]["difference"] < 1e-4
    assert is_conditional(workplace / "out")


WRONG = [
    (["--config", "jobb.yaml"], "jobb.yaml: no such file; a recipe is a YAML file or a packaged name"),
    (["--config", "job.yaml", "--trainer.max_stps=3"], "trainer.max_stps"),
    (["--config", "job.yaml", "--trainer.max_steps=many"], "Got value: many"),
    (["--config", "job.yaml", "--model.widht=3"], "widht"),
    (["--config", "job.yaml", "--model=own_classes.Nett"], "--model own_classes.Nett is neither a class"),
    (["--config", "job.yaml", "--model=no_such_module.Net"], "--model no_such_module.Net is neither a class"),
    (["--config", "job.yaml", "--model"], "--model needs a value"),
    (["--config", "job.yaml", "--prune.scorer=Magnitud"], "unknown scorer 'Magnitud'; did you mean 'Magnitude'"),
    (["--config", "oneshot/magnitude_half"], "recipe oneshot/magnitude_half has no model section"),
    (["--config", "job.yaml", "--ckpt_path=none.ckpt"], "none.ckpt"),
    (["--config", "job.yaml", "--prune.schedule.end=600"], "beyond the 8 steps of this training"),
    (["--config", "job.yaml", '--prune.targets.include=["*.nope"]'], "matches no weight"),
]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in captured.err
    assert not Path("saved").exists()


def test_a_file_that_is_no_checkpoint_is_told_before_anything_is_built(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": {"net.0.weight": torch.rand(400)}}, "whole.ckpt")
    whole = Path("whole.ckpt").read_bytes()
    torch.save({"a": 1}, "foreign.ckpt")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"path": Path("x")}}, "objects.ckpt")
    written = {"cut.ckpt": whole[: len(whole) // 2], "empty.ckpt": b"", "noise.ckpt": bytes(range(256)) * 8}
    for name, content in written.items():
        Path(name).write_bytes(content)
    said = {
        "cut.ckpt": "cannot read the checkpoint cut.ckpt: it is truncated or damaged; use an earlier one",
        "empty.ckpt": "cannot read the checkpoint empty.ckpt",
        "noise.ckpt": "cannot read the checkpoint noise.ckpt",
        "foreign.ckpt": "foreign.ckpt is no checkpoint of a Lightning training (it lacks pytorch-lightning_version)",
        "list.ckpt": "list.ckpt is no checkpoint of a Lightning training",
        "objects.ckpt": "opening it could run code",
    }
    before = sorted(path.name for path in workplace.iterdir())
    for name, message in said.items():
        assert cli.main(["run", "--config", "job.yaml", "--ckpt_path", name]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error
    assert sorted(path.name for path in workplace.iterdir()) == before
