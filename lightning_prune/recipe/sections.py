"""The sections of a recipe: one frozen set of options each, checked as far as a section can be on its own."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from lightning_prune.allocations.uniform import Uniform
from lightning_prune.base.bounds import at_least
from lightning_prune.base.types import Allocation, Granularity, Schedule, Scorer
from lightning_prune.conductor.guard import MetricGuard
from lightning_prune.granularity import Unstructured
from lightning_prune.recovery.distill_options import Distill
from lightning_prune.recovery.learning_rate import LearningRate
from lightning_prune.recovery.lora_options import LoraForm, check_lora
from lightning_prune.recovery.reconstruct_options import Reconstruct
from lightning_prune.recovery.retrain import Part
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.structured.method import StructuredMethod
from lightning_prune.targets.targets import Targets

__all__ = ["Evaluate", "Export", "Lora", "Prune", "Recover", "ReportOptions", "Shrink"]


@dataclass(frozen=True, kw_only=True)
class Prune:
    """What to prune, how it is rated and shared out, and when."""

    schedule: Schedule
    targets: Targets = field(default_factory=Targets)
    granularity: Granularity = field(default_factory=Unstructured)
    scorer: Scorer = field(default_factory=Magnitude)
    allocation: Allocation = field(default_factory=Uniform)
    guard: MetricGuard | None = None


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """How a model becomes smaller: at once, by a method; or in the end, by cutting units whose masks are all zero."""

    method: StructuredMethod | None = None
    zeros: bool = False

    def __post_init__(self) -> None:
        if (self.method is None) != self.zeros:
            given = "both" if self.zeros else "none of them"
            raise ValueError(f"shrink takes either a method, or zeros: true for units masked in training; got {given}")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters of PEFT over the pruned weights.

    Args:
        form: `masked` adds inside the masks and `scaled` multiplies, so that merging keeps every zero (MaskLoRA and
            ScaleLoRA of arXiv 2312.15230); `plain` is PEFT's own, for models without zeros or without a merge.
        config: fields of PEFT's LoraConfig; what is left out takes this library's default. Where a training program
            makes a LoRA by itself, its own options hold and this must be empty.
    """

    form: LoraForm = "masked"
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_lora(self.form, self.config)


@dataclass(frozen=True, kw_only=True)
class Recover:
    """How quality is won back, while masks are held.

    Args:
        lora: train adapters in place of the weights.
        retrain: train these parts of the model alone, or with the adapters.
        distill: train towards the outputs of a teacher.
        reconstruct: refit the weights to calibration data, without training.
        learning_rate: one schedule across pruning and recovery, in place of the trainer's.
        requires: `pruned` refuses a model that is neither sparse nor cut, unless the recipe itself prunes it.
    """

    lora: Lora | None = None
    retrain: tuple[Part, ...] = ()
    distill: Distill | None = None
    reconstruct: Reconstruct | None = None
    learning_rate: LearningRate | None = None
    requires: Literal["pruned", "any"] = "pruned"

    def __post_init__(self) -> None:
        if not self.trains and self.reconstruct is None:
            raise ValueError(
                "recover names no way to recover, so it would do nothing; give lora, retrain, distill, reconstruct or "
                "learning_rate, or set recover: null"
            )
        if self.trains and self.reconstruct is not None:
            raise ValueError(
                "recover.reconstruct works once, from calibration data, and the rest of recover in a training; make "
                "two recipes: lightning-prune oneshot with the one, then train what it wrote with the other"
            )
        if len(set(self.retrain)) != len(self.retrain):
            raise ValueError(f"recover.retrain names a part twice: {', '.join(self.retrain)}")
        if "all" in self.retrain and (len(self.retrain) > 1 or self.lora is not None):
            raise ValueError(
                "recover.retrain: [all] trains every weight; leave out the other parts and lora, or name some of "
                f"{', '.join(get_args(Part)[:-1])}"
            )

    @property
    def trains(self) -> bool:
        """Return whether a part of this needs a training."""
        return any((self.lora, self.retrain, self.distill, self.learning_rate))


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Which lm-eval tasks to run, and when; `every` is in optimizer steps, `limit` in documents per task.

    For a model that chooses its sub-network, `mask_from` says whether each request has a mask of its own, from its
    context, or each task one, from its description or else from `instruction`.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    at: tuple[Literal["start", "end"], ...] = ("start", "end")
    every: int | None = None
    batch_size: int = 8
    num_fewshot: int | None = None
    mask_from: Literal["request", "task"] = "request"
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.instruction is not None and self.mask_from != "task":
            raise ValueError("evaluate.instruction is the text of one mask per task; set evaluate.mask_from: task too")
        if not self.tasks:
            raise ValueError(
                "evaluate.tasks is empty, so nothing would be evaluated; name a task or set evaluate: null"
            )
        if not self.at and self.every is None:
            raise ValueError("evaluate has neither at nor every, so it would never run; give one or set evaluate: null")
        for name, value in (("every", self.every), ("limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"evaluate.{name} must be 1 or more, got {value}")
        at_least(0, num_fewshot=self.num_fewshot)

    @property
    def scoring(self) -> dict[str, Any]:
        """Return how an evaluation is run, without when."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("at", "every")}


@dataclass(frozen=True, kw_only=True)
class Export:
    """The form the pruned model is written in, and the folder; without a folder the program that runs decides.

    `per_layer` is a Hugging Face folder whose blocks may differ in shape; only `shrink.method` makes such models.
    `adapter` is a folder of PEFT with the adapters of `recover.lora` alone; the other forms merge them. `conditional`
    is a Hugging Face folder with what `condition` added beside the model. `overwrite` replaces an earlier export in
    that folder, and nothing else.
    """

    format: Literal["dense", "huggingface", "per_layer", "adapter", "conditional"] = "dense"
    dir: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the report page goes; without a folder none is written."""

    dir: str | None = None
