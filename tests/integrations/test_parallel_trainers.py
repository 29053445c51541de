"""Both trainers in two processes, with whole and with sharded weights: resume equals no pause, and all ranks agree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_prune.base import distributed
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as TransformersCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from tests.integrations.trainings import ResumableLoader, TinyModule, hf_trainer, lightning_trainer
from tests.loops import BATCH, NUM_STEPS, recipe
from tests.processes import Processes
from tests.tiny_models import CHECKS_SIZES, TokenDataset, tiny_llama, token_windows

FSDP = True if CHECKS_SIZES else "full_shard auto_wrap"  # Transformers 4 takes words
Way = Literal["ddp", "fsdp"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Processes]:
    with Processes(are_warnings_errors=False) as processes:
        yield processes


@dataclass(frozen=True)
class Outcome:
    """What a rank holds at the end of training: whole weights, its rows of the masks by clean name, what it said."""

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
    masks = {name[name.index("layers.") :]: mask for name, mask in conductor.masks.items()}
    return Outcome(weights, masks, is_sharded, conductor.step, report.sparsity, list(report.notes))


class ShardedModule(TinyModule):
    """The tiny module, sharded by its strategy."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def own_loader() -> ResumableLoader:
    """Return this process's batches, every other one as a Transformers Trainer deals them out."""
    loader = ResumableLoader()
    own = torch.cat(token_windows(BATCH * NUM_STEPS).split(BATCH)[dist.get_rank() :: 2])
    loader.loader = DataLoader(TokenDataset(own), batch_size=BATCH)
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


@contextmanager
def accelerate_shards_on_cpu() -> Iterator[None]:
    """Let accelerate use FSDP2 between CPU processes; it does so itself for accelerators alone."""
    start = AcceleratorState.__init__

    def start_sharded(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.fsdp_plugin, state.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState._reset_state(reset_partial_state=True)
    second_version = {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}  # Transformers 4 does not ask for it
    with mock.patch.object(AcceleratorState, "__init__", start_sharded), mock.patch.dict(os.environ, second_version):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run_transformers(way: Way, source: dict[str, Any], folder: Path, resume: str | None) -> Outcome:
    callback = TransformersCallback(source)
    model = tiny_llama(seed=0 if resume is None else 99)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 4}
    if way == "fsdp":
        options |= {"fsdp": FSDP, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    with accelerate_shards_on_cpu() if way == "fsdp" else nullcontext():
        trainer = hf_trainer(model, folder, [callback], **options)
        trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer.model, callback.run.sparsifier)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"tensors differ: {differing}"


@pytest.mark.parametrize(
    ("way", "scorer"),
    [
        pytest.param(way, scorer, marks=pytest.mark.slow if (way, scorer) == ("fsdp", "Wanda") else pytest.mark.long)
        for way in ("ddp", "fsdp")
        for scorer in ("Wanda", "Magnitude", "Taylor")
    ],
)
def test_trainers_agree_and_resume_equals_no_pause(ranks: Processes, tmp_path: Path, way: Way, scorer: str) -> None:
    wholes = []
    for run, metric, name in (
        (run_lightning, "val_loss", "step=5.ckpt"),
        (run_transformers, "eval_loss", "checkpoint-5"),
    ):
        folder = tmp_path / run.__name__
        source = recipe(scorer=scorer, guard={"metric": metric, "max": 100.0})
        export = {"export": {"format": "huggingface", "dir": str(folder / "export")}}
        whole = ranks.run(run, way, source | export, folder / "whole", None)
        assert_same(whole[0].weights, AutoModelForCausalLM.from_pretrained(folder / "export").state_dict())
        assert_same(whole[0].weights, whole[1].weights)
        wholes.append(whole)
        if run is run_transformers and way == "fsdp" and not CHECKS_SIZES:
            continue  # accelerate 1.12 restores no moments of a sharded optimizer that has none yet, pruned or not
        again = ranks.run(run, way, source, folder / "again", str(folder / "whole" / name))
        for one, other in zip(whole, again, strict=True):
            assert one.is_sharded == (way == "fsdp")
            assert one.step == other.step == NUM_STEPS
            assert one.sparsity == other.sparsity == 0.5
            assert one.notes == other.notes == []
            assert_same(one.weights, other.weights)
            assert_same(one.masks, other.masks)
    for lightning, transformers in zip(*wholes, strict=True):
        assert_same(lightning.weights, transformers.weights)
        assert_same(lightning.masks, transformers.masks)
