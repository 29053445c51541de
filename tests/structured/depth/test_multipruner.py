"""MultiPruner: its stages against searches written out, its budgets by hand."""

import json
import math
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from lightning_prune.structured.depth.candidates import unit_magnitudes
from lightning_prune.structured.depth.criteria import SequencePerplexity
from lightning_prune.structured.depth.methods import BlockPruner
from lightning_prune.structured.depth.multipruner import MultiPruner
from lightning_prune.structured.depth.search import Stop
from lightning_prune.structured.groups import Cut, Plan, zeroed
from tests.structured.depth_models import (
    llama_groups,
    padded_batches,
    shake,
    structure_of,
)
from tests.tiny_models import tiny_llama

BATCHES = padded_batches()


def llama(layers: int = 3) -> PreTrainedModel:
    model = tiny_llama(layers=layers)
    shake(model)
    return model.eval()


def test_sub_blocks_alone_are_block_pruner() -> None:
    model = llama()
    groups = llama_groups(model)
    multi = MultiPruner(parameter_share=0.3, split=(1, 0, 0)).plan(model, structure_of(groups), BATCHES, progress=False)
    stop = Stop(parameter_share=0.3)
    single = BlockPruner(stop=stop, criterion=SequencePerplexity()).plan(
        model, structure_of(groups), BATCHES, progress=False
    )
    assert (multi.layers, multi.skip, multi.cuts) == (single.layers, single.skip, ())
    assert multi.method["order"] == single.method["order"]


def test_units_go_where_the_perplexity_stays_lowest() -> None:
    model = llama(2)
    groups = {group.key: group for group in llama_groups(model)}
    ffn = [group for group in groups.values() if group.kind == "ffn"]
    ranked = {group.key: unit_magnitudes(model, group).argsort(descending=True).tolist() for group in ffn}
    evaluate = SequencePerplexity().prepare(model, BATCHES)
    kept = {group.key: 48 for group in ffn}
    steps = []
    for _ in range(4):
        scores = {}
        for key in kept:
            cuts = [Cut(k, tuple(ranked[k][: n - (12 if k == key else 0)])) for k, n in kept.items()]
            if kept[key] > 12:
                scores[key] = evaluate(lambda cuts=cuts: zeroed(model, groups, cuts))  # type: ignore[misc]
        best = min(scores, key=scores.__getitem__)
        kept[best] -= 12
        steps.append(scores[best])
    total = sum(parameter.numel() for parameter in model.parameters())
    share = (3.5 * 12 * 96) / total  # reached by the fourth removal
    multi = MultiPruner(parameter_share=share, split=(0, 1, 0), ffn_step=12)
    plan = multi.plan(model, structure_of(list(groups.values())), BATCHES, progress=False)
    assert [entry[1] for entry in plan.method["order"]] == pytest.approx(steps, rel=1e-9)
    expected = {key: tuple(sorted(ranked[key][:number])) for key, number in kept.items() if number < 48}
    assert {cut.group: cut.keep for cut in plan.cuts} == expected
    assert plan.layers is None


def test_three_stages_share_the_budget() -> None:
    model = llama(3)
    groups = llama_groups(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    multi = MultiPruner(parameter_share=0.4, split=(0.5, 0.3, 0.2), ffn_step=8)
    plan = multi.plan(model, structure_of(groups), BATCHES, progress=False)
    shares = [entry[2] for entry in plan.method["order"]]
    assert shares == sorted(shares)
    labels = [entry[0] for entry in plan.method["order"]]
    kinds = [1 if "ffn" in label else 2 if "kv_groups" in label else 0 for label in labels]
    assert kinds == sorted(kinds)
    for stage, budget in enumerate((0.2, 0.32, 0.4)):
        reached = [share for share, kind in zip(shares, kinds, strict=True) if kind <= stage]
        assert reached[-1] >= budget
    gone = {index for index in range(3) if plan.layers is not None and index not in plan.layers}
    parts = {*plan.skip, *((layer, part) for layer in gone for part in ("attention", "mlp"))}
    sizes = {"attention": 32 * 32 * 2 + 32 * 16 * 2, "mlp": 3 * 32 * 48}
    by_key = {group.key: group for group in groups}
    numbers = sum(sizes[part] for _, part in parts)
    for cut in plan.cuts:
        group = by_key[cut.group]
        part = "mlp" if group.kind == "ffn" else "attention"
        assert (group.layer, part) not in parts
        numbers += sizes[part] * (group.num_units - len(cut.keep)) // group.num_units
    assert shares[-1] == pytest.approx(numbers / total)
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_given_order_is_followed() -> None:
    model = llama(2)
    groups = llama_groups(model)
    keys = [group.key for group in groups if group.kind == "ffn"]
    order = {key: tuple(range(48)) for key in keys}
    multi = MultiPruner(parameter_share=0.2, split=(0, 1, 0), ffn_step=16, order=order)
    plan = multi.plan(model, structure_of(groups), BATCHES, progress=False)
    assert plan.cuts
    assert all(cut.keep == tuple(range(len(cut.keep))) for cut in plan.cuts)


def test_all_stages_go_on_from_one_file(tmp_path: Path) -> None:
    model = llama(2)
    groups = llama_groups(model)
    multi = MultiPruner(parameter_share=0.35, split=(0.4, 0.4, 0.2), ffn_step=16)
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    straight = multi.plan(model, structure_of(groups), BATCHES, state_file=tmp_path / "straight.json", progress=False)
    handle.remove()
    assert len({entry[0].rpartition(":")[2].split()[0] for entry in straight.method["order"]}) == 3
    last = len(calls) - 3  # in the last stage: merging the parts may run the model twice more
    path = tmp_path / "state.json"
    calls.clear()

    def fail(*args: object) -> None:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        multi.plan(model, structure_of(groups), BATCHES, state_file=path, progress=False)
    finished = len(json.loads(path.read_text())["scores"])
    assert finished == (last - 1) // 2  # two batches each
    assert multi.plan(model, structure_of(groups), BATCHES, state_file=path, progress=False) == straight
    handle.remove()
    other = MultiPruner(parameter_share=0.35, split=(0.4, 0.4, 0.2), ffn_step=8)
    with pytest.raises(ValueError, match="another model, calibration or options"):
        other.plan(model, structure_of(groups), BATCHES, state_file=path, progress=False)


def test_wrong_options_are_refused() -> None:
    model = llama(2)
    groups = llama_groups(model)
    with pytest.raises(ValueError, match="three shares >= 0 that add up to 1"):
        MultiPruner(parameter_share=0.1, split=(0.5, 0.4, 0.0))
    with pytest.raises(ValueError, match="order names the group 'x'"):
        MultiPruner(parameter_share=0.1, order={"x": (0,)}).plan(model, structure_of(groups), BATCHES)
    key = groups[1].key
    with pytest.raises(ValueError, match="must name each of its 48 units once"):
        MultiPruner(parameter_share=0.1, order={key: (0, 0)}).plan(model, structure_of(groups), BATCHES)
    with pytest.raises(ValueError, match="units of mlp parts, but none can be removed"):
        MultiPruner(parameter_share=0.1, split=(0, 1, 0)).plan(model, structure_of(groups), BATCHES, progress=False)


def test_perplexity_of_the_plan_is_that_of_the_last_step() -> None:
    model = llama(2)
    groups = llama_groups(model)
    multi = MultiPruner(parameter_share=0.2, split=(0, 0.8, 0.2), ffn_step=16)
    plan = multi.plan(model, structure_of(groups), BATCHES, progress=False)
    evaluate = SequencePerplexity().prepare(model, BATCHES)
    by_key = {group.key: group for group in groups}
    value = evaluate(lambda: zeroed(model, by_key, plan.cuts))
    assert math.isclose(value, plan.method["order"][-1][1], rel_tol=1e-9)
