"""Let a model choose its own sub-network from the instruction: instruction-following pruning.

A small predictor reads the instruction once and says, for every block, which FFN units (or key/value groups) compute.
Predictor and model are trained together with the ordinary loss; afterwards each instruction is served by a physically
small model, see `predictors.sub_model`.

Source: Hou et al., Instruction-Following Pruning, arXiv 2501.02086. The start from importance, dropped beginnings of
    instructions, the guard against collapse and a budget given at run time are our own.
Cost: in training one pass of the predictor and one product per unit and token; nothing is skipped before a
    sub-network is gathered.
Limits: one sample per row; no units of experts.
Causality: the masks come from the instruction alone, before the first token that is generated, and stay.

Shapes: B samples, U units of a group.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.calibration.walk import evaluating
from lightning_prune.conditional.method import Condition, ConditionMethod
from lightning_prune.predictors import marked_cache
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.collapse import CollapseGuard, Conditioning, rows_apart
from lightning_prune.predictors.encoder import Encoder, OwnLayers
from lightning_prune.predictors.generation import GenerationCall
from lightning_prune.predictors.mask_predictor import MaskPredictor
from lightning_prune.predictors.outer_call import OuterCall
from lightning_prune.predictors.prompt import Prompt, Reads
from lightning_prune.predictors.proof import check_masked_is_cut
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.predictors.unit_importance import UnitImportance, clusters, fit_head
from lightning_prune.predictors.unit_masks import UnitMasks
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["Instruction", "InstructionCondition", "Predictor", "Start"]

logger = logging.getLogger(__name__)
NAME = "mask_predictor"  # of the predictor in the model


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What scores the units.

    Args:
        encoder: turns the instruction into a vector.
        hidden: width between the two layers of the head.
        spread: deviation of the scores across instructions at the start, see `ScoreHead`.
    """

    encoder: Encoder = field(default_factory=OwnLayers)
    hidden: int = 128
    spread: float = 0.1

    def __post_init__(self) -> None:
        at_least(1, hidden=self.hidden)
        if not 0 < self.spread < math.inf:
            raise ValueError(f"spread must be positive and finite, got {self.spread}")


@dataclass(frozen=True, kw_only=True)
class Start:
    """How the predictor starts from what matters to the instructions of the training, instead of from chance.

    Args:
        num_sequences: of the training data that are measured.
        num_clusters: of instructions, each with an importance of its own.
        num_steps: of the fit before training; 0 keeps the mean importance as bias alone. By our measurement 400 are
            better than 150 (benchmarks/quality_instruction.py).
    """

    num_sequences: int = 256
    num_clusters: int = 8
    num_steps: int = 400

    def __post_init__(self) -> None:
        at_least(2, num_sequences=self.num_sequences)
        at_least(1, num_clusters=self.num_clusters)
        at_least(0, num_steps=self.num_steps)


@dataclass(frozen=True, kw_only=True)
class Instruction(ConditionMethod):
    """Options of instruction-following pruning.

    Args:
        budget: how many units compute.
        kinds: of units: `ffn`, and `kv_groups` beside them.
        predictor: see `Predictor`.
        choice: how scores become masks; `hard` where the model is trained from scratch.
        reads: which tokens are the instruction.
        start: from importance; null starts from random scores, which loses to a fixed mask.
        guard: against masks that no longer depend on the instruction; null measures nothing.
        ramp: share of the training, in [0, 1), over which the masks are blended in.
        rate: what the learning rate is multiplied by for the predictor; of 0.3, 1, 3 and 10 by our measurement 3.
        seed: of what is drawn.
    """

    is_exported: ClassVar[bool] = True
    is_taught: ClassVar[bool] = True

    budget: Budget
    kinds: tuple[Literal["ffn", "kv_groups"], ...] = ("ffn",)
    predictor: Predictor = field(default_factory=Predictor)
    choice: SoftTopK = field(default_factory=SoftTopK)
    reads: Reads = field(default_factory=Reads)
    start: Start | None = field(default_factory=Start)
    guard: CollapseGuard | None = field(default_factory=CollapseGuard)
    ramp: float = 0.1
    rate: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds names each kind of unit once and at least one, got {list(self.kinds)}")
        if not 0 <= self.ramp < 1:
            raise ValueError(f"ramp must be in [0, 1), a share of the training, got {self.ramp}")
        if not 0 < self.rate <= 1000:
            raise ValueError(f"rate multiplies a learning rate and must lie in (0, 1000], got {self.rate}")
        at_least(0, seed=self.seed)

    def insert(
        self, model: nn.Module, stack: Stack, structure: Structure | None = None, *, plain: nn.Module | None = None
    ) -> "InstructionCondition":
        """Put the predictor into a model, and its masks on the model's units.

        Args:
            model: see `ConditionMethod`.
            stack: not used.
            structure: what can be cut from it, if it is known.
            plain: the same model without adapters, if it has some; units are found there, whatever its weights.

        Raises:
            ValueError: if units cannot be masked, the budget does not fit, or the model has a predictor already.
        """
        if hasattr(model, NAME):
            raise ValueError(f"this {type(model).__name__} has a {NAME} already; take it off with Condition.remove")
        plain = model if plain is None else plain
        structure = structure or discover(plain, kinds=list(self.kinds))
        groups = [group for kind in self.kinds for group in structure.of_kind(kind)]
        predictor = MaskPredictor(
            model,
            groups,
            keep=self.budget.numbers(groups),
            encoder=self.predictor.encoder.build(model),
            hidden=self.predictor.hidden,
            spread=self.predictor.spread,
            choice=self.choice,
        )
        check_masked_is_cut(plain, UnitMasks(plain, groups).to(next(plain.parameters()).device), groups)
        first = next(model.parameters())
        predictor.to(device=first.device).train(model.training)
        model.add_module(NAME, predictor)
        return InstructionCondition(self, model, predictor)

    def differences(self, other: "Instruction") -> str | None:
        """Return why the predictor of other options is none of these, in words; None if it is."""
        for name in ("kinds", "predictor"):
            found, wanted = getattr(other, name), getattr(self, name)
            if found != wanted:
                return f"was made with {name} {found}, and this recipe says {wanted}"
        return None

    def take_over(self, condition: "InstructionCondition") -> "InstructionCondition":
        """Go on, under these options, with the predictor that is at work in a model; budget and choice may differ.

        Raises:
            ValueError: if these options make another predictor.
        """
        model, predictor = condition.model, condition.predictor
        found = self.differences(condition.options)
        if found is not None:
            raise ValueError(
                f"the {NAME} in this {type(model).__name__} {found}; write the same into the recipe, or start anew "
                f"without it: model.{NAME}.condition.remove()"
            )
        keep = self.budget.numbers(predictor.units.groups)
        condition.remove()
        predictor.keep, predictor.choice = keep, self.choice
        model.add_module(NAME, predictor)
        return InstructionCondition(self, model, predictor)


class _Seen(NamedTuple):
    """What the predictor made of one call: features (B, D), and scores (B, U) of each group."""

    features: Tensor
    scores: list[Tensor]


class InstructionCondition(Condition):
    """A predictor at work in a model, whose `forward` then runs under the masks of its own instruction."""

    def __init__(self, options: Instruction, model: nn.Module, predictor: MaskPredictor) -> None:
        self.options, self.model, self.predictor = options, model, predictor
        self._step, self._is_whole = int(predictor.num_steps), False
        self._fixed: list[Tensor] | None = None
        self._seen: list[_Seen] | None = None  # what calls predicted, while somebody looks
        predictor.condition = self
        predictor.units.attach(model)
        self._call = OuterCall(model, self.run)
        self._generation = GenerationCall(model)

    def added(self) -> Mapping[str, nn.Module]:
        """Return the predictor."""
        return {NAME: self.predictor}

    def begin(self, *, total_steps: int) -> None:
        """Set the length of the ramp; go on where a restored predictor stands."""
        self._call.hold()
        self.predictor.ramp_steps.fill_(math.ceil(self.options.ramp * total_steps))
        self._step = int(self.predictor.num_steps)

    def after_step(self) -> None:
        """Count one optimizer step.

        Raises:
            RuntimeError: if the training never called the model that is masked.
        """
        if not self._call.num_calls:
            raise RuntimeError(
                f"an optimizer step was taken, but {type(self.model).__name__} was never called, only parts of it, so "
                "nothing was masked; call the model itself, with labels, or condition the part that is called"
            )
        self._call.num_calls = 0
        self._step += 1
        self.predictor.num_steps.fill_(self._step)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a trained predictor, and go on where it stands."""
        self.predictor.load_state_dict(state)
        self._step = int(self.predictor.num_steps)

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Tell an encoder that reads other tokens what the model's mean; see `InstructionEncoder.use_tokenizer`."""
        self.predictor.encoder.use_tokenizer(tokenizer)

    @property
    def step(self) -> int:
        """Return the optimizer steps taken."""
        return self._step

    def remove(self) -> None:
        """Take the predictor and all hooks off the model."""
        self._call.release()
        self._generation.release()
        self.predictor.units.detach()
        if getattr(self.model, NAME, None) is self.predictor:
            delattr(self.model, NAME)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Run the calls inside without masks: the parent as it is."""
        before, self._is_whole = self._is_whole, True
        try:
            yield
        finally:
            self._is_whole = before

    @contextmanager
    def fixed(self, masks: Sequence[Tensor]) -> Iterator[None]:
        """Run the calls inside under these masks, (B, U) or (1, U) for each group, whatever they read."""
        before, self._fixed = self._fixed, list(masks)
        try:
            yield
        finally:
            self._fixed = before

    def prompt(self, batch: Mapping[str, Any]) -> Prompt:
        """Return what the predictor reads of the arguments of a call."""
        return self.options.reads.find(batch, is_training=self.is_learning)

    @property
    def is_learning(self) -> bool:
        """Return whether this is a call of a training: as the predictor's own mode says, whatever the model's is."""
        return self.predictor.training and torch.is_grad_enabled()

    def masks_of(self, prompt: Prompt, keep: Sequence[int] | None = None) -> list[Tensor]:
        """Return the masks for a prompt, (B, U) for each group."""
        if self.is_learning:
            prompt = self.options.reads.dropped(prompt, self.predictor.num_steps, self.options.seed)
            keep = self.options.budget.drawn(self.predictor.units.groups, self._step, self.options.seed)
        masks: list[Tensor] = self.predictor(prompt.ids, prompt.attention, keep)
        return masks

    @property
    def num_start_sequences(self) -> int:
        """Return how many sequences of the training data `warm_start` looks at."""
        return 0 if self.options.start is None else self.options.start.num_sequences

    @torch.no_grad()
    def warm_start(self, batches: Iterable[Mapping[str, Any]], task_of_sequence: Tensor | None = None) -> None:
        """Start from what matters to the instructions of some batches; see `unit_importance`. Collective.

        Args:
            batches: calls of the model, of the training data.
            task_of_sequence: to which task each sequence belongs, (B,); clusters of instructions are made without it.
        """
        options = self.options.start
        assert options is not None
        counter = UnitImportance(self.model, self.predictor.units.groups)
        importance: list[list[Tensor]] = []
        with evaluating(self.model), self.whole(), self._looking() as seen:
            for batch in batches:
                there = batch.get("attention_mask")
                with counter.counting(torch.ones_like(batch["input_ids"]) if there is None else there):
                    self.model(**batch)
                importance.append(counter.importance())
        features_BD = distributed.gather_rows(torch.cat([one.features.float() for one in seen]))
        means = [distributed.gather_rows(torch.cat(parts)) for parts in zip(*importance, strict=True)]
        if task_of_sequence is None:
            task_B = clusters(features_BD, options.num_clusters)
        else:
            task_B = distributed.gather_rows(task_of_sequence.to(features_BD.device))
        error = fit_head(self.predictor.head, features_BD, means, task_B, num_steps=options.num_steps)
        said = "the predictor starts from what matters to %d sequences in %d clusters (squared error %.3f after a fit)"
        distributed.log(logger, logging.INFO, said, len(features_BD), len(task_B.unique()), error)

    @torch.no_grad()
    def measure(self, batch: Mapping[str, Any]) -> Conditioning:
        """Measure, on the rows of a batch with labels, how much the masks depend on the instruction; collective."""
        with evaluating(self.model), self._looking() as seen:
            batch = {**batch, "labels": self.prompt(batch).labels}  # that every loss below is of
            own, masks = float(self.model(**batch).loss), self.predictor.masks(seen[0].scores)
            order = rows_apart(masks)
            with self.fixed([mask[order] for mask in masks]):
                swapped = float(self.model(**batch).loss)
            with self.whole():
                losses = {"own_loss": own, "swapped_loss": swapped, "whole_loss": float(self.model(**batch).loss)}
        return Conditioning.of(masks, seen[0].scores, **losses).mean_of_ranks(masks[0].device)

    @contextmanager
    def _looking(self) -> Iterator[list["_Seen"]]:
        """Keep what the calls inside predict; only inside a call are the weights of a sharded model whole."""
        seen: list[_Seen] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    def _look(self, prompt: Prompt) -> None:
        if self._seen is not None:
            features = self.predictor.encoder(prompt.ids, prompt.attention)
            self._seen.append(_Seen(features, self.predictor.head(features)))

    def run(self, unconditioned: Callable[..., Any], batch: dict[str, Any]) -> Any:
        """Call the model under the masks of its instruction.

        Raises:
            ValueError: if there is no instruction, or a key/value cache was filled under other masks.
        """
        units = self.predictor.units
        if self._is_whole:
            if self._seen is not None:
                self._look(self.prompt(batch))
            with units.passing(None):
                return unconditioned(**_without_instruction(batch))
        masks = self._fixed
        if masks is None and self._generation.prompt is not None:
            masks = self._generation.for_rows(len(batch["input_ids"]), self.masks_of)
        if masks is None:
            masks = marked_cache.masks_of(batch.get("past_key_values"), _num_rows(batch))
        if masks is None:
            prompt = self.prompt(batch)
            self._look(prompt)
            masks = self.masks_of(prompt)
            if prompt.labels is not None:
                batch["labels"] = prompt.labels
        if self.model.training:
            units.pass_through_checkpoints()
        with units.passing(masks):
            output = unconditioned(**_without_instruction(batch))
        found = getattr(output, "past_key_values", None)
        if found is not None and not self.is_learning:
            marked_cache.mark(found, masks)
        return output


def _without_instruction(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.startswith("instruction_")}


def _num_rows(batch: Mapping[str, Any]) -> int:
    found = (value for name in ("input_ids", "inputs_embeds") if isinstance(value := batch.get(name), Tensor))
    return len(next(found, ()))
