"""Check that options lie in range where they are set, so that a recipe is refused when it is loaded."""

import math

__all__ = ["at_least"]


def at_least(low: float, **values: float | None) -> None:
    """Check that each value is finite and not below a bound; None is no value.

    Raises:
        ValueError: naming the option, what came, and the bound.
    """
    for name, value in values.items():
        if value is not None and not (value >= low and math.isfinite(value)):
            raise ValueError(f"{name} must be {low} or more, got {value}")
