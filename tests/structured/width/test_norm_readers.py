"""Which norm feeds which weight is told by the numbers that flow."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structured.groups import Group, Member
from lightning_prune.structured.width.norm_readers import norm_of_readers

INPUTS = {"hidden": torch.arange(8.0).reshape(2, 4) ** 2}


class Reading(nn.Module):
    """Two norms over a stream, and two layers that read what `reads` says: (layer, norm or nothing) by turns."""

    def __init__(self, *reads: tuple[str, str | None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads = reads
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4, eps=0.5)
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        normed: dict[str | None, Tensor] = {"first": self.first(hidden), "second": self.second(hidden), None: hidden}
        parts: list[Any] = [getattr(self, layer)(normed[norm]) for layer, norm in self.reads]
        return torch.stack(parts).sum(0)


def found(*reads: tuple[str, str | None]) -> dict[str, str]:
    norms = [Member(f"{name}.weight", 0, ((0, 1),), "norm") for name in ("first", "second")]
    readers = [Member(f"{name}.weight", 1, ((0, 1),), "in") for name in ("up", "down")]
    return norm_of_readers(Reading(*reads), Group("hidden", "hidden", None, 4, (*norms, *readers)), INPUTS)


def test_each_reads_the_norm_whose_numbers_it_gets() -> None:
    assert found(("up", "second"), ("down", "first")) == {"up.weight": "second.weight", "down.weight": "first.weight"}


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ([("up", "first"), ("up", "second"), ("down", "first")], "up.weight reads first.weight and second.weight; it"),
        ([("up", "first"), ("up", None), ("down", "second")], "up.weight reads first.weight and something else; it"),
        ([("up", "first")], "down.weight is not reached by the probe; pass `inputs`"),
        ([("up", "first"), ("down", None)], "second.weight feeds no weight that could take its own weight up"),
    ],
)
def test_what_cannot_be_told_is_refused(reads: list[tuple[str, str | None]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(*reads)
