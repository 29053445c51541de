"""The options of `recovery/reconstruct.py`, which a recipe reads without importing what they need to run."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Reconstruct"]

Method = Literal["least_squares", "bias"]


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """How the kept weights are refitted; see recovery/reconstruct.py.

    Args:
        method: `least_squares` refits the kept weights, and the bias where a layer has one; `bias` puts the mean of
            what is lost into the bias alone, which every target must have then.
        damping: of the change of the kept weights, in units of the mean squared input; None follows the number of
            calibration tokens.
        towards_dense: in [0, 1]: 0 refits to what the dense weights compute on the inputs that the pruned model gives,
            1 to what they compute in the dense model, and between them to a mixture. Above 0 the dense model runs
            along.
        exclude: patterns of targets that keep their weights as they are, such as stacked experts.
        parent: folder or hub id of the dense model, for a model that comes pruned; None where it is pruned in the
            same run.

    Raises:
        ValueError: if an option contradicts another one or itself.
    """

    method: Method = "least_squares"
    damping: float | None = None
    towards_dense: float = 0.5
    exclude: tuple[str, ...] = ()
    parent: str | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be least_squares or bias, got {self.method!r}")
        if self.damping is not None and not self.damping >= 0:
            raise ValueError(f"damping must be >= 0, got {self.damping}; 1e-2 is usual, null follows the tokens")
        if not 0 <= self.towards_dense <= 1:
            raise ValueError(f"towards_dense must be in [0, 1], got {self.towards_dense}; 0.5 is usual")
        if self.damping is not None and self.method == "bias":
            raise ValueError("damping has no effect with method: bias; leave it out")
