"""Targets that a method cannot treat are left out with a reason, or refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune import NM, Block, Targets, Unstructured
from lightning_prune.base.types import Granularity, Scorer
from lightning_prune.conductor.fitting import fit_targets
from lightning_prune.granularity import Channel
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.targets.targets import Selection


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 3)
    )


def fitted(model: nn.Module, granularity: Granularity, scorer: Scorer | None = None, *include: str) -> Selection:
    return fit_targets(model, Targets(include=include), Magnitude() if scorer is None else scorer, granularity)


def names(selection: Selection) -> list[str]:
    return [binding.name for binding in selection.targets]


def test_convolutions_that_a_granularity_does_not_fit_are_left_out() -> None:
    found = fitted(network(), NM(n=2, m=4))
    assert names(found) == ["2.weight", "4.weight"]
    assert [(one.name, one.reason) for one in found.left_out] == [
        ("0.weight", "convolution that NM does not fit"),
        ("5.weight", "output head"),
    ]
    assert names(fitted(network(), Channel(width=2))) == ["4.weight"]


def test_convolutions_whose_inputs_are_needed_and_not_seen_are_left_out() -> None:
    found = fitted(network(), Unstructured(), Wanda())
    assert names(found) == ["4.weight"]
    assert found.left_out[0].reason == "convolution, whose inputs Wanda does not see"


@pytest.mark.parametrize("granularity", [NM(n=2, m=4), Block(rows=4, cols=4)])
def test_an_included_convolution_that_does_not_fit_is_refused(granularity: Granularity) -> None:
    with pytest.raises(ValueError, match=r"0\.weight"):
        fitted(network(), granularity, None, "0.weight")


def test_groups_of_channels_are_not_crossed() -> None:
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 1, groups=2))
    assert names(fitted(layers, NM(n=2, m=4))) == ["1.weight"]


def test_gradients_of_a_part_of_a_weight_are_refused() -> None:
    layers = nn.ModuleList(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2))
    with pytest.raises(ValueError, match=r"0\.param.* is only a part of a weight.*Taylor needs gradients of the whole"):
        fitted(layers, Unstructured(), Taylor())
    assert len(fitted(layers, Unstructured(), Wanda()).targets) == 2


class Unknown(nn.Module):
    """A square stack that says nothing of its order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.rand(3, 4, 4))


def test_a_stack_of_unknown_order_is_refused_where_the_order_counts() -> None:
    model = nn.ModuleList([Unknown(), Unknown()])
    message = r"nothing tells whether 0\.stack of shape \(3, 4, 4\) holds inputs before outputs.*set is_transposed"
    for granularity, scorer in ((NM(n=2, m=4), None), (Unstructured(), Magnitude(scope="row"))):
        with pytest.raises(ValueError, match=message):
            fitted(model, granularity, scorer)
    assert len(fitted(model, Unstructured()).targets) == 2
    for part in model:
        part.is_transposed = True
    assert len(fitted(model, NM(n=2, m=4)).targets) == 2
