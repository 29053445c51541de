"""Recover in two processes, with whole and with sharded weights: trainers and ranks agree, and zeros stay zeros."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from lightning_prune import Once, Sparsifier
from lightning_prune.base import distributed
from lightning_prune.integrations.lora.peft_lora import open_adapter
from lightning_prune.integrations.lora.peft_merge import merge
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as TransformersCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from lightning_prune.targets.targets import find_blocks
from tests.integrations.test_parallel_trainers import Way, accelerate_shards_on_cpu, assert_same, own_loader
from tests.integrations.trainings import TinyModule, hf_trainer, lightning_trainer
from tests.processes import Processes
from tests.tiny_models import tiny_llama

SOURCE: dict[str, Any] = {
    "prune": {"schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5}}},
    "recover": {"lora": {"form": "masked", "config": {"r": 4}}, "distill": {}},
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Processes]:
    with Processes(are_warnings_errors=False) as processes:
        yield processes


class ShardedModule(TinyModule):
    """The tiny module, sharded by its strategy after the adapters are in."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in find_blocks(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def trained(model: nn.Module, tokens: int) -> tuple[dict[str, Tensor], int]:
    """Return the adapters, whole, and the tokens that the report counts."""
    state = distributed.whole_state_dict(model)
    return {name[name.index("layers.") :]: tensor.clone() for name, tensor in state.items() if "lora_" in name}, tokens


def run_lightning(way: Way, folder: Path, form: str = "huggingface") -> tuple[dict[str, Tensor], int]:
    callback = LightningCallback(SOURCE | {"export": {"format": form, "dir": str(folder)}})
    module = (TinyModule if way == "ddp" else ShardedModule)(tiny_llama())
    strategy = DDPStrategy() if way == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = lightning_trainer([callback], strategy=strategy, devices=2, use_distributed_sampler=False)
    trainer.fit(module, own_loader(), own_loader())
    assert callback.run.recovery is not None
    return trained(module.model, int(callback.run.recovery._num_tokens))


def run_transformers(way: Way, folder: Path) -> tuple[dict[str, Tensor], int]:
    callback = TransformersCallback(SOURCE | {"export": {"format": "huggingface", "dir": str(folder)}})
    options: dict[str, Any] = {}
    if way == "fsdp":
        options = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    with accelerate_shards_on_cpu() if way == "fsdp" else nullcontext():
        trainer = hf_trainer(tiny_llama(), folder.with_name("trainer"), [callback], **options)
        trainer.train()
    assert callback.run.recovery is not None
    return trained(trainer.model, int(callback.run.recovery._num_tokens))


@pytest.mark.parametrize(
    "way", [pytest.param("ddp", marks=pytest.mark.long), pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_trainers_and_ranks_agree(ranks: Processes, tmp_path: Path, way: Way) -> None:
    found = {}
    for run in (run_lightning, run_transformers):
        (one, tokens), (other, _) = ranks.run(run, way, tmp_path / run.__name__)
        assert_same(one, other)
        exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / run.__name__).named_parameters())
        assert all(
            float((weight == 0).float().mean()) == 0.5
            for name, weight in exported.items()
            if name.endswith("_proj.weight")
        )
        found[run.__name__] = (one, exported, tokens)
    (one, weights, tokens), (other, same_weights, same_tokens) = found.values()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    for name in weights:
        torch.testing.assert_close(weights[name], same_weights[name], rtol=0, atol=1e-6)
    assert tokens == same_tokens


@pytest.mark.slow
def test_the_adapter_of_a_sharded_model_is_written_whole(ranks: Processes, tmp_path: Path) -> None:
    ranks.run(run_lightning, "fsdp", tmp_path / "merged")
    ranks.run(run_lightning, "fsdp", tmp_path / "adapter", "adapter")
    pruned = tiny_llama()
    Sparsifier(schedule=Once(sparsity=0.5)).prune_once(pruned, progress=False)
    opened = merge(open_adapter(pruned, tmp_path / "adapter")).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(opened[name], weight, rtol=0, atol=1e-6)
