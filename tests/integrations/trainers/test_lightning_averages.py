"""Averages of the weights are masked, in either order of the callbacks; other modules in callbacks are left alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from tests.integrations.lightning_nets import Net, cubic, data, net_trainer, zeros

pytestmark = pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:.*lr_scheduler.step.*")


class Ema(Callback):
    """Keep an average, validate with it, and end with it, as Lightning's EMAWeightAveraging does."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.average = AveragedModel(pl_module, avg_fn=get_ema_avg_fn(0.9))
        self.zeros_in_validation: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.average.update_parameters(pl_module)

    def swap(self, module: Any) -> None:
        for mean, weight in zip(self.average.module.parameters(), module.parameters(), strict=True):
            mean.data, weight.data = weight.data.clone(), mean.data.clone()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.swap(pl_module)
        self.zeros_in_validation.append(zeros(pl_module))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.swap(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.swap(pl_module)


def averaging(kind: str) -> Any:
    return Ema() if kind == "EMA" else StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5)


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
@pytest.mark.parametrize("is_first", [False, True])
def test_the_average_that_a_training_ends_with_is_pruned_and_exported(
    kind: str, is_first: bool, tmp_path: Path
) -> None:
    export = {"export": {"format": "dense", "dir": str(tmp_path / "out")}}
    callback, other, module = PruningCallback(cubic() | export), averaging(kind), Net()
    net_trainer(*([callback, other] if is_first else [other, callback])).fit(module, data(), data())
    assert zeros(module) == 0.5
    assert callback.run.report().sparsity == 0.5
    assert callback.run.report().notes == callback.run.broken == ()
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in module.state_dict().items())


def test_averages_are_pruned_when_they_are_validated() -> None:
    ema, module, last = Ema(), Net(), Net()
    net_trainer(PruningCallback(cubic())).fit(last, data(), data())
    net_trainer(PruningCallback(cubic()), ema).fit(module, data(), data())
    assert ema.zeros_in_validation == pytest.approx([0.352, 0.481, 0.5, 0.5], abs=2e-3)
    assert not torch.equal(module.out.weight, last.out.weight), "the average, not the last weights"


class Teaching(Callback):
    """Hold a dense teacher of the same architecture."""

    def __init__(self, teacher: Net) -> None:
        self.teacher = teacher


def test_a_teacher_in_a_callback_is_no_average() -> None:
    teacher, module = Net(), Net()
    before = copy.deepcopy(teacher.state_dict())
    net_trainer(PruningCallback(cubic()), Teaching(teacher)).fit(module, data(), data())
    assert zeros(module) == 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
