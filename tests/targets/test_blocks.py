"""Which parts of a model repeat."""

import itertools
from collections import OrderedDict

import pytest
from torch import nn

from lightning_prune.targets.blocks import are_beside, ends, repeated_parts


class Block(nn.Module):
    """Two layers of one width."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


def chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(into, out) for into, out in itertools.pairwise(widths)))


def test_blocks_of_a_chain_are_those_of_a_type_that_repeats() -> None:
    first, second = Block(), Block()
    found = repeated_parts(nn.Sequential(nn.Embedding(5, 4), first, second, nn.LayerNorm(4), nn.Linear(4, 5)))
    assert found.parts == (first, second)
    assert found.are_whole


def test_a_list_of_one_block_repeats_and_a_chain_of_one_does_not() -> None:
    block = Block()
    assert repeated_parts(nn.ModuleList([block])).parts == (block,)
    assert repeated_parts(nn.Sequential(block)).parts == ()


def test_layers_at_the_ends_of_a_list_of_blocks_are_no_blocks() -> None:
    blocks = [Block(), Block()]
    ends_of_list = nn.ModuleList([nn.Linear(3, 4), *blocks, nn.Linear(4, 5)])
    assert repeated_parts(ends_of_list).parts == tuple(blocks)
    mixed = [Block(), nn.Linear(4, 4), Block(), nn.Linear(4, 4)]
    assert repeated_parts(nn.ModuleList(mixed)).parts == tuple(mixed)


def test_towers_beside_each_other_keep_their_own_blocks() -> None:
    text, image = nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()])
    assert repeated_parts(nn.ModuleDict({"text": text, "image": image})).parts == (*text, *image)


def test_a_middle_of_the_same_type_belongs_to_the_blocks() -> None:
    middle = Block(8)
    model = nn.ModuleDict(
        OrderedDict(down=nn.ModuleList([Block(), Block()]), middle=middle, up=nn.ModuleList([Block(), Block()]))
    )
    assert middle in repeated_parts(model).parts


def test_bare_layers_repeat_where_one_can_read_the_other() -> None:
    assert not repeated_parts(chain(3, 8, 8, 8, 2)).are_whole
    assert len(repeated_parts(chain(3, 8, 8, 8, 2)).parts) == 4
    assert repeated_parts(chain(3, 8, 2)).parts == ()


def test_heads_beside_each_other_are_no_blocks() -> None:
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 2)])
    blocks = [Block(), Block()]
    assert repeated_parts(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "heads": heads})).parts == tuple(blocks)


@pytest.mark.parametrize(
    ("widths", "expected"), [([(4, 3), (4, 2)], True), ([(4, 3), (3, 2)], False), ([(4, 4), (4, 2)], False)]
)
def test_parts_lie_beside_each_other_if_none_reads_another(widths: list[tuple[int, int]], expected: bool) -> None:
    assert are_beside(nn.Linear(*width) for width in widths) == expected


def test_ends_are_what_is_read_first_and_written_last() -> None:
    assert ends(chain(3, 8, 2)) == (3, 2)
    assert ends(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Linear(9, 5))) == (3, 5)
    assert ends(nn.ReLU()) == (0, 0)
