"""Every way back after pruning with the options it is compared with, and the pruned models they start from.

A way is a few switches: refit the kept weights first, which parameters to train, a teacher or none. All of them train
on the same batches in the same order, hold the zeros, and end as a model without adapters. One exception: a plain LoRA
over a sparse model cannot be merged without filling zeros, so it stays beside the weights.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from structured_methods import Task, width
from torch import Tensor, nn

from lightning_prune.base.types import Granularity
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.granularity import NM, Unstructured
from lightning_prune.integrations.lora.peft_layers import LoraForm
from lightning_prune.integrations.lora.peft_lora import add_lora
from lightning_prune.integrations.lora.peft_merge import merge
from lightning_prune.recovery.distill import Distill, Distiller
from lightning_prune.recovery.reconstruct import reconstruct
from lightning_prune.recovery.retrain import Part, choose_trainable, parameters_of_part
from lightning_prune.schedules import Existing, Once
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.structured.structure import Structure

RANK = 7  # all linear layers of stories3M at rank 7 are 4.5 % of its parameters
LORA = {"r": RANK, "lora_alpha": 2 * RANK}
SHARE = 0.30
WARM_UP = 0.1
FINAL_RATE = 0.1
CORRECTION_RATE = 1e-4  # that of full fine-tuning
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Base:
    """A pruned model, never changed, and what its recovery may look at.

    Args:
        model: pruned.
        dense: its parent.
        masks: by parameter name, True = keep; empty where the model is smaller instead.
        calibration: the batches it was pruned with.
    """

    model: nn.Module
    dense: nn.Module
    masks: Mapping[str, Tensor]
    calibration: Sequence[Batch]

    def check_zeros(self, model: nn.Module) -> int:
        """Assert that every zero of the masks is +0.0, and return how many kept weights are zero."""
        parameters = dict(model.named_parameters())
        num_more = 0
        for name, keep in self.masks.items():
            weight = parameters[name].detach()
            assert not weight.view(torch.int32)[~keep].any(), f"{name} has filled zeros"
            num_more += int((weight[keep] == 0).sum())
        return num_more


def masked_base(dense: nn.Module, calibration: Sequence[Batch], granularity: Granularity) -> Base:
    """Prune half of every row by Wanda."""
    model = copy.deepcopy(dense)
    pruner = Sparsifier(schedule=Once(sparsity=0.5), scorer=Wanda(), granularity=granularity)
    pruner.prune_once(model, calibration, progress=False)
    return Base(model, dense, {name: mask.clone() for name, mask in pruner.masks.items()}, calibration)


def width_base(dense: nn.Module, calibration: Sequence[Batch], structure: Structure, seed: int) -> Base:
    """Cut query heads and feed-forward units, and refit what reads them by least squares."""
    task = Task(copy.deepcopy(dense), structure, calibration, SHARE, seed, Path())
    return Base(width(Wanda())(task).model, dense, {}, calibration)


def make_base(name: str, dense: nn.Module, calibration: Sequence[Batch], structure: Structure, seed: int) -> Base:
    """Return one of `BASES`."""
    if name == "30 % width":
        return width_base(dense, calibration, structure, seed)
    return masked_base(dense, calibration, GRANULARITIES[name])


GRANULARITIES: dict[str, Granularity] = {"50 % unstructured": Unstructured(), "2:4": NM(n=2, m=4)}
BASES = (*GRANULARITIES, "30 % width")


@dataclass(frozen=True)
class Recovered:
    """A model after recovery.

    Args:
        model: without adapters, where they can be merged.
        num_trained: parameters trained.
        seconds: of refitting, training and merging.
        difference: largest difference of logits before and after merging; None where nothing was merged.
    """

    model: nn.Module
    num_trained: int
    seconds: float
    difference: float | None


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way back.

    Args:
        rate: which learning rate it uses, a key of the table of rates.
        parts: of the model, trained by themselves or beside the adapters; none is trained if this and `lora` are empty.
        lora: form of the adapters; where the base has no zeros `masked` becomes `plain`.
        distill: what the dense parent teaches; None trains on the text alone.
        corrects: whether the teacher is first trained on the same batches, which doubles the tokens.
        refit: whether the kept weights are refitted first.
        only_masked: whether it needs zeros.
    """

    rate: str = ""
    parts: tuple[Part, ...] = ()
    lora: LoraForm | None = None
    distill: Distill | None = None
    corrects: bool = False
    refit: bool = False
    only_masked: bool = False

    def recover(self, base: Base, batches: Sequence[Batch], rate: float, *, seed: int) -> Recovered:
        """Recover a copy of a base, training over the batches once; the seed draws the adapters' first values."""
        torch.manual_seed(seed)
        model: nn.Module = copy.deepcopy(base.model)
        start = time.process_time()
        if self.refit:
            reconstruct(model, base.dense.state_dict(), base.masks, base.calibration, progress=False)
        trained = self._prepared(model, base)
        num_trained = 0
        if trained is not None:
            num_trained = sum(p.numel() for p in trained.parameters() if p.requires_grad)
            teacher = base.dense
            if self.corrects:
                teacher = copy.deepcopy(base.dense)
                fit(teacher, batches, CORRECTION_RATE, holds_zeros=False)
            distiller = None if self.distill is None else Distiller(self.distill, teacher=teacher)
            if distiller is not None:
                distiller.attach(model, replace_loss=True)
            fit(trained, batches, rate, holds_zeros=bool(base.masks) and "all" in self.parts)
            if distiller is not None:
                distiller.detach()
        difference = None
        if trained is not None and trained is not model:
            model, difference = merged(trained, batches[0], can_merge=self.lora != "plain" or not base.masks)
        return Recovered(model, num_trained, time.process_time() - start, difference)

    def _prepared(self, model: nn.Module, base: Base) -> nn.Module | None:
        """Return what is trained, its parameters chosen."""
        if self.lora is None:
            if not self.parts:
                return None
            choose_trainable(model, self.parts)
            return model
        form: LoraForm = "plain" if not base.masks else self.lora
        wrapped = add_lora(model, form=form, config=LORA, masks=base.masks or None)
        for part in self.parts:
            for parameter in parameters_of_part(model, part).values():
                parameter.requires_grad_(True)
        return wrapped


def fit(model: nn.Module, batches: Sequence[Batch], rate: float, *, holds_zeros: bool) -> None:
    """Train what asks for gradients over the batches once: warm-up, then a cosine to a tenth."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    num_warm = max(1, round(WARM_UP * len(batches)))

    def factor(step: int) -> float:
        fall = (1 + math.cos(math.pi * min(1.0, step / len(batches)))) / 2
        return min(1.0, (step + 1) / num_warm) * (FINAL_RATE + (1 - FINAL_RATE) * fall)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    pruner = Sparsifier(schedule=Existing()) if holds_zeros else None
    if pruner is not None:
        pruner.attach(model, [optimizer], total_steps=len(batches))
    for batch in batches:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if pruner is not None:
        pruner.detach()


@torch.no_grad()
def merged(wrapped: nn.Module, batch: Batch, *, can_merge: bool) -> tuple[nn.Module, float | None]:
    """Return the model with its adapters merged, and how far its logits moved by that."""
    wrapped.eval()
    if not can_merge:
        return wrapped, None
    before = wrapped(input_ids=batch["input_ids"]).logits
    model = merge(wrapped)  # type: ignore[arg-type]
    return model, float((model(input_ids=batch["input_ids"]).logits - before).abs().max())


@dataclass(frozen=True)
class Grid:
    """Learning rates that are tried for one kind of training."""

    method: str
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)


ALL: tuple[Part, ...] = ("all",)
METHODS: dict[str, Method] = {
    "no recovery": Method(),
    "full fine-tuning": Method(rate="full", parts=ALL),
    "LoRA": Method(rate="LoRA", lora="plain"),
    "MaskLoRA": Method(rate="MaskLoRA", lora="masked", only_masked=True),
    "ScaleLoRA": Method(rate="ScaleLoRA", lora="scaled", only_masked=True),
    "PERP norms": Method(rate="norms", parts=("norms",)),
    "PERP norms, head": Method(rate="head", parts=("norms", "head")),
    "distillation": Method(rate="distillation", parts=ALL, distill=Distill()),
    "distillation, KL + CE": Method(rate="KL + CE", parts=ALL, distill=Distill(ce_weight=1.0)),
    "distillation, corrected teacher": Method(rate="distillation", parts=ALL, distill=Distill(), corrects=True),
    "reconstruction": Method(refit=True, only_masked=True),
    "reconstruction, then MaskLoRA": Method(rate="MaskLoRA", lora="masked", refit=True, only_masked=True),
    "reconstruction, then full": Method(rate="full", parts=ALL, refit=True, only_masked=True),
    "MaskLoRA, KL + CE": Method(rate="MaskLoRA", lora="masked", distill=Distill(ce_weight=1.0)),
    "MaskLoRA, norms": Method(rate="MaskLoRA", lora="masked", parts=("norms",)),
}
GRIDS: dict[str, Grid] = {
    "full": Grid("full fine-tuning"),
    "LoRA": Grid("LoRA", (1e-3, 3e-3, 1e-2, 3e-2)),
    "MaskLoRA": Grid("MaskLoRA", (1e-3, 3e-3, 1e-2, 3e-2)),
    "ScaleLoRA": Grid("ScaleLoRA", (1e-3, 3e-3, 1e-2, 3e-2)),
    "norms": Grid("PERP norms", (3e-3, 1e-2, 3e-2, 1e-1)),
    "head": Grid("PERP norms, head", (1e-4, 3e-4, 1e-3, 3e-3)),
    "distillation": Grid("distillation"),
    "KL + CE": Grid("distillation, KL + CE"),
}
