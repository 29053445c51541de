"""Bounds on a metric, and what is remembered when it was last within them."""

import math

import pytest
import torch

from lightning_prune import MetricGuard
from lightning_prune.conductor.guard import GuardMemory


@pytest.mark.parametrize(
    ("bounds", "crossed", "within"),
    [
        ({"max": 2.0}, [2.1, math.inf, math.nan], [2.0, -5.0, -math.inf]),
        ({"min": 0.5}, [0.49, -math.inf, math.nan], [0.5, math.inf]),
        ({"min": 0.5, "max": 2.0}, [0.4, 2.1], [0.5, 1.0, 2.0]),
        ({"max": 0.0}, [1e-9], [0.0]),
    ],
)
def test_bounds_are_inclusive_and_nan_is_outside(
    bounds: dict[str, float], crossed: list[float], within: list[float]
) -> None:
    guard = MetricGuard(metric="eval_loss", **bounds)
    assert [guard.is_crossed(value) for value in crossed] == [True] * len(crossed)
    assert [guard.is_crossed(value) for value in within] == [False] * len(within)


def test_a_guard_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guard on 'eval_loss' has neither max nor min, so it has no effect; give"):
        MetricGuard(metric="eval_loss")
    with pytest.raises(ValueError, match=r"guard on 'acc' has min 0\.9 above max 0\.1; swap them"):
        MetricGuard(metric="acc", min=0.9, max=0.1)
    with pytest.raises(ValueError, match="guard action must be 'hold' or 'rollback', got 'stop'"):
        MetricGuard(metric="acc", min=0.9, action="stop")  # type: ignore[arg-type]


def test_what_is_remembered_does_not_follow_the_training() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    mask = torch.tensor([[True, False]])
    memory = GuardMemory()
    assert memory.good is None
    memory.remember({"w": weight}, {"w": mask}, 0.25)
    with torch.no_grad():
        weight.zero_()
    mask.zero_()
    assert memory.good is not None
    assert memory.good.sparsity == 0.25
    assert memory.good.weights["w"].tolist() == [[1.0, 2.0]]
    assert memory.good.masks["w"].tolist() == [[True, False]]
