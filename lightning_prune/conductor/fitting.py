"""Fit a recipe's targets to a model and to its method: what cannot be treated is refused or left out, with a reason."""

from torch import nn

from lightning_prune.base import registry
from lightning_prune.base.types import Granularity, Scorer
from lightning_prune.targets import layers
from lightning_prune.targets.binding import Binding
from lightning_prune.targets.choice import Candidate
from lightning_prune.targets.targets import Selection, Targets

__all__ = ["fit_targets"]


def fit_targets(model: nn.Module, targets: Targets, scorer: Scorer, granularity: Granularity) -> Selection:
    """Find the targets of a model, and check that the method can treat them.

    Raises:
        ValueError: if a pattern matches nothing, nothing is left, or a target cannot be pruned, or not in this shape.
    """
    fed_by = {getattr(registry.get("statistics", name), "source", None) for name in scorer.needs}
    needs_inputs = "input" in fed_by

    def fits(candidate: Candidate) -> str | None:
        if needs_inputs:
            return f"convolution, whose inputs {type(scorer).__name__} does not see"
        layout, shape = layers.layout_of(candidate.modules[0], candidate.parameter.ndim), candidate.parameter.shape
        assert layout is not None
        sizes = {"num_taps": layout.num_taps(shape), "num_groups": layout.num_groups}
        try:
            granularity.check(candidate.names[0], layout.shape_OI(shape), **sizes)
        except ValueError:
            return f"convolution that {type(granularity).__name__} does not fit"
        return None

    selection = targets.select(model, fits=fits)
    has_direction = granularity.has_direction or needs_inputs or granularity.scope(scorer.scope) == "row"
    for binding in selection.targets:
        if binding.source is not None and fed_by - {"input"}:
            raise ValueError(
                f"{binding.name} is only a part of a weight, which a weight norm or spectral norm makes of it, and "
                f"{type(scorer).__name__} needs gradients of the whole; use a scorer without gradients, remove the "
                f"norm, or exclude it from the targets (exclude: {binding.name!r})"
            )
        if has_direction and not binding.layout.is_certain:
            raise ValueError(_unknown_direction(binding))
        sizes = {"num_taps": binding.num_taps, "num_groups": binding.layout.num_groups}
        granularity.check(binding.name, binding.shape_OI, **sizes)
    return selection


def _unknown_direction(binding: Binding) -> str:
    kind, shape = type(binding.module).__name__, tuple(binding.parameter.shape)
    return (
        f"nothing tells whether {binding.name} of shape {shape} holds inputs before outputs, and this recipe prunes "
        f"along its inputs; set is_transposed (True or False) on {kind}, exclude it from the targets (exclude: "
        f"{binding.name!r}), or use scope: tensor with granularity Unstructured"
    )
