"""Both trainers in two processes, with whole and with sharded weights: resume equals no pause, and all ranks agree."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_prune import distributed
from lightning_prune.integrations.hf_trainer import PruningCallback as TransformersCallback
from lightning_prune.integrations.lightning_trainer import PruningCallback as LightningCallback
from lightning_prune.sparsifier import Sparsifier
from tests.integrations.trainings import ResumableLoader, TinyModule, hf_trainer, lightning_trainer
from tests.loops import BATCH, NUM_STEPS, recipe
from tests.processes import Processes
from tests.tiny_models import TokenDataset, tiny_llama, token_windows

Way = Literal["ddp", "fsdp"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Processes]:
    with Processes(are_warnings_errors=False) as processes:
        yield processes


@dataclass(frozen=True)
class Outcome:
    """What a rank holds at the end of training: whole weights, its rows of the masks, and what it said."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    is_sharded: bool
    step: int
    sparsity: float
    notes: list[str]


def outcome(model: nn.Module, conductor: Sparsifier) -> Outcome:
    is_sharded = any(distributed.is_sharded(parameter) for parameter in model.parameters())
    weights = {name: value.clone() for name, value in distributed.whole_state_dict(model).items()}
    report = conductor.report()
    return Outcome(weights, dict(conductor.masks), is_sharded, conductor.step, report.sparsity, list(report.notes))


class ShardedModule(TinyModule):
    """The tiny module, sharded by its strategy."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def own_loader() -> ResumableLoader:
    """Return this process's batches."""
    loader = ResumableLoader()
    own = token_windows(BATCH * NUM_STEPS * 2).chunk(2)[dist.get_rank()]
    loader.loader = torch.utils.data.DataLoader(TokenDataset(own), batch_size=BATCH)
    return loader


def run_lightning(way: Way, source: dict[str, Any], folder: Path, resume: str | None) -> Outcome:
    callback = LightningCallback(source)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    model = tiny_llama(seed=0 if resume is None else 99)
    strategy = DDPStrategy() if way == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    module = (TinyModule if way == "ddp" else ShardedModule)(model)
    trainer = lightning_trainer(
        [callback, saving],
        strategy=strategy,
        devices=2,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        val_check_interval=4,
        limit_val_batches=1,
    )
    trainer.fit(module, own_loader(), own_loader(), ckpt_path=resume)
    return outcome(module.model, callback.run.sparsifier)


def run_transformers(way: Way, source: dict[str, Any], folder: Path, resume: str | None) -> Outcome:
    callback = TransformersCallback(source)
    model = tiny_llama(seed=0 if resume is None else 99)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 4}
    if way == "fsdp":
        options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    trainer = hf_trainer(model, folder, [callback], **options)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer.model, callback.run.sparsifier)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"tensors differ: {differing}"


@pytest.mark.parametrize("scorer", ["Magnitude", "Wanda", "Taylor"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("trainer", [run_lightning, run_transformers])
def test_resume_equals_no_pause(ranks: Processes, tmp_path: Path, trainer: Any, way: Way, scorer: str) -> None:
    source = recipe(scorer=scorer, guard={"metric": "val_loss", "max": 100.0})
    whole = ranks.run(trainer, way, source, tmp_path / "whole", None)
    name = "step=5.ckpt" if trainer is run_lightning else "checkpoint-5"
    again = ranks.run(trainer, way, source, tmp_path / "again", str(tmp_path / "whole" / name))
    assert_same(whole[0].weights, whole[1].weights)
    for rank in range(2):
        assert whole[rank].is_sharded == (way == "fsdp")
        assert whole[rank].step == again[rank].step == NUM_STEPS
        assert whole[rank].sparsity == again[rank].sparsity == 0.5
        assert_same(whole[rank].weights, again[rank].weights)
        assert_same(whole[rank].masks, again[rank].masks)
