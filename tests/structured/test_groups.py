"""Members, groups, plans, and setting units to zero; values worked by hand."""

import json

import pytest
import torch
from torch import nn

from lightning_prune.structured.groups import Cut, Group, Member, Plan, Share, zeroed


def test_positions_of_interleaved_and_fused_units() -> None:
    heads = Member("qkv", 0, ((0, 3),), "out")  # query, key and value of one head side by side
    assert heads.positions([0, 2]).tolist() == [0, 1, 2, 6, 7, 8]
    gate_up = Member("gate_up", 0, ((0, 1), (4, 1)), "out")  # all gates, then all ups, of 4 units
    assert gate_up.positions([3, 1]).tolist() == [1, 3, 5, 7]


def test_zeroed_puts_the_same_numbers_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    members = (
        Member("0.weight", 0, ((0, 1),), "out"),
        Member("0.bias", 0, ((0, 1),), "vector"),
        Member("2.weight", 1, ((0, 1),), "in"),
    )
    group = Group("mlp", "ffn", None, 4, members)
    with pytest.raises(KeyError), zeroed(model, {group.key: group}, [Cut(group.key, (1, 3))]):
        assert model[0].weight[[0, 2]].abs().sum() == 0
        assert model[0].bias[[0, 2]].abs().sum() == 0
        assert model[2].weight[:, [0, 2]].abs().sum() == 0
        assert torch.equal(model[0].weight[[1, 3]], before["0.weight"][[1, 3]])
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_expert_of_a_stacked_tensor() -> None:
    holder = nn.Module()
    holder.stacked = nn.Parameter(torch.arange(1.0, 13).reshape(2, 3, 2))  # 2 experts
    group = Group("experts.1", "ffn", None, 3, (Member("stacked", 1, ((0, 1),), "out", expert=1),))
    with zeroed(holder, {group.key: group}, [Cut(group.key, (0, 2))]):
        assert holder.stacked.tolist() == [[[1, 2], [3, 4], [5, 6]], [[7, 8], [0, 0], [11, 12]]]


def test_parts_keep_equally_many() -> None:
    group = Group("attention", "heads", 0, 6, (), num_parts=2)
    group.check_keep([0, 1, 3, 5])
    with pytest.raises(ValueError, match=r"equally many of its 3 units in each of its 2 parts, got \[2, 1\]"):
        group.check_keep([0, 1, 3])


def test_a_refusal_is_short_however_wide_the_group() -> None:
    wide = Group("mlp", "ffn", 0, 10_000, ())
    with pytest.raises(ValueError, match=r"got keep=\[0, 1, .*, 11, \.\.\. \(10001 in all\)\]$"):
        wide.check_keep(range(10_001))


def test_plans_survive_json() -> None:
    plan = Plan(cuts=(Cut("a:ffn", (0, 2)),), layers=(0, 1), skip=((1, "mlp"),), method={"name": "x", "seed": 0})
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    with pytest.raises(ValueError, match="format 7; this version reads format 1"):
        Plan.from_dict({"format": 7})


def test_a_changed_character_of_a_plan_is_noticed() -> None:
    plan = Plan(cuts=(Cut("a:ffn", (0, 2)),), layers=(0, 1), share=(Share(1, 0, 2),), method={"name": "x", "rate": 0.1})
    text = json.dumps(plan.as_dict())
    for position, letter in enumerate(text):
        damaged = text[:position] + ("7" if letter != "7" else "8") + text[position + 1 :]
        try:
            values = json.loads(damaged)
        except json.JSONDecodeError:
            continue
        if "checksum" in values:
            with pytest.raises(ValueError, match=r"the plan is damaged: its checksum is|this version reads format"):
                Plan.from_dict(values)
        else:
            assert Plan.from_dict(values) == plan
    by_hand = {key: value for key, value in plan.as_dict().items() if key != "checksum"}
    assert Plan.from_dict(by_hand | {"layers": [1]}).layers == (1,)
