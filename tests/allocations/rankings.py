"""A ranking over scores given as tensors, for the allocations' tests."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_prune.base.types import Allocation
from lightning_prune.conductor.decision import Decision
from lightning_prune.granularity import Unstructured
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.targets.layouts import Stored
from lightning_prune.targets.targets import Binding


def ranking(scores: Mapping[str, Tensor], allocation: Allocation) -> Decision:
    """Return a decision over one weight per name whose magnitudes are these scores."""
    bindings = [
        Binding(name, nn.Parameter(score.clone()), (nn.Identity(),), Stored()) for name, score in scores.items()
    ]
    return Decision(
        bindings=bindings,
        scorer=Magnitude(),
        granularity=Unstructured(),
        allocation=allocation,
        held={},
        read=lambda binding, whole: {},
        step=0,
        seed=0,
    )


def weighted_mean(sparsities: Mapping[str, float], scores: Mapping[str, Tensor]) -> float:
    """Return the sparsity over all weights that these sparsities make."""
    return sum(sparsities[name] * score.numel() for name, score in scores.items()) / sum(
        score.numel() for score in scores.values()
    )
