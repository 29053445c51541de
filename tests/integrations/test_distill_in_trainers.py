"""Distillation in real trainers: each gives the weights of a bare loop in plain torch."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from lightning_prune.recovery.distill import Distill, Distiller
from lightning_prune.recovery.matching import Hidden, SquaredError
from lightning_prune.recovery.teacher import self_teacher
from tests.integrations.trainings import RECOMPUTE
from tests.processes import Processes
from tests.tiny_models import tiny_family, tiny_llama, token_windows

DATA = os.environ.get("LIGHTNING_PRUNE_DATA", "")
STEPS, ACCUMULATE, BATCH = 2, 2, 3
IDS = token_windows(STEPS * ACCUMULATE * BATCH)


def rows() -> list[dict[str, Tensor]]:
    """Return sequences whose beginnings do not count, of different lengths."""
    found = []
    for index, ids_T in enumerate(IDS):
        labels_T = ids_T.clone()
        labels_T[: 1 + index % 7] = -100  # Transformers counts the first label of some models, though it predicts none
        found.append({"input_ids": ids_T, "labels": labels_T})
    return found


def student(family: str) -> PreTrainedModel:
    model = tiny_family(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def teacher(family: str) -> nn.Module:
    taught = self_teacher(tiny_family(family))
    with torch.no_grad():
        for parameter in taught.parameters():
            parameter.mul_(1.5)
    return taught


def bare_loop(model: nn.Module, taught: nn.Module, *, hidden_weight: float = 0.0) -> None:
    """Train with the mean over all tokens of an optimizer step, on its whole batch at once."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    data, size = rows(), ACCUMULATE * BATCH
    for start in range(0, len(data), size):
        ids = torch.stack([row["input_ids"] for row in data[start : start + size]])
        labels = torch.stack([row["labels"] for row in data[start : start + size]])
        counts = labels[:, 1:] != -100
        own, others = (one(input_ids=ids, output_hidden_states=True) for one in (model, taught))
        log_q, p = own.logits[:, :-1][counts].log_softmax(-1), others.logits[:, :-1][counts].softmax(-1)
        loss = functional.kl_div(log_q, p, reduction="batchmean")
        pairs = zip(own.hidden_states[1:], others.hidden_states[1:], strict=True)
        terms = [(one[:, :-1][counts] - two[:, :-1][counts]).square().mean(-1).mean() for one, two in pairs]
        (loss + hidden_weight * sum(terms)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def arguments(out: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return settings | options


def close(model: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_trainer_with_accumulation_equals_a_bare_loop(family: str, tmp_path: Path) -> None:
    taught, model, expected = teacher(family), student(family), student(family)
    bare_loop(expected, taught, hidden_weight=0.3)
    distiller = Distiller(Distill(hidden=Hidden(distance=SquaredError(), weight=0.3)), teacher=taught)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_loss_func=distiller.loss,
    )
    distiller.attach(model, replace_loss=False)
    trainer.train()
    close(model, expected)
    found = trainer.evaluate()["eval_loss"]
    distiller.detach()
    trainer.compute_loss_func = None
    assert found == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_lightning_with_accumulation_equals_a_bare_loop() -> None:
    class Module(LightningModule):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch, num_items_in_batch=items[index // ACCUMULATE]).loss
            return loss * ACCUMULATE  # Lightning divides it

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    data = rows()
    counts = torch.tensor([int((row["labels"][1:] != -100).sum()) for row in data])
    items = counts.view(STEPS, -1).sum(1).tolist()
    taught, model, expected = teacher("llama"), student("llama").train(), student("llama").train()
    bare_loop(expected, taught)
    distiller = Distiller(Distill(), teacher=taught)
    distiller.attach(model, replace_loss=True)
    trainer = LightningTrainer(
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model), DataLoader(data, batch_size=BATCH))  # type: ignore[arg-type]
    close(model, expected)


def test_adapters_learn_from_the_teacher_as_in_a_bare_loop() -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        wrapped = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        return wrapped.train()

    taught, model, expected = teacher("llama"), adapted(), adapted()
    bare_loop(expected, taught, hidden_weight=0.3)
    distiller = Distiller(Distill(hidden=Hidden(distance=SquaredError(), weight=0.3)), teacher=taught)
    distiller.attach(model, replace_loss=True)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for batch in DataLoader(rows(), batch_size=ACCUMULATE * BATCH):  # type: ignore[arg-type]
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    close(model, expected)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Processes]:
    with Processes(are_warnings_errors=False) as processes:
        yield processes


def train_on_a_rank(cache: str) -> tuple[dict[str, Tensor], int]:
    """Train in this process on its half of each batch; return the weights and how often the teacher ran."""
    rank = torch.distributed.get_rank()
    model, taught = tiny_llama().train(), teacher("llama")
    runs: list[int] = []
    taught.register_forward_hook(lambda *_: runs.append(1))
    options = Distill(top_k=32, cache_dir=cache) if cache else Distill(hidden=Hidden(distance=SquaredError()))
    distiller = Distiller(options, teacher=taught, rank=rank)
    distiller.attach(model, replace_loss=True)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for epoch in range(2):
        ids = IDS[:8].view(2, 4, -1)[(rank + epoch) % 2]  # the other half in the second epoch
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.barrier()
    return {name: value.clone() for name, value in model.state_dict().items()}, len(runs)


@pytest.mark.slow  # starts two processes
def test_two_processes_agree_and_share_what_they_cache(ranks: Processes, tmp_path: Path) -> None:
    for cache in ("", str(tmp_path / "cache")):
        first, second = ranks.run(train_on_a_rank, cache)
        assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
        assert (first[1], second[1]) == ((1, 1) if cache else (2, 2))


@torch.no_grad()
def divergence(model: nn.Module, taught: nn.Module, batches: list[dict[str, Any]]) -> float:
    """Return the Kullback-Leibler divergence from the teacher's next token, per token that counts."""
    total, number = 0.0, 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        counts = batch["labels"][:, 1:] != -100
        log_q, log_p = (one(**inputs).logits[:, :-1][counts].log_softmax(-1) for one in (model, taught))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        number += int(counts.sum())
    return total / number


@pytest.mark.slow  # loads trl
@pytest.mark.skipif(not DATA, reason="LIGHTNING_PRUNE_DATA names no folder with the trained models")
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_trl_trains_on_the_divergence_and_evaluates_the_cross_entropy(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    folder = Path(DATA, "models", "stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder)
    taught = self_teacher(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    untrained = copy.deepcopy(model)  # later the Trainer ties its forward to this very model
    runs: list[int] = []
    taught.register_forward_hook(lambda *_: runs.append(1))
    text = Path(DATA, "text", "tinystories_v2_train.txt").read_text(encoding="utf-8")
    stories = Dataset.from_dict(
        {"text": [story.strip() for story in text.split("<|endoftext|>") if len(story) > 200][:24]}
    )
    settings = arguments(tmp_path, max_steps=6, optim="adamw_torch", learning_rate=1e-3, logging_steps=1)
    distiller = Distiller(Distill(), teacher=taught)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings, max_length=64, bf16=False, **{RECOMPUTE: False}),
        train_dataset=stories,
        eval_dataset=stories,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    before = trainer.evaluate()["eval_loss"]
    calls: list[dict[str, Any]] = []
    batches: list[dict[str, Any]] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if model.training:
            batches.append(calls[-1] | {"labels": labels})
        return distiller.loss(outputs, labels, num_items_in_batch)

    trainer.compute_loss_func = loss
    distiller.attach(model, replace_loss=False)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert runs == []
    seen = model.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    trainer.train()
    seen.remove()
    assert len(runs) == 6 * ACCUMULATE  # the second forward pass of the trainer, for its metrics, asks no teacher
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(divergence(untrained, taught, batches[:ACCUMULATE]), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] < before
