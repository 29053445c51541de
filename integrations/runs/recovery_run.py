"""What a recipe's section `recover` does around a training, in any trainer.

`prepare` changes the model before its optimizers are made; `start` and `finish` stand at both ends of the training.
The adapters call it at their trainer's moments; it knows no trainer.
"""

import importlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.base import distributed
from lightning_prune.base.types import Report
from lightning_prune.conditional.instruction import Instruction
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.export.folder import PLAN_NAME
from lightning_prune.integrations.instruction.marking import mark_calls
from lightning_prune.integrations.models.language_model import language_model, replace_module
from lightning_prune.integrations.runs.recovery_lora import RecoveryLora
from lightning_prune.recipe.recipe import Recipe, Recover
from lightning_prune.recovery.distill import Distiller
from lightning_prune.recovery.gap import Effort, HeldOutLoss, Measurement, RecoveryReport
from lightning_prune.recovery.held_out import measure_loss
from lightning_prune.recovery.reconstruct import ReconstructionReport, reconstruct
from lightning_prune.recovery.retrain import Trainable, choose_trainable, count_trainable
from lightning_prune.recovery.teacher import self_teacher
from lightning_prune.targets.targets import Targets, clean_name

__all__ = ["RecoveryRun", "whole_copy"]

logger = logging.getLogger(__name__)
Batches = Callable[[], Iterable[Mapping[str, Tensor]]]

_HELD_OUT_BATCHES = 32  # of the trainer's evaluation data, for the loss at the three moments


class RecoveryRun:
    """The section `recover` of one recipe at work in one training.

    Args:
        recipe: with a section `recover`.
        sparsifier: holds the masks.

    Raises:
        ValueError: if the section cannot be used.
        ImportError: if an extra that it asks for is missing.
    """

    def __init__(self, recipe: Recipe, sparsifier: Sparsifier) -> None:
        assert recipe.recover is not None
        self.options: Recover = recipe.recover
        self.recipe, self.sparsifier = recipe, sparsifier
        self.moments: dict[str, Measurement] = {}
        self.trainable = Trainable(0, 0)
        self._distiller: Distiller | None = None
        self._takes_loss: Callable[[Any], float] | None = None
        self._teacher: nn.Module | None = None
        self._prepared: nn.Module | None = None
        self._eval_batches: Batches | None = None
        self._handles: list[RemovableHandle] = []
        self._first_step = 0
        self._num_tokens: Tensor | int = 0
        self._seconds = 0.0
        self._since: float | None = None  # the moment from which time is counted, later by what measuring took
        self._lora = None if self.options.lora is None else RecoveryLora(recipe, sparsifier)
        distill = self.options.distill
        if distill is not None and distill.teacher == "self" and recipe.prune is None and recipe.condition is None:
            raise ValueError(
                "recover.distill.teacher self is the model as it is before this recipe prunes or conditions it, but "
                "there is no such section; name the folder of the dense model"
            )

    def prepare(self, module: nn.Module) -> nn.Module:
        """Change what is trained, before optimizers are made.

        Args:
            module: what the trainer trains: a Hugging Face model, or a module that holds one.

        Returns:
            what the trainer is to train in its place; the same object where it can stay.

        Raises:
            ValueError: if the model cannot be recovered so.
        """
        if self.options.reconstruct is not None:
            raise ValueError("recover.reconstruct refits weights once, without training; run it with oneshot")
        found = language_model(module)
        if found is None:
            raise ValueError("the recipe recovers a Hugging Face model, and none was found in this training")
        if getattr(found, "is_quantized", False):
            raise ValueError(
                "the model is quantized, so nothing can write into its zeros but a merge: wrap it with "
                "lightning_prune.integrations.peft_lora.add_lora(model) before the Trainer, and train without this "
                "callback"
            )
        if self.recipe.prune is None and self.recipe.condition is None and self.options.requires == "pruned":
            _check_pruned(found)
        self.copy_teacher(found)
        before = sum(parameter.numel() for parameter in found.parameters())
        if self._lora is not None:
            module = replace_module(module, found, self._lora.wrap(found))
        elif self.options.retrain:
            choose_trainable(found, self.options.retrain)
        trained = count_trainable(module)
        self.trainable = Trainable(trained.num_trainable, before)
        distributed.log(logger, logging.INFO, "recovery: %s", self.trainable)
        self._prepared = module
        return module

    def copy_teacher(self, model: nn.Module | None) -> None:
        """Copy the model as its own teacher, if the recipe asks for that; once, before anything is put into it."""
        distill = self.options.distill
        if model is None or distill is None or distill.teacher != "self":
            return
        if self._teacher is None and self._prepared is None:
            self._teacher = self_teacher(model, dtype=distill.teacher_dtype)

    @property
    def prepared(self) -> nn.Module | None:
        """Return what `prepare` has returned."""
        return self._prepared

    def has_prepared(self, module: nn.Module) -> bool:
        """Return whether `prepare` was given this module, or one that shares a part with it."""
        return self._prepared is not None and not set(self._prepared.modules()).isdisjoint(module.modules())

    @property
    def is_prepared(self) -> bool:
        """Return whether `prepare` was called."""
        return self._prepared is not None

    @property
    def has_lora(self) -> bool:
        """Return whether adapters are trained."""
        return self._lora is not None

    def export_adapter(self, wrapped: nn.Module, folder: str, **options: Any) -> None:
        """Write the adapter and its masks into a new folder; options are those of `peft_merge.export_adapter`."""
        logger.info("exported: %s", _merging().export_adapter(wrapped, folder, **options))

    def merged(self, wrapped: nn.Module, state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model below the adapters, and its tensors with the adapters merged."""
        base: nn.Module = wrapped.get_base_model()  # type: ignore[operator]
        return base, _merging().merged_state(wrapped, state)

    def merged_report(self, base: nn.Module, state: Mapping[str, Tensor], report: Report) -> Report:
        """Return the report as it is of the merged weights."""
        found: Report = _merging().measure_merged(base, state, report)
        return found

    def start(
        self,
        module: nn.Module,
        *,
        tokenizer: Any,
        eval_batches: Batches | None,
        takes_loss: Callable[[Any], float] | None,
    ) -> None:
        """Distill if asked to, and count tokens and time from here on.

        Args:
            module: what is trained, as the trainer has wrapped or sharded it.
            tokenizer: of the student, to compare with the teacher's; None if there is none.
            eval_batches: gives the trainer's evaluation data anew at each call; None if it has none.
            takes_loss: hands the trainer a function of (outputs, labels, num_items_in_batch) that gives the loss, or
                None when it is to have its own again, and returns the trainer's label smoothing; None for a trainer
                that trains on the loss in the model's output.

        Raises:
            ValueError: if `prepare` was not called before, or the teacher does not fit.
        """
        if self._prepared is None:
            raise ValueError(
                "recovery changes what is trained, which must happen before the trainer makes its optimizer: give the "
                "callback to the Trainer's constructor, and build the model before training starts"
            )
        if not self.has_prepared(module):
            raise ValueError("this callback has prepared another model since; give each Trainer one of its own")
        self._eval_batches = eval_batches
        found = language_model(module)
        assert found is not None
        if self.options.distill is not None:
            self._distill(found, tokenizer, takes_loss)
        self._handles.append(found.register_forward_pre_hook(self._count, with_kwargs=True))
        self._since = time.monotonic()

    def _distill(self, model: nn.Module, tokenizer: Any, takes_loss: Callable[[Any], float] | None) -> None:
        opening = importlib.import_module("lightning_prune.integrations.runs.hf_teacher")
        self._distiller = opening.distiller_of(
            self.options.distill,
            copied=self._teacher,
            student_tokenizer=tokenizer,
            device=distributed.local(next(model.parameters()).detach()).device,
            rank=distributed.rank(),
        )
        label_smoothing = 0.0
        if takes_loss is not None:
            label_smoothing = takes_loss(self._distiller.loss)
            self._takes_loss = takes_loss
        self._distiller.attach(model, replace_loss=takes_loss is None, label_smoothing=label_smoothing)
        if isinstance(self.recipe.condition, Instruction):
            self._handles.append(mark_calls(model, self.recipe.condition.reads))

    def begin(self) -> None:
        """Take the optimizer steps so far as those before this training; the masks are attached."""
        self._first_step = self.sparsifier.step

    def after_step(self) -> None:
        """Check, once an optimizer step was taken, that it was one towards the teacher.

        Raises:
            ValueError: if the trainer never took the gradient of the distillation's loss.
        """
        if self._distiller is not None and self.sparsifier.step > self._first_step:
            self._distiller.check_taught()

    def metrics(self) -> dict[str, float]:
        """Return the terms of the distillation in the last training call, for the trainer's log."""
        found = {} if self._distiller is None else self._distiller.metrics()
        return {f"distill/{name}": value for name, value in found.items()}

    def stop(self) -> None:
        """Take all hooks off the model, and the loss out of the trainer; a training that goes on finds its teacher."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._distiller is not None:
            self._distiller.detach()
        if self._takes_loss is not None:
            self._takes_loss(None)
        self._distiller = self._takes_loss = None

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not module.training or not isinstance(ids, Tensor):
            return
        has_mask = isinstance(attention_mask, Tensor) and attention_mask.shape == ids.shape
        self._num_tokens = self._num_tokens + (attention_mask.sum() if has_mask else ids.numel())  # type: ignore[union-attr]

    def measure(self, moment: str, model: nn.Module, results: Mapping[str, Mapping[str, float]]) -> None:
        """Measure the held-out loss and keep it with the results of lm-eval; collective.

        Args:
            moment: `before`, `pruned` or `recovered`.
            model: what is trained.
            results: task -> metric -> value; empty if nothing was evaluated.
        """
        began = time.monotonic()
        loss = None
        if self._eval_batches is not None:
            try:
                mean, count = measure_loss(_inner(model), self._held_out(), max_batches=_HELD_OUT_BATCHES)
            except ValueError as error:
                distributed.log(logger, logging.WARNING, "no held-out loss for the recovery report: %s", error)
            else:
                total, num_tokens = self._sum([mean * count, count])
                data = "the trainer's evaluation data"
                loss = HeldOutLoss(nats=total / num_tokens, num_tokens=int(num_tokens), data=data)
        self.moments[moment] = Measurement(loss=loss, results=dict(results))
        if self._since is not None:
            self._since += time.monotonic() - began

    def finish(self) -> RecoveryReport:
        """Let go of the model and return the report; collective.

        The copy that teaches stays while the masks are not the last ones, so that the training can go on.
        """
        self.stop()
        if self.sparsifier.is_final:
            self._teacher = None
        self._num_tokens = int(self._sum([float(self._num_tokens)])[0])
        self._seconds, self._since = self._elapsed(), None
        report = self.report()
        distributed.log(logger, logging.INFO, "recovery: %s", report.sentence())
        return report

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over all processes, on the device of the masks: NCCL takes no tensor of the processor."""
        device = next((mask.device for mask in self.sparsifier.masks.values()), None)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        summed: list[float] = distributed.sum_everywhere(tensor).tolist()
        return summed

    def _held_out(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the trainer's evaluation batches as far as the model can be called with them."""
        assert self._eval_batches is not None
        yield from itertools.takewhile(
            lambda batch: isinstance(batch, Mapping) and "input_ids" in batch, self._eval_batches()
        )

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def report(self) -> RecoveryReport:
        """Return what was measured so far."""
        effort = Effort(
            num_trained=self.trainable.num_trainable,
            num_parameters=self.trainable.num_parameters,
            num_tokens=int(self._num_tokens),
            seconds=self._seconds,
        )
        return RecoveryReport(**self.moments, effort=effort)

    def check_once(self) -> None:
        """Check that the section can be used without a training.

        Raises:
            ValueError: if a part of it needs one.
        """
        if self.options.trains:
            raise ValueError(
                "recover.lora, retrain, distill and learning_rate need a training; prune once with this recipe's "
                "section prune alone, then train what it wrote with its section recover (run, exec or a callback)"
            )

    def reconstruct(
        self, model: nn.Module, dense: Mapping[str, Tensor], batches: Sequence[Mapping[str, Tensor]]
    ) -> ReconstructionReport:
        """Refit the kept weights of a model that was pruned just now."""
        assert self.options.reconstruct is not None
        began = time.monotonic()
        report = reconstruct(model, dense, self.sparsifier.masks, batches, options=self.options.reconstruct)
        self._seconds = time.monotonic() - began
        self._num_tokens = report.num_tokens
        num_refitted = sum(int(self.sparsifier.masks[target.name].sum()) for target in report.targets)
        self.trainable = Trainable(num_refitted, sum(parameter.numel() for parameter in model.parameters()))
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as plain values."""
        moments = {moment: measurement.as_dict() for moment, measurement in self.moments.items()}
        return {"moments": moments, "num_tokens": int(self._num_tokens), "seconds": self._elapsed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a saved state."""
        self._num_tokens, self._seconds = int(state["num_tokens"]), float(state["seconds"])
        self.moments = {moment: Measurement.from_dict(saved) for moment, saved in state["moments"].items()}


def whole_copy(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights on the CPU, under the names of targets."""
    return {clean_name(name): tensor.detach().to("cpu", copy=True) for name, tensor in model.named_parameters()}


def _inner(model: nn.Module) -> nn.Module:
    found = language_model(model)
    assert found is not None
    return found


def _merging() -> Any:
    return importlib.import_module("lightning_prune.integrations.lora.peft_merge")


def _check_pruned(model: nn.Module) -> None:
    """Refuse a model that is neither sparse nor cut.

    Raises:
        ValueError: if it has no zeros and no note of a cut.
    """
    with torch.no_grad():
        for binding in Targets().resolve(model):
            weight = distributed.local(binding.parameter.detach())
            if weight.numel() and float((weight == 0).float().mean()) > 0.01:
                return
    folder = getattr(model, "name_or_path", "")
    if folder and (Path(folder) / PLAN_NAME).is_file():
        return
    raise ValueError(
        f"recovery needs a pruned model, but no target of this {type(model).__name__} is sparse and "
        f"{folder or 'its folder'} holds no {PLAN_NAME}; prune it first (lightning-prune oneshot), add a section "
        "prune, or set recover.requires: any"
    )
