"""What can be cut is told, and plans that do nothing are refused."""

import pytest

from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.structure import Stack, Structure

FFN = Group("layers.0.mlp", "ffn", 0, 4, ())
STACK = Stack(("layers",), "num_layers", (), 3, kept_always={0: "it is the first"})


def test_kinds_are_those_of_the_groups_and_blocks_where_some_can_go() -> None:
    groups = {FFN.key: FFN}
    assert Structure(groups, STACK).kinds == ("ffn", "layers")
    assert Structure(groups).kinds == ("ffn",)
    assert Structure(groups, Stack(("layers",), "num_layers", (), 1, kept_always={0: "it is alone"})).kinds == ("ffn",)
    with pytest.raises(ValueError, match="heads cannot be cut: too few; what can be cut: ffn, layers"):
        Structure(groups, STACK, {"heads": "too few"}).of_kind("heads")
    with pytest.raises(ValueError, match="heads cannot be cut: the model has none; what can be cut: nothing"):
        Structure({}).of_kind("heads")


def test_names_of_other_blocks() -> None:
    assert STACK.layer_of("layers.2.mlp.weight") == 2
    assert STACK.layer_of("head.weight") is None
    assert STACK.renamed("layers.2.mlp.weight", 0) == "layers.0.mlp.weight"
    assert STACK.parent_name("layers.1", (0, 2)) == "layers.2"
    assert STACK.parent_name("head.weight", (0, 2)) == "head.weight"


@pytest.mark.parametrize("layers", [(), (0, 0), (2, 0), (0, 3), (-1, 0)])
def test_layers_that_stay_ascend(layers: tuple[int, ...]) -> None:
    STACK.check_layers((0, 2))
    with pytest.raises(ValueError, match="must be ascending numbers from 0 to 2, at least one of them, got"):
        STACK.check_layers(layers)


def test_a_block_that_must_stay_stays() -> None:
    with pytest.raises(ValueError, match=r"layer 0 cannot be removed: it is the first; removable are \[1, 2\]"):
        STACK.check_layers((1, 2))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(cuts=(Cut(FFN.key, (0, 1, 2, 3)),)), "all units of the 1 groups that it names stay"),
        (Plan(cuts=(), layers=(0, 1, 2)), "it cuts no units"),
    ],
)
def test_a_plan_without_effect_is_refused(plan: Plan, message: str) -> None:
    structure = Structure({FFN.key: FFN}, STACK)
    structure.check_effect(Plan(cuts=(Cut(FFN.key, (0, 1, 2)),)))
    structure.check_effect(Plan(cuts=(), layers=(0, 1)))
    with pytest.raises(ValueError, match=f"the plan removes nothing: {message}"):
        structure.check_effect(plan)
