"""What a recipe's section `condition` does around a training, in any trainer.

`prepare` puts the method into the model before its optimizers are made, `take_in` gives what it added a learning rate
in the user's optimizer, `start` begins it, `finish` leaves it at work in the model, to be saved and served. The
adapters call it at their trainer's moments; it knows no trainer.
"""

import importlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.base import distributed
from lightning_prune.calibration.hooks import unwrap_optimizer
from lightning_prune.conditional.instruction import Instruction, InstructionCondition
from lightning_prune.conditional.method import Condition, ConditionMethod
from lightning_prune.integrations.instruction.added_loss import AddedLoss
from lightning_prune.integrations.instruction.insertion import base_model, insert
from lightning_prune.integrations.instruction.marking import MarkingCollator
from lightning_prune.integrations.instruction.rates import take_in
from lightning_prune.integrations.instruction.record import ConditionRecord, joined
from lightning_prune.integrations.models.language_model import language_model
from lightning_prune.predictors.collapse import Conditioning

__all__ = ["Batches", "ConditionRun"]

logger = logging.getLogger(__name__)
Batches = Callable[[], Iterable[Any]]


class ConditionRun:
    """The section `condition` of one recipe at work in one training.

    Args:
        method: of the recipe.

    Raises:
        ValueError: if it takes no training.
    """

    def __init__(self, method: ConditionMethod) -> None:
        if not method.is_trained:
            raise ValueError(
                f"{type(method).__name__} is made from texts without a training; run its recipe with lightning-prune "
                "oneshot, or condition a training with Instruction"
            )
        self.method = method
        self.condition: Condition | None = None
        self._sample: dict[str, Tensor] | None = None  # that the guard measures with
        self._loss: AddedLoss | None = None
        self._measured_at = -1
        self._tokenizer: Any = None
        self._record = ConditionRecord()
        self._is_below_adapters = False
        self._handles: list[RemovableHandle] = []

    def prepare(self, module: nn.Module) -> nn.Module:
        """Put the method into the model; once, also if a trainer asks again.

        Raises:
            ValueError: if there is no Hugging Face model, or it cannot hold the method.
        """
        found = language_model(module)
        if found is None:
            raise ValueError("the recipe conditions a Hugging Face model, and none was found in this training")
        model = base_model(found)
        self._is_below_adapters = model is not found
        if self.condition is None:
            self.condition = insert(self.method, model, is_below_adapters=self._is_below_adapters)
            self._loss = AddedLoss(self.condition, model)
            num = sum(p.numel() for one in self.condition.added().values() for p in one.parameters())
            said = "conditioning: %s in %s, %d parameters added"
            distributed.log(logger, logging.INFO, said, type(self.method).__name__, type(model).__name__, num)
        elif not _holds(module, self.condition):
            raise ValueError("this callback has conditioned another model; give each Trainer a callback of its own")
        return module

    def parameters(self) -> list[nn.Parameter]:
        """Return what was added to be trained."""
        if self.condition is None:
            return []
        return [p for one in self.condition.added().values() for p in one.parameters() if p.requires_grad]

    def start(
        self,
        module: nn.Module,
        optimizers: Iterable[object],
        *,
        total_steps: int,
        is_new: bool,
        train_batches: Batches | None,
        tokenizer: Any,
    ) -> None:
        """Begin: from importance in a new training, where a restored method stands in a resumed one.

        Args:
            module: what is trained, as the trainer has wrapped or sharded it.
            optimizers: the trainer's; their steps are the clock.
            total_steps: optimizer steps of the whole training.
            is_new: whether no checkpoint was restored.
            train_batches: gives the training data anew, without a trace in its order or the random state.
            tokenizer: of the model, or None.

        Raises:
            ValueError: if `prepare` was not called before, or the data are no calls of the model.
        """
        if self.condition is None:
            raise ValueError(
                "a condition changes what is trained, which must happen before the trainer makes its optimizer: give "
                "the callback to the Trainer's constructor"
            )
        if not _holds(module, self.condition):
            raise ValueError(
                "the model that is trained is not the one that was conditioned: the Trainer made another one since "
                "(model_init?); give the Trainer the model itself"
            )
        self.stop()
        self._measured_at = -1
        if self._loss is not None:
            self._loss.hold()
        self.condition.begin(total_steps=total_steps)
        self._count(optimizers)
        if is_new:
            self._record = ConditionRecord()
        if isinstance(self.condition, InstructionCondition):
            self._tokenizer = tokenizer
            self.condition.use_tokenizer(tokenizer)
            self._read_data(self.condition, train_batches, is_new=is_new)

    def _read_data(self, condition: InstructionCondition, train_batches: Batches | None, *, is_new: bool) -> None:
        """Start the predictor from training data, and keep some for the guard; collective."""
        condition.predictor.train()  # also where the trainer leaves a model in evaluation mode
        is_new = is_new and condition.step == 0  # what an earlier training learned stays
        wanted = condition.num_start_sequences if is_new else 0
        guard = condition.options.guard
        wanted = max(wanted, 0 if guard is None else guard.num_sequences)
        if not wanted:
            return
        device = distributed.local(next(condition.model.parameters()).detach()).device
        with _unnoticed():
            batches = list(_taken(train_batches, wanted, device))
            self._sample = None if guard is None else joined(batches, guard.num_sequences)
            if is_new and condition.num_start_sequences:
                condition.warm_start(batches)

    def after_step(self, step: int, log: Callable[[dict[str, float]], None]) -> None:
        """Check what an optimizer step was taken on; now and then measure how much masks depend on what is read.

        Collective.

        Raises:
            ValueError: if they do not, and the recipe's guard stops the training.
        """
        condition = self.condition
        if condition is None or step == self._measured_at:
            return
        self._measured_at = step
        if self._loss is not None:
            self._loss.check_added()
        if not isinstance(condition, InstructionCondition) or condition.options.guard is None:
            return
        guard, sample = condition.options.guard, self._sample
        if sample is None or step % guard.every or step < int(condition.predictor.ramp_steps):
            return
        found = self._measure(condition, sample, log)
        if guard.has_collapsed(found) and guard.stops:
            raise ValueError(guard.sentence(found))

    def _measure(
        self, condition: InstructionCondition, sample: dict[str, Tensor], log: Callable[[dict[str, float]], None]
    ) -> Conditioning:
        """Measure how much the masks depend on what is read, log and keep it, and warn of a collapse; collective."""
        guard, found = condition.options.guard, condition.measure(sample)
        log({f"prune/{name}": value for name, value in found.metrics().items()})
        self._record.add(condition.step, found, self._texts(condition, sample))
        if guard is not None and guard.has_collapsed(found) and not guard.stops:
            distributed.log(logger, logging.WARNING, "%s", guard.sentence(found))
        return found

    def _texts(self, condition: InstructionCondition, sample: dict[str, Tensor]) -> list[str]:
        """Return the instructions of some rows; their tokens, where nothing turns these into text."""
        prompt = condition.prompt(sample)
        rows = [ids[there.bool()].tolist() for ids, there in zip(prompt.ids, prompt.attention, strict=True)]
        decode = getattr(self._tokenizer, "decode", None)
        return [str(row) if decode is None else str(decode(row)) for row in rows]

    def conclude(self, log: Callable[[dict[str, float]], None], *, is_served: bool) -> None:
        """Measure the masks a last time, when training has ended, and serve one of the prompts; collective.

        Args:
            log: sends metrics to the trainer's logger.
            is_served: whether one prompt is served, on the first process, to time it.
        """
        condition, sample = self.condition, self._sample
        if not isinstance(condition, InstructionCondition) or sample is None:
            return
        if self._record.last_step != condition.step:
            self._measure(condition, sample, log)
        if is_served and distributed.is_first_rank():
            prompt = condition.prompt(sample)
            self._record.serve(condition, prompt.ids[:1, prompt.attention[0].bool()])

    def report(self) -> dict[str, Any] | None:
        """Return what the report shows; None before a model was conditioned."""
        if self.condition is None:
            return None
        return {"method": type(self.method).__name__, **self._record.as_dict(self.condition)}

    def metrics(self) -> dict[str, float]:
        """Return what is logged of the last training call."""
        return {} if self.condition is None else self.condition.metrics()

    def take_in(self, optimizers: Iterable[Optimizer], schedules: Iterable[Any]) -> None:
        """Give what was added its learning rate; call it before a checkpoint is restored.

        Raises:
            ValueError: if no optimizer trains it.
        """
        take_in(optimizers, schedules, self.parameters(), rate=self.method.rate)

    def watch_transformers(self, trainer: Any) -> None:
        """Let a Hugging Face Trainer take in what was added where it makes its optimizer, and mark instructions.

        The marks serve Trainers that take the labels away from the model, for a loss of their own.
        """
        make = trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            given = [] if trainer.lr_scheduler is None else [trainer.lr_scheduler]
            self.take_in([unwrap_optimizer(trainer.optimizer)], given)
            return made

        trainer.create_optimizer = create_optimizer
        if isinstance(self.method, Instruction):
            trainer.data_collator = MarkingCollator(trainer.data_collator, self.method.reads)

    def _count(self, optimizers: Iterable[object]) -> None:
        """Let the steps of the optimizer that trains the method be its clock, whatever callbacks see of them when."""
        assert self.condition is not None
        added = {id(parameter) for parameter in self.parameters()}
        for optimizer in map(unwrap_optimizer, optimizers):
            if any(id(p) in added for group in optimizer.param_groups for p in group["params"]):
                self._handles.append(optimizer.register_step_post_hook(self._tick))
                return
        raise ValueError(
            f"no optimizer trains what {type(self.method).__name__} added to the model; hand model.parameters() to it, "
            "made after the callback's setup"
        )

    def _tick(self, *_: Any) -> None:
        assert self.condition is not None
        self.condition.after_step()

    def stop(self) -> None:
        """Let go of the training; the method stays at work in the model."""
        self._sample = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def export(self, model: nn.Module, folder: str, **options: Any) -> None:
        """Write the model and what was added into a new folder; options are those of `folder.save_conditional`."""
        assert self.condition is not None
        if getattr(model, "peft_config", None):
            merging = importlib.import_module("lightning_prune.integrations.lora.peft_merge")
            options["state"] = merging.merged_state(model, options["state"])
        logger.info("exported: %s", _saving().save_conditional(self.condition, folder, **options))

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, and what was added where the trainer's own checkpoints leave it out.

        They do beside adapters.
        """
        added = self._added_below_adapters()
        modules = {name: distributed.whole_state_dict(one) for name, one in added.items()}
        return {"record": self._record.state_dict(), "modules": modules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what was saved.

        Raises:
            ValueError: if it is of another model or method.
        """
        added, saved = self._added_below_adapters(), state["modules"]
        if added.keys() != saved.keys():
            raise ValueError(
                f"the checkpoint holds {', '.join(saved) or 'no condition'} and this training {', '.join(added)}; "
                "resume with the recipe that it was saved with"
            )
        for name, one in added.items():
            distributed.load_whole(one, saved[name])
        self._record.load_state_dict(state["record"])

    def _added_below_adapters(self) -> Mapping[str, nn.Module]:
        return self.condition.added() if self.condition is not None and self._is_below_adapters else {}


def _saving() -> Any:
    return importlib.import_module("lightning_prune.integrations.instruction.folder")


def _holds(module: nn.Module, condition: Condition) -> bool:
    inside = set(module.modules())
    return all(one in inside for one in condition.added().values())


def _taken(batches: Batches | None, num_sequences: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield training batches with so many sequences in all, as calls of the model."""
    if batches is None:
        raise ValueError(
            "the predictor starts from training data, and this trainer gives none; set condition.start: null and "
            "condition.guard: null"
        )
    num = 0
    for batch in batches():
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError(
                f"the predictor starts from training batches that are arguments of the model (input_ids, labels), and "
                f"this training has {type(batch).__name__}; set condition.start: null and condition.guard: null, or "
                "let the collator return mappings"
            )
        found = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        yield found
        num += len(found["input_ids"])
        if num >= num_sequences:
            return


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Put all random states back in the end, so that looking at data leaves no trace in the training."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
