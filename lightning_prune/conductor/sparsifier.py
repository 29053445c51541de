"""The conductor: joins the small decisions to the training of a model.

It hooks into torch and not into a trainer: gradients of pruned weights are zeroed as they are accumulated, and after
every optimizer step statistics are fed, masks change when the schedule says so, and the masks are applied.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_prune.allocations.uniform import Uniform
from lightning_prune.base import distributed
from lightning_prune.base.types import Allocation, Granularity, Report, Schedule, Scorer
from lightning_prune.calibration.observation import Observation, Surrogate
from lightning_prune.conductor import guarding, promised_zeros, saved_state
from lightning_prune.conductor.chosen_masks import choose
from lightning_prune.conductor.closing_notes import breaches, remarks
from lightning_prune.conductor.decision import Decision, check_combination
from lightning_prune.conductor.fitting import fit_targets
from lightning_prune.conductor.guard import MetricGuard
from lightning_prune.conductor.held_masks import HeldMasks
from lightning_prune.conductor.oneshot import OneShot
from lightning_prune.conductor.progress import Progress, restore_progress, save_progress
from lightning_prune.conductor.start_line import announce, start_line
from lightning_prune.granularity import Unstructured
from lightning_prune.report.counts import measure
from lightning_prune.schedules import Existing
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.targets.targets import Binding, Selection, Targets

__all__ = ["Sparsifier"]

logger = logging.getLogger(__name__)


class Sparsifier:
    """Prunes a model while it trains, or once.

    Args:
        schedule: when, and how far.
        targets: which parameters.
        granularity: the shape of a hole.
        scorer, allocation: which weights matter, and how one sparsity becomes one per target.
        guard, seed: a bound on a logged metric, and the seed of everything drawn at random.

    Raises:
        ValueError: if the parts contradict each other or one would have no effect.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        targets: Targets = Targets(),
        granularity: Granularity = Unstructured(),
        scorer: Scorer = Magnitude(),
        allocation: Allocation = Uniform(),
        guard: MetricGuard | None = None,
        seed: int = 0,
    ) -> None:
        granularity.check_sparsity(schedule.sparsity)
        check_combination(scorer, allocation, granularity)
        self.schedule, self.targets, self.granularity = schedule, targets, granularity
        self.scorer, self.allocation, self.guard, self.seed = scorer, allocation, guard, seed
        self.broken: tuple[str, ...] = ()  # in what the model is not as promised, known when training has ended
        self.surrogate: Surrogate | None = None  # what stands in for the gradients of frozen targets: a LoRA's
        self._held = HeldMasks()
        self._progress = Progress()
        self._model: nn.Module | None = None
        self._observation: Observation | None = None
        self._pending: Mapping[str, Any] | None = None
        self._report: Report | None = None
        self._plan, self._total_steps = (0, 0, 1), 0

    @property
    def is_attached(self) -> bool:
        """Return whether masks are held in a running training."""
        return self._model is not None

    @property
    def is_restoring(self) -> bool:
        """Return whether a loaded state waits for the next `attach`."""
        return self._pending is not None

    @property
    def step(self) -> int:
        """Return how many optimizer steps were taken."""
        return self._progress.step

    @property
    def num_updates(self) -> int:
        """Return how often the masks have changed."""
        return self._progress.num_updates

    @property
    def history(self) -> list[dict[str, float]]:
        """Return the metrics by step."""
        return self._progress.history

    @property
    def notes(self) -> list[str]:
        """Return what was said so far."""
        return [*self._progress.notes, *self._progress.closing]

    @property
    def is_final(self) -> bool:
        """Return whether the masks in force are those of the final sparsity."""
        return bool(self.masks) and self._progress.sparsity >= self.schedule.sparsity - 1e-9

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Return the masks in force by target name, bool, True = keep; this process's rows of a sharded weight."""
        return self._held.masks

    def mask_of(self, parameter: Tensor) -> Tensor | None:
        """Return the mask of a parameter; None for a sharded one and for what is no target."""
        return self._held.of(parameter)

    def settings(self) -> dict[str, Any]:
        """Return what decides the masks, as plain values; two runs with the same settings are the same run."""
        parts = ("targets", "granularity", "scorer", "allocation", "schedule", "guard", "seed")
        return {part: saved_state.describe(getattr(self, part)) for part in parts}

    def measure(self, model: nn.Module) -> Report:
        """Count what the targets of a model hold now, without attaching; collective when it is sharded."""
        return measure(model, self._select(model).targets, step=self.step)

    def attach(self, model: nn.Module, optimizers: Iterable[object], *, total_steps: int) -> None:
        """Find the targets, restore a loaded state, and hold masks from now on.

        Collective: every rank calls it, after the model was wrapped or sharded and its optimizers were made.

        Args:
            model: the module whose forward is called; targets are found in it by name.
            optimizers: those that step its weights; a trainer's wrappers are looked through.
            total_steps: optimizer steps of the whole training.

        Raises:
            ValueError: if the recipe does not fit the model, the optimizers, the training or the loaded state.
        """
        self.detach() if self.step else self._let_go()
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(
                f"the number of training steps must be known, got {total_steps}; set max_steps on the trainer"
            )
        distributed.check_supported(model)
        self._plan, self._total_steps = self.schedule.resolve(total_steps), total_steps
        selection, optimizers = self._select(model), list(optimizers)
        bindings = list(selection.targets)
        if not optimizers:
            raise ValueError("attach needs the optimizers that step the model, got none")
        observation = Observation(self.scorer, bindings, self.surrogate)
        observation.check_trainable()
        self._held.take(model, bindings)
        self._held.own(optimizers)
        announce(start_line(model, selection, self.schedule, total_steps))
        self._model, self._observation, self.broken = model, observation, ()
        try:
            self._begin(model, observation)
        except BaseException:
            self._let_go()
            raise

    def _select(self, model: nn.Module) -> Selection:
        return fit_targets(model, self.targets, self.scorer, self.granularity)

    def _begin(self, model: nn.Module, observation: Observation) -> None:
        """Start the clock, anew or where a loaded state stopped, and register the hooks."""
        if self._pending is not None:
            self._restore(self._pending, observation)
            self._pending = None
        else:
            self._start_anew()
        self._held.hold(self._after_step, dense_grad=self.scorer.dense_grad)
        if not self.is_finished:
            observation.start(model)
        if self.guard is not None and self.guard.action == "rollback" and self._progress.memory.good is None:
            self._progress.memory.remember(self._held.parameters, self.masks, self._progress.sparsity)
        self._held.apply_everywhere()
        self._update_if_due()
        self._report = measure(model, self._held.bindings, step=self.step, notes=self.notes)

    def _start_anew(self) -> None:
        """Set the clock to zero; masks made earlier are held if they are this model's."""
        if not self._held.fit():
            if self._progress.is_once:
                raise ValueError("the masks of prune_once do not fit this model; attach the model that was pruned")
            self._held.masks.clear()
        if isinstance(self.schedule, Existing) and not self.masks:
            self._held.take_existing(allow_none=self.schedule.allow_dense)
        kept = self._progress if self.masks else Progress(is_once=self._progress.is_once)
        self._progress = Progress(sparsity=kept.sparsity, is_once=kept.is_once, num_updates=self._progress.num_updates)

    def _after_step(self, stepped: list[Binding], *, is_clock: bool) -> None:
        """Feed statistics with what an optimizer has stepped; count a step and change masks with the clock."""
        if self._observation is not None and not self.is_finished:
            self._observation.feed_step(stepped)
            if is_clock:
                self._observation.feed_surrogates()
        if is_clock:
            self._progress.step += 1
            self._update_if_due()

    @property
    def is_finished(self) -> bool:
        """Return whether masks cannot change any more."""
        if self._progress.is_once or isinstance(self.schedule, Existing):
            return True
        return self.step >= self._plan[1] and not self.guard and not self._progress.behind.names

    def _update_if_due(self) -> None:
        """Change the masks if the schedule says so."""
        if self._progress.is_once or self._progress.memory.is_held:
            return
        is_due = self.schedule.is_due(self.step, self._total_steps) or self._progress.memory.is_late
        sparsity = self.schedule.sparsity_at(self.step, self._total_steps)
        if is_due and sparsity > 0 and (sparsity > self._progress.sparsity or self.scorer.dense_grad):
            self._change(self._held.bindings, sparsity, is_again=False)
        elif self._progress.behind.is_due(self.step):
            self._change(self._progress.behind.among(self._held.bindings), sparsity, is_again=True)

    def _change(self, bindings: Sequence[Binding], sparsity: float, *, is_again: bool) -> None:
        """Change the masks of some targets, so far as there is anything to choose them by."""
        assert self._observation is not None
        choice = choose(self._decision(bindings, self._observation, self._held), self._observation, sparsity)
        notes = self._progress.take(choice, self._held, self._observation, sparsity, is_again=is_again)
        if choice.masks:
            self._finish_update()
        for note in notes:
            self.note(note)
        if self.is_finished:
            self._observation.end()

    def _decision(self, bindings: Sequence[Binding], observation: Observation, held: HeldMasks) -> Decision:
        return Decision(
            bindings=bindings,
            scorer=self.scorer,
            granularity=self.granularity,
            allocation=self.allocation,
            held=held.masks,
            read=observation.read,
            step=self.step,
            seed=self.seed,
        )

    def _finish_update(self) -> None:
        """Count a change of masks, check that ranks agree, and measure."""
        assert self._model is not None
        self._progress.num_updates += 1
        self._held.check_agreement()
        self._held.apply_everywhere()
        self._report = measure(self._model, self._held.bindings, step=self.step, notes=self.notes)
        self._progress.record({"sparsity": self._report.sparsity})

    def note(self, sentence: str, *, is_closing: bool = False) -> None:
        """Say something aloud and in the report; what closes a training is not saved with its state."""
        (self._progress.closing if is_closing else self._progress.notes).append(sentence)
        distributed.log(logger, logging.WARNING, "%s", sentence)
        if self._report is not None:
            self._report = dataclasses.replace(self._report, notes=tuple(self.notes))

    def observe(self, metrics: Mapping[str, object]) -> None:
        """Take in newly measured metrics: for the history, and for the guard; collective when one is set."""
        numbers = saved_state.only_numbers(metrics)
        self._progress.record(numbers)
        if self.guard is None or self.guard.metric not in numbers or not self.is_attached:
            return
        value = distributed.broadcast_number(numbers[self.guard.metric], self._held.device)
        sentence, went_back = guarding.take_in(self.guard, value, self._progress, self._held)
        if went_back:
            self._finish_update()
        if sentence is not None:
            self.note(sentence)

    def prune_once(
        self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = (), *, progress: bool = True
    ) -> Report:
        """Prune a model now to the schedule's final sparsity; the masks are held if it is trained afterwards.

        Args:
            model: pruned in place.
            batches: keyword arguments of the model's forward, one mapping per call; scorers that need inputs run them
                block by block, scorers that need gradients also need `labels` (`input_ids` are used if there are none).
            progress: whether to show bars.

        Returns:
            what was pruned.

        Raises:
            ValueError: if the recipe does not fit the model or the batches.
        """
        if self.is_attached:
            raise ValueError("prune_once needs a model that is not in training; call detach first")
        distributed.check_supported(model)
        selection, held, notes = self._select(model), HeldMasks(), []
        held.take(model, list(selection.targets))
        observation, sparsity = Observation(self.scorer, held.bindings), self.schedule.sparsity
        announce(start_line(model, selection, self.schedule))
        if isinstance(self.schedule, Existing):
            held.take_existing(allow_none=self.schedule.allow_dense)
        else:
            job = OneShot(model, observation, self._decision, held, sparsity=sparsity, progress=progress)
            notes = job.run(list(batches))
        self._held = held
        self._progress = Progress(sparsity=sparsity, is_once=True, num_updates=self.num_updates)
        for note in notes:
            self.note(note)
        self._model = model
        self._finish_update()
        self._model = None
        return self.report()

    def detach(self, *, has_failed: bool = False) -> None:
        """Let go of the model; it keeps its exact zeros. Say what was not reached. Collective unless `has_failed`."""
        if self._model is None:
            return
        if not has_failed:
            self._report = measure(self._model, self._held.bindings, step=self.step, notes=self.notes)
        ending = self._progress.ending(
            self.report(),
            self.guard,
            plan=self._plan,
            total_steps=self._total_steps,
            promised=self.schedule.sparsity,
            differences=None if has_failed else self.verify(self._model),
        )
        self.broken = tuple(breaches(ending))
        for note in (*self.broken, *remarks(ending)):
            self.note(note, is_closing=True)
        self._let_go()

    def sparsity(self) -> Tensor:
        """Return the share of zeros among the targets' weights as they are now, a number; collective when sharded."""
        return self._held.zero_share()

    def apply_to(self, model: nn.Module) -> int:
        """Zero the pruned weights in an average or another copy; return how many targets it has; collective."""
        return self._held.apply_to(promised_zeros.weights_of(model))

    def verify(self, model: nn.Module | Mapping[str, object]) -> tuple[str, ...]:
        """Compare a model or a saved state with the masks in force; collective when the targets are sharded.

        Args:
            model: the trained model, a part of it, an average, or the tensors of a file; found by the targets' names.

        Returns:
            a sentence for each way in which it is not what the masks promise; none if it is.
        """
        return self._held.differences(model)

    def _let_go(self) -> None:
        self._held.let_go()
        if self._observation is not None:
            self._observation.stop()  # what was observed stays, for a checkpoint written after the training
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs as plain values and tensors, masks whole and packed to bits; collective."""
        if self._model is None and self._pending is not None:
            return dict(self._pending)
        plan = list(self._plan)
        return save_progress(self._progress, self._held, self._observation, plan=plan, settings=self.settings())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; it is checked now and put in force by the next `attach`.

        Raises:
            ValueError: if the state is of another format, damaged, or of another recipe.
        """
        saved_state.check_version(state)
        saved_state.check_digest(state)
        saved_state.check_recipe(state["settings"], self.settings())
        self._pending = dict(state) if state["shapes"] else None  # nothing was held yet when it was saved

    def _restore(self, state: Mapping[str, Any], observation: Observation) -> None:
        saved_state.check_same("model", state["shapes"], self._held.shapes())
        if not state["is_once"]:
            saved_state.check_plan(state["plan"], self._plan)
        progress = restore_progress(state, self._held, observation)
        self._held.check_restored()
        self._progress = progress

    def report(self) -> Report:
        """Return what was pruned, as of the last change of masks.

        Raises:
            ValueError: before the first `attach` or `prune_once`.
        """
        if self._report is None:
            raise ValueError("nothing to report yet; attach the sparsifier to a training or call prune_once first")
        return self._report
