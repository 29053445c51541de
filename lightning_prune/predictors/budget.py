"""How many units of each group compute."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.base.bounds import at_least
from lightning_prune.structured.groups import Group

__all__ = ["Budget"]

GRAIN = 8  # FFN units: rows of whole 16 bytes in half precision, which matrix products like


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many units of each group stay, the same number in every block.

    Args:
        keep: share of the units, in (0, 1]; rounded to a multiple of 8 for FFN units.
        num_units: their number instead, for FFN units.
        keep_from: trains for any budget from this share to `keep`, so that one can be chosen when the model is used.
    """

    keep: float | None = None
    num_units: int | None = None
    keep_from: float | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.num_units is None):
            raise ValueError("budget takes either keep, a share in (0, 1], or num_units; give one of them")
        at_least(1, num_units=self.num_units)
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of units that compute, in (0, 1]; got {self.keep}")
        if self.keep_from is not None and (self.keep is None or not 0 < self.keep_from < self.keep):
            raise ValueError(f"keep_from must lie in (0, keep), got {self.keep_from} with keep {self.keep}")

    def numbers(self, groups: Sequence[Group], *, keep: float | None = None) -> tuple[int, ...]:
        """Return how many units of each group stay.

        Args:
            groups: of units.
            keep: another share than the recipe's.

        Raises:
            ValueError: if there are fewer units, or kernels dislike the number; the nearest good one is named.
        """
        share = self.keep if keep is None else keep
        return tuple(self._number(group, share) for group in groups)

    def drawn(self, groups: Sequence[Group], step: int, seed: int) -> tuple[int, ...] | None:
        """Return the numbers for one training step, drawn from the range alike on every rank; None without a range."""
        if self.keep_from is None or self.keep is None:
            return None
        return self.numbers(groups, keep=random.Random(f"{seed} {step}").uniform(self.keep_from, self.keep))

    def _number(self, group: Group, share: float | None) -> int:
        grain = GRAIN if group.kind == "ffn" and group.num_units >= 4 * GRAIN else group.step
        if share is None or (self.num_units is not None and group.kind == "ffn"):
            assert self.num_units is not None
            return _checked(group, self.num_units, grain)
        number = max(1, round(share * group.num_units / grain)) * grain
        number = min(group.num_units, max(number, group.at_least(0)))
        group.check_number(number)
        return number


def _checked(group: Group, number: int, grain: int) -> int:
    if not 1 <= number <= group.num_units:
        raise ValueError(f"{group.key} has {group.num_units} units, so num_units must be in 1 to it; got {number}")
    if number % grain and number != group.num_units:
        below = number // grain * grain
        near = below if below and number - below <= grain // 2 else min(below + grain, group.num_units)
        raise ValueError(
            f"num_units {number} of {group.key} is no multiple of {grain}, which matrix products are slow with; the "
            f"nearest good one is {near}"
        )
    group.check_number(number)
    return number
