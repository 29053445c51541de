"""What every statistic keeps to."""

import inspect

import pytest
import torch

from lightning_prune.base import registry


@pytest.mark.parametrize("entry", registry.entries("statistics"), ids=lambda entry: entry.name)
def test_a_statistic_lies_where_its_weight_lies(entry: registry.Entry) -> None:
    options = {"beta": 0.5} if "beta" in inspect.signature(entry.cls).parameters else {}
    statistic = entry.cls(torch.empty(3, 4, device="meta"), 4, **options)
    assert statistic._defaults
    assert {getattr(statistic, name).device.type for name in statistic._defaults} == {"meta"}
