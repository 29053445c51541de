"""Which configuration fields a plan changes, and to what; numbers by hand."""

from typing import Any

import pytest

from lightning_prune.structured.build import build_smaller, field_edits
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Group, Plan, Share
from lightning_prune.structured.structure import Stack, Structure
from tests.tiny_models import tiny_llama

# Four blocks of which the first two are dense; a field counts those.
STACK = Stack(("layers",), "depth", ("kinds", "widths"), 4, counters={0: ("dense",), 1: ("dense",)})
VALUES = {"depth": 4, "dense": 2, "kinds": ["d", "d", "e", "e"], "width": 8, "widths": [8, 8, 8, 8]}


def structure(field: str) -> Structure:
    groups = [Group(f"layers.{idx}", "ffn", idx, 8, (), fields={field: 1}) for idx in range(4)]
    return Structure({group.key: group for group in groups}, STACK)


def edits(layers: tuple[int, ...] | None, *cut: int, field: str = "width") -> dict[str, Any]:
    cuts = {f"layers.{idx}:ffn": Cut(f"layers.{idx}:ffn", tuple(range(6))) for idx in cut}
    return {".".join(path): value for path, value in field_edits(structure(field), cuts, layers, VALUES).items()}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((0, 1, 2), {"depth": 3, "kinds": ["d", "d", "e"], "widths": [8, 8, 8]}),
        ((1, 2, 3), {"depth": 3, "kinds": ["d", "e", "e"], "widths": [8, 8, 8], "dense": 1}),
        ((2,), {"depth": 1, "kinds": ["e"], "widths": [8], "dense": 0}),
    ],
)
def test_fields_that_count_blocks_of_a_kind_fall_with_each_of_it(
    layers: tuple[int, ...], expected: dict[str, Any]
) -> None:
    assert edits(layers) == expected


def test_only_blocks_that_stay_say_how_wide_they_are() -> None:
    assert edits((0, 2), 0, 2) == {
        "depth": 2,
        "kinds": ["d", "e"],
        "widths": [8, 8],
        "dense": 1,
        "width": 6,
    }
    with pytest.raises(ValueError, match=r"width to be 6 in layers\.\d, 8 in layers\.\d, but the stock class has one"):
        edits((0, 1, 2), 0, 2)
    with pytest.raises(ValueError, match="width to be 6"):
        edits(None, 0, 2)


def test_a_list_has_the_width_of_every_block_that_stays() -> None:
    assert edits(None, 1, field="widths") == {"widths": [8, 6, 8, 8]}
    assert edits((1, 3), 1, field="widths")["widths"] == [6, 8]


def test_blocks_that_do_not_exist_cannot_stay() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"must be ascending numbers from 0 to 1, .* got \[1, 0\]"):
        build_smaller(model, discover(model, kinds=("ffn",)), Plan(cuts=(), layers=(1, 0)))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(share=(Share(1, 0, 2),)), "block 1 is to share the matrices of block 0, .*format per_layer"),
        (Plan(skip=((0, "mlp"),)), "removes attention or MLP of single blocks"),
    ],
)
def test_what_the_stock_class_cannot_express_is_refused(plan: Plan, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        build_smaller(model, discover(model, kinds=("ffn",)), plan)
