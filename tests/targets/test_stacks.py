"""In which order stacks of matrices are stored."""

import pytest
import torch
from torch import nn

from lightning_prune.targets.stacks import Stacks


class Experts(nn.Module):
    """Stacks of three experts, from shapes."""

    def __init__(self, *shapes: tuple[int, int], **attributes: object) -> None:
        super().__init__()
        self.stacks = nn.ParameterList()
        for place, shape in enumerate(shapes):
            setattr(self, f"stack{place}", nn.Parameter(torch.zeros(3, *shape)))
        for name, value in attributes.items():
            setattr(self, name, value)


def told(*shapes: tuple[int, int], **attributes: object) -> bool | None:
    experts = Experts(*shapes, **attributes)
    return Stacks(experts).is_transposed(experts, experts.stack0)


@pytest.mark.parametrize("is_transposed", [True, False])
def test_a_module_may_say_so_itself(is_transposed: bool) -> None:
    assert told((4, 4), is_transposed=is_transposed) is is_transposed


def test_widths_that_a_module_names_tell() -> None:
    assert told((4, 6), in_features=4, out_features=6) is True
    assert told((6, 4), input_size=4, output_size=6) is False
    assert told((4, 4), in_features=4, out_features=4) is None


def test_a_stack_that_reads_what_another_writes_tells() -> None:
    assert told((6, 4), (4, 6)) is None  # both readings join
    assert told((12, 4), (4, 6)) is False  # gate and up, stored together
    assert told((4, 12), (6, 4)) is True
    assert told((5, 7)) is None


def test_another_module_of_the_type_tells_where_one_does_not() -> None:
    silent, speaking = Experts((4, 4)), Experts((4, 6), in_features=4, out_features=6)
    stacks = Stacks(nn.ModuleList([silent, speaking]))
    assert stacks.is_transposed(silent, silent.stack0) is True
    contradicting = Experts((6, 4), in_features=4, out_features=6)
    stacks = Stacks(nn.ModuleList([silent, speaking, contradicting]))
    assert stacks.is_transposed(silent, silent.stack0) is None
