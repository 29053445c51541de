"""Choose the masks of one change: decide where there is something to go by, and tell where there is not.

A target that nothing was observed of, or whose scores are all equal, would be pruned by the place of its weights. It is
told apart from targets of which only some scores are equal, such as those of inputs that are always zero.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_prune.calibration.observation import Observation, leave_out
from lightning_prune.conductor.decision import Decision
from lightning_prune.targets.targets import Binding

__all__ = ["Behind", "Choice", "choose", "equal_scores", "remarks"]

_TOLD_SHARE = 0.5  # of a target's units, from which on it is said that they were chosen by their place


@dataclass(frozen=True)
class Choice:
    """What one change of masks comes to.

    Args:
        masks: of the targets that could be decided on.
        missed: targets that nothing was observed of.
        blind: targets whose scores do not differ.
        by_place: the share of each target's units that were chosen by their place among equals, where it is large.
        old: targets that were decided on by what was seen before the last change.
    """

    masks: list[tuple[Binding, Tensor]]
    missed: list[Binding]
    blind: list[Binding]
    by_place: dict[str, float]
    old: list[Binding]


def choose(
    decision: Decision, observation: Observation, sparsity: float, budgets: Mapping[str, float] | None = None
) -> Choice:
    """Decide on all targets that there is something to go by for; nothing is changed. Collective.

    Args:
        decision: over the targets.
        observation: of them.
        sparsity: wanted over the targets.
        budgets: the sparsity of each, where they are known already.
    """
    observation.settle()
    missed = [binding for binding in decision.bindings if not observation.has_observed(binding)]
    left_out = {binding.name for binding in missed}
    while True:
        rest = [binding for binding in decision.bindings if binding.name not in left_out]
        if not rest:
            return Choice([], missed, _named(decision, left_out, missed), {}, [])
        part = dataclasses.replace(decision, bindings=rest)
        decided = part.decide_with_ties(part.budgets(sparsity) if budgets is None else budgets)
        blind = {binding.name for binding, _, ties in decided if ties.is_blind}
        left_out |= blind
        if not blind or not part.ranks_together:
            break
    return Choice(
        masks=[(binding, mask) for binding, mask, _ in decided if binding.name not in left_out],
        missed=missed,
        blind=_named(decision, left_out, missed),
        by_place={b.name: ties.share for b, _, ties in decided if not ties.is_blind and ties.share > _TOLD_SHARE},
        old=[binding for binding in rest if observation.rests_on_the_past(binding)],
    )


def _named(decision: Decision, names: set[str], without: Sequence[Binding]) -> list[Binding]:
    known = {binding.name for binding in without}
    return [binding for binding in decision.bindings if binding.name in names - known]


def equal_scores(blind: Sequence[Binding], others: Sequence[str]) -> str:
    """Return a sentence on targets whose scores do not differ; of the names of others no pattern may match any."""
    names = [binding.name for binding in blind]
    return (
        f"all scores of {names[0]} are equal{_of(names)}, so its weights would be pruned by their place: what was seen "
        "says nothing of it (no label that counts, inputs of zeros, a part that the loss does not depend on); give "
        f"data that does{leave_out(names, others)}"
    )


def _of(names: Sequence[object]) -> str:
    return f" (and those of {len(names) - 1} more targets)" if len(names) > 1 else ""


def remarks(choice: Choice) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for everything in which a choice rests on less than one may think."""
    if choice.by_place:
        name, share = next(iter(choice.by_place.items()))
        yield (
            "place",
            f"{share:.0%} of {name}{_of(list(choice.by_place))} was chosen by place, since so many scores are equal; "
            "inputs that are always zero, or too little data?",
        )
    if choice.old:
        yield (
            "old",
            f"no token reached {choice.old[0].name}{_of(choice.old)} since the last change of masks; what was seen "
            "before decides",
        )


@dataclass
class Behind:
    """Targets whose masks could not be chosen when they were due; it is tried again after 1, 2, 4, ... steps.

    Args:
        names: the targets.
        since: the step at which their masks were due.
        next_try: the step at which it is tried again.
        said: the kinds of sentences that were said, each once a training.
    """

    names: list[str] = field(default_factory=list)
    since: int = 0
    next_try: int = 0
    said: list[str] = field(default_factory=list)

    def is_due(self, step: int) -> bool:
        """Return whether it is time to try again."""
        return bool(self.names) and step >= self.next_try

    def among(self, bindings: Sequence[Binding]) -> list[Binding]:
        """Return those of some targets that are behind."""
        return [binding for binding in bindings if binding.name in self.names]

    def take(self, choice: Choice, observation: Observation, step: int, *, is_again: bool) -> list[str]:
        """Take in a choice made in training; return what is to be said of it."""
        self.names = [binding.name for binding in (*choice.missed, *choice.blind)]
        self.since = self.since if is_again else step
        self.next_try = step + max(1, step - self.since)
        kept = "it keeps its masks until there is more to go by"
        found = dict(remarks(choice))
        if choice.missed:
            found["missed"] = f"{observation.nothing_of(choice.missed, in_training=True)}; {kept}"
        if choice.blind:
            others = [name for name in observation.statistics if name not in set(self.names)]
            found["blind"] = f"{equal_scores(choice.blind, others)}; {kept}"
        new = [kind for kind in found if kind not in self.said]
        self.said += new
        return [f"step {step}: {found[kind]}" for kind in new]

    def last_words(self) -> str:
        """Return what is to be said of it when training ends; nothing if no target is behind."""
        if not self.names:
            return ""
        return f"the masks of {self.names[0]}{_of(self.names)} could not be chosen as due at step {self.since}"

    def as_dict(self) -> dict[str, object]:
        """Return plain values, for a saved state."""
        return dataclasses.asdict(self)
