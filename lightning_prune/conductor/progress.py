"""How far a run has come, and how that is saved and restored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.base.types import Report
from lightning_prune.calibration.observation import Observation
from lightning_prune.conductor import saved_state
from lightning_prune.conductor.chosen_masks import Behind, Choice
from lightning_prune.conductor.closing_notes import Ending
from lightning_prune.conductor.guard import GuardMemory, MetricGuard
from lightning_prune.conductor.held_masks import HeldMasks

__all__ = ["Progress", "restore_progress", "save_progress"]


@dataclass
class Progress:
    """What changes while a run goes on, masks and statistics aside.

    Args:
        step: optimizer steps taken.
        num_updates: changes of masks.
        sparsity: of the masks in force.
        is_once: whether the masks come from `prune_once` and cannot change.
        history: metrics by step.
        notes: what was said while it went on.
        closing: what was said when it ended; not saved, since a resume goes on.
        memory: of the guard.
        behind: targets whose masks could not be chosen when they were due.
    """

    step: int = 0
    num_updates: int = 0
    sparsity: float = 0.0
    is_once: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    closing: list[str] = field(default_factory=list)
    memory: GuardMemory = field(default_factory=GuardMemory)
    behind: Behind = field(default_factory=Behind)

    def take(
        self, choice: Choice, held: HeldMasks, observation: Observation, sparsity: float, *, is_again: bool
    ) -> list[str]:
        """Put a choice of masks in force; return what is to be said of it.

        Raises:
            ValueError: if nothing was observed of any target.
        """
        if len(choice.missed) == len(observation.bindings):
            raise ValueError(observation.nothing_of(choice.missed, in_training=True))
        for binding, mask in choice.masks:
            held.set(binding, mask)
        if choice.masks:
            self.memory.is_late, self.sparsity = False, sparsity
        notes = self.behind.take(choice, observation, self.step, is_again=is_again)
        observation.restart_inputs([binding for binding, _ in choice.masks])
        return notes

    def ending(
        self,
        report: Report,
        guard: MetricGuard | None,
        *,
        plan: tuple[int, int, int],
        total_steps: int,
        promised: float,
        differences: tuple[str, ...] | None,
    ) -> Ending:
        """Return how the run ended, if it ends here; `differences` from the masks are None after an error."""
        is_kept_back = self.memory.is_held or self.memory.is_late
        return Ending(
            report=report,
            step=self.step,
            end=plan[1],
            total_steps=total_steps,
            held=self.sparsity,
            promised=promised,
            differences=differences or (),
            behind=self.behind.last_words(),
            has_failed=differences is None,
            guarded=guard.metric if guard is not None and is_kept_back else None,
            unseen_metric=guard.metric if guard is not None and not self.memory.has_seen else None,
        )

    def record(self, values: Mapping[str, float]) -> None:
        """Add metrics to the history of this step."""
        if not self.history or self.history[-1]["step"] != self.step:
            self.history.append({"step": self.step})
        self.history[-1].update(values)


def save_progress(
    progress: Progress, held: HeldMasks, observation: Observation | None, **constants: Any
) -> dict[str, Any]:
    """Return what a resume needs as plain values and tensors, masks whole and packed to bits; collective.

    Args:
        progress: of the run.
        held: its masks.
        observation: its statistics.
        constants: what the state must agree with when it comes back: settings and plan.
    """
    statistics = {} if observation is None else observation.statistics
    state = {
        "format_version": saved_state.FORMAT_VERSION,
        "step": progress.step,
        "sparsity": progress.sparsity,
        "shapes": held.shapes(),
        "masks": saved_state.pack_masks(held.masks, held.bindings),
        "statistics": saved_state.gather_statistics(statistics, held.bindings),
        "guard": saved_state.pack_guard(progress.memory, held.bindings),
        "behind": progress.behind.as_dict(),
        "history": [dict(entry) for entry in progress.history],
        "notes": list(progress.notes),
        "num_updates": progress.num_updates,
        "is_once": progress.is_once,
        **constants,
    }
    return state | {"digest": saved_state.digest(state)}


def restore_progress(state: Mapping[str, Any], held: HeldMasks, observation: Observation) -> Progress:
    """Undo `save_progress`: put masks and statistics in force and return the progress."""
    held.masks.clear()
    held.masks.update(saved_state.unpack_masks(state["masks"], held.bindings))
    saved_state.restore_statistics(state["statistics"], observation.statistics, held.bindings)
    return Progress(
        step=int(state["step"]),
        num_updates=int(state["num_updates"]),
        sparsity=float(state["sparsity"]),
        is_once=bool(state["is_once"]),
        history=[dict(entry) for entry in state["history"]],
        notes=list(state["notes"]),
        memory=saved_state.unpack_guard(state["guard"], held.bindings),
        behind=Behind(**state.get("behind", {})),
    )
