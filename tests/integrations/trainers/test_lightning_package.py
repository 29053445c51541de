"""The callback is accepted under both names of Lightning."""

import subprocess
import sys

import pytest
from lightning.pytorch import Callback

from lightning_prune.integrations.trainers.lightning_package import base_class, loaded_classes

PROGRAM = """
import sys
import torch
import pytorch_lightning as pl
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from lightning_prune.integrations.trainers.lightning_checkpoint import PrunedCheckpoint

assert "lightning.pytorch" not in sys.modules
assert issubclass(PruningCallback, pl.Callback) and issubclass(PrunedCheckpoint, pl.callbacks.ModelCheckpoint)

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
    def training_step(self, batch, batch_idx):
        return sum(block(batch[0]).pow(2).mean() for block in self.blocks)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

recipe = {"prune": {"schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5, "at": 1}}}}
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
for callbacks in (PruningCallback(recipe), [PruningCallback(recipe), averaging]):
    module = Net()
    pl.Trainer(max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
               enable_model_summary=False, accelerator="cpu").fit(module, data)
    print([int((block.weight == 0).sum()) for block in module.blocks])
assert "lightning.pytorch" not in sys.modules
"""


@pytest.mark.slow
def test_a_trainer_of_pytorch_lightning_takes_the_callback() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[8, 8]", "[8, 8]"]


def test_a_base_class_is_that_of_what_is_loaded() -> None:
    assert Callback in loaded_classes("Callback")
    assert issubclass(base_class("Callback"), Callback)
    assert loaded_classes("NoSuchCallback") == ()
