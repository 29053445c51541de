"""Width pruning: what goes is zero, what stays is repaired on the cut model, and wrong options are refused."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.scorers.activation import Activation
from lightning_prune.scorers.fluctuation import Fluctuation
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.random import Random
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import GreedyOutput, OutputEnergy
from lightning_prune.structured.groups import Group, Member, Plan, zeroed
from lightning_prune.structured.width.block_by_block import prune_width
from lightning_prune.structured.width.options import fingerprint
from lightning_prune.structured.width.unit_scores import Reduction
from tests.processes import Processes
from tests.structured.llama_groups import llama_groups
from tests.structured.unchanged import unchanged_since
from tests.tiny_models import needs_stacked_experts, tiny_family, tiny_llama, token_windows


def gpt2_groups() -> list[Group]:
    """Return the feed-forward units of the tiny GPT-2, whose weights are (inputs, outputs)."""
    members = (
        Member("transformer.h.{}.mlp.c_fc.weight", 1, ((0, 1),), "out"),
        Member("transformer.h.{}.mlp.c_fc.bias", 0, ((0, 1),), "vector"),
        Member("transformer.h.{}.mlp.c_proj.weight", 0, ((0, 1),), "in"),
    )
    return [
        Group(
            f"transformer.h.{layer}.mlp",
            "ffn",
            layer,
            128,
            tuple(Member(m.name.format(layer), m.dim, m.runs, m.role) for m in members),
        )
        for layer in range(2)
    ]


def calibration(num: int = 4, length: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in token_windows(4 * num, length).split(4)]


def prune(model: PreTrainedModel, groups: list[Group] | None = None, **options: Any) -> Plan:
    defaults: dict[str, Any] = {"scorer": Wanda(), "sparsity": {"ffn": 0.25}, "progress": False}
    batches = options.pop("batches", calibration())
    return prune_width(model, groups or llama_groups(model), batches, **(defaults | options))


@torch.no_grad()
def logits(model: nn.Module, seed: int = 9) -> Tensor:
    result: Tensor = model(input_ids=token_windows(4, 12, seed=seed)).logits
    return result


CHOOSERS = [
    Magnitude(), Random(), Wanda(), Fluctuation(), Activation(), Activation(aggregate="l2"), Taylor(), OutputEnergy(),
    GreedyOutput(),
]  # fmt: skip


@pytest.mark.parametrize("scorer", CHOOSERS, ids=repr)
def test_without_repair_it_is_the_model_with_the_plans_units_zeroed(scorer: Any) -> None:
    model = tiny_llama()
    parent, groups = copy.deepcopy(model), llama_groups(model)
    plan = prune(model, scorer=scorer, sparsity={"ffn": 0.25, "heads": 0.5}, compensate="none")
    kept = {cut.group: len(cut.keep) for cut in plan.cuts}
    assert kept == {
        f"model.layers.{i}.{part}": num for i in (0, 1) for part, num in (("self_attn:heads", 2), ("mlp:ffn", 36))
    }
    for cut in plan.cuts:
        next(group for group in groups if group.key == cut.group).check_keep(cut.keep)
    with zeroed(parent, {group.key: group for group in groups}, plan.cuts):
        for name, value in parent.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("compensate", ["none", "least_squares"])
def test_whole_key_value_groups_go(compensate: Any) -> None:
    model = tiny_llama()
    parent = copy.deepcopy(model)
    groups = []
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn"
        slices = (("q", 0, 16, "out"), ("k", 0, 8, "out"), ("v", 0, 8, "out"), ("o", 1, 16, "in"))
        members = tuple(
            Member(f"{name}.{part}_proj.weight", dim, ((0, size),), role) for part, dim, size, role in slices
        )  # type: ignore[arg-type]
        groups.append(Group(name, "kv_groups", layer, 2, members))
    plan = prune(model, groups, scorer=OutputEnergy(), sparsity={"kv_groups": 0.5}, compensate=compensate)
    assert [len(cut.keep) for cut in plan.cuts] == [1, 1]
    with zeroed(parent, {group.key: group for group in groups}, plan.cuts):
        same = [torch.equal(value, model.state_dict()[name]) for name, value in parent.state_dict().items()]
        changed = [name for name, is_same in zip(parent.state_dict(), same, strict=True) if not is_same]
    repaired = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)]
    assert changed == ([] if compensate == "none" else repaired)


def test_weights_keep_their_dtype() -> None:
    model, single = tiny_llama().bfloat16(), tiny_llama().bfloat16().float()
    plan = prune(model, sparsity={"ffn": 0.25, "heads": 0.5})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    prune(single, sparsity={"ffn": 0.25, "heads": 0.5})
    keep = list(plan.cuts[1].keep)
    ours, exact = (each.model.layers[0].mlp.down_proj.weight.detach().float() for each in (model, single))
    assert float((ours - exact)[:, keep].norm() / exact[:, keep].norm()) < 0.05


def test_magnitude_keeps_the_units_of_the_largest_sums() -> None:
    model = tiny_llama()
    mlp = copy.deepcopy(model.model.layers[1].mlp)
    plan = prune(model, scorer=Magnitude(), compensate="none", batches=[])
    sums = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1) + mlp.down_proj.weight.abs().sum(0)
    assert plan.cuts[1].keep == tuple(sums.topk(36).indices.sort().values.tolist())
    assert plan.method["calibration"] is None


def test_the_first_blocks_wanda_scores_are_those_of_its_inputs() -> None:
    model = tiny_llama()
    parent = copy.deepcopy(model)
    seen: list[Tensor] = []
    parent.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in calibration():
            parent(**batch)
    score = parent.model.layers[0].mlp.down_proj.weight.abs().sum(0) * torch.cat(seen).norm(dim=0)
    plan = prune(model, compensate="none")
    assert plan.cuts[0].keep == tuple(score.topk(36).indices.sort().values.tolist())


def inputs_before_the_cut(model: PreTrainedModel, parent: PreTrainedModel, layer: int) -> Tensor:
    """Return z_TI that a down projection saw just before its group was cut: the producers alone are put back."""
    model = copy.deepcopy(model)
    mlp, original = model.model.layers[layer].mlp, parent.model.layers[layer].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = original.gate_proj.weight, original.up_proj.weight
    seen: list[Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        for batch in calibration():
            model(**batch)
    return torch.cat(seen)


@pytest.mark.parametrize("scorer", [Wanda(), Magnitude(), GreedyOutput()], ids=repr)
def test_kept_columns_are_the_least_squares_fit_on_the_model_as_it_stood(scorer: Any) -> None:
    model = tiny_llama()
    parent = copy.deepcopy(model)
    plan = prune(model, scorer=scorer, sparsity={"ffn": 0.25, "heads": 0.5}, damping=0.0)
    for cut in plan.cuts[1::2]:
        layer, keep = int(cut.group.split(".")[2]), list(cut.keep)
        z = inputs_before_the_cut(model, parent, layer)
        target = z @ parent.model.layers[layer].mlp.down_proj.weight.double().T.detach()
        expected = np.linalg.lstsq(z[:, keep].numpy(), target.numpy())[0].T
        down = model.model.layers[layer].mlp.down_proj.weight.detach()
        np.testing.assert_allclose(down[:, keep].numpy(), expected, rtol=2e-3, atol=2e-5)
        assert int(down.any(0).sum()) == len(keep)


def test_a_twin_goes_and_its_sibling_takes_its_part() -> None:
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight.mul_(5)
                weight[5] = weight[2]
            mlp.down_proj.weight[:, 2] /= 2
            mlp.down_proj.weight[:, 5] = mlp.down_proj.weight[:, 2]
    before, first = logits(model), copy.deepcopy(model)
    plan = prune(model, scorer=GreedyOutput(), sparsity={"ffn": 1 / 48}, damping=1e-6)
    removed = [set(range(48)) - set(cut.keep) for cut in plan.cuts]
    assert all(units in ({2}, {5}) for units in removed)
    restored = (logits(model) - before).abs().max()
    prune(first, scorer=GreedyOutput(), sparsity={"ffn": 1 / 48}, compensate="none")
    assert restored < 1e-5 < (logits(first) - before).abs().max()


@pytest.mark.parametrize(("compensate", "scorer"), [("bias", Fluctuation()), ("least_squares", Fluctuation())], ids=str)
def test_a_constant_unit_goes_first_and_the_bias_makes_up_for_it_exactly(compensate: Any, scorer: Any) -> None:
    model = tiny_family("gpt2").eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, 7] = 0
            block.mlp.c_fc.bias[7] = 3.0
            block.mlp.c_proj.weight[7] = 1.0
    before = logits(model)
    plan = prune(model, gpt2_groups(), scorer=scorer, sparsity={"ffn": 1 / 128}, compensate=compensate)
    assert [set(range(128)) - set(cut.keep) for cut in plan.cuts] == [{7}, {7}]
    for block in model.transformer.h:
        assert not block.mlp.c_fc.weight[:, 7].any()
        assert not block.mlp.c_fc.bias[7]
        assert not block.mlp.c_proj.weight[7].any()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_taylor_scores_come_from_the_gradients_of_the_parent() -> None:
    model = tiny_llama()
    parent = copy.deepcopy(model)
    [batch] = calibration(num=1)
    plan = prune(model, scorer=Taylor(beta=0.0), compensate="none", batches=[batch])
    parent.eval()
    scores = [torch.zeros(48) for _ in parent.model.layers]
    for ids in batch["input_ids"].split(1):
        parent.zero_grad()
        parent(input_ids=ids, labels=ids).loss.backward()
        for layer, score in zip(parent.model.layers, scores, strict=True):
            for part, dim in ((layer.mlp.gate_proj, 1), (layer.mlp.up_proj, 1), (layer.mlp.down_proj, 0)):
                score += (part.weight.detach() * part.weight.grad).abs().sum(dim)
    for score, cut in zip(scores, plan.cuts, strict=True):
        assert cut.keep == tuple(score.topk(36).indices.sort().values.tolist())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_a_global_budget_moves_units_between_blocks() -> None:
    model = tiny_llama()
    with torch.no_grad():  # one block with some strong units, one with equal ones: z-scores of the strong are high
        model.model.layers[0].mlp.down_proj.weight[:, :12] *= 50
    plan = prune(model, budget="global", sparsity={"ffn": 0.5}, scorer=OutputEnergy())
    counts = [len(cut.keep) for cut in plan.cuts]
    assert sum(counts) == 48
    assert counts[0] != counts[1]
    assert set(range(12)) <= set(plan.cuts[0].keep)


def test_budgets_per_group_and_multiples() -> None:
    plan = prune(tiny_llama(), budget={"model.layers.1.mlp:ffn": 0.5}, multiple_of=8)
    assert [len(cut.keep) for cut in plan.cuts] == [40, 24]  # 36 lies between 32 and 40
    plan = prune(tiny_llama(), sparsity={"ffn": 0.4, "heads": 0.5}, multiple_of=16)
    assert [len(cut.keep) for cut in plan.cuts] == [2, 32, 2, 32]


def test_padding_does_not_count() -> None:
    plain, padded = tiny_llama(), tiny_llama()
    ids = token_windows(8, 16)
    wide = torch.cat([ids, torch.full((8, 5), 3)], 1)
    mask = torch.cat([torch.ones(8, 16), torch.zeros(8, 5)], 1).long()
    prune(plain, batches=[{"input_ids": ids}], scorer=Activation())
    prune(padded, batches=[{"input_ids": wide, "attention_mask": mask}], scorer=Activation())
    torch.testing.assert_close(logits(plain), logits(padded), rtol=1e-3, atol=1e-4)


@needs_stacked_experts
def test_stacked_experts_are_cut_one_by_one_from_their_weights() -> None:
    model = tiny_family("qwen3_moe")
    prefix = "model.layers.1.mlp.experts"
    groups = [
        Group(
            f"{prefix}.{expert}",
            "ffn",
            1,
            16,
            (
                Member(f"{prefix}.gate_up_proj", 1, ((0, 1), (16, 1)), "out", expert=expert),
                Member(f"{prefix}.down_proj", 2, ((0, 1),), "in", expert=expert),
            ),
        )
        for expert in (0, 2)
    ]
    before = copy.deepcopy(model.get_submodule(prefix))
    plan = prune(model, groups, scorer=Magnitude(), compensate="none", batches=[])
    after = model.get_submodule(prefix)
    for expert in range(4):
        gate_up, down = before.gate_up_proj[expert], before.down_proj[expert]
        score = gate_up.abs().sum(1)[:16] + gate_up.abs().sum(1)[16:] + down.abs().sum(0)
        keep = score.topk(12).indices.sort().values
        if expert in (0, 2):
            assert plan.cuts[expert // 2].keep == tuple(keep.tolist())
            assert int(after.down_proj[expert].any(0).sum()) == 12
            assert int(after.gate_up_proj[expert].any(1).sum()) == 24
        else:
            assert torch.equal(after.gate_up_proj[expert], gate_up)
    for options in ({"scorer": Wanda(), "compensate": "none"}, {"scorer": Magnitude()}):
        with pytest.raises(
            ValueError, match=r"the inputs of .*down_proj cannot be seen.*use Magnitude, Random or Taylor"
        ):
            prune(model, groups, **options)


def test_the_plan_holds_what_made_it_and_survives_json() -> None:
    plan = prune(tiny_llama(), seed=5, reduction=Reduction(members="readers", within="mean"))
    again = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert again == plan
    assert plan.method["scorer"] == "Wanda"
    assert plan.method["reduction"] == {"members": "readers", "within": "mean", "across": "sum"}
    assert plan.method["seed"] == 5
    assert plan.method["calibration"] == fingerprint(calibration())
    assert fingerprint(calibration()) != fingerprint(calibration(num=3))


def test_random_units_follow_the_seed() -> None:
    keeps = [prune(tiny_llama(), scorer=Random(), seed=seed, compensate="none").cuts for seed in (0, 0, 1)]
    assert keeps[0] == keeps[1] != keeps[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "Wanda with compensate='least_squares' needs calibration batches, got none"),
        ({"compensate": "bias"}, r"down_proj\.weight has no bias that could take up the mean; use compensate="),
        ({"sparsity": {"kv_groups": 0.5}}, "the model has no groups of kind 'kv_groups'; it has ffn, heads"),
        ({"sparsity": {"hidden": 0.5}}, "width pruning cuts heads, kv_groups, ffn, experts, channels, not hidden"),
        ({"sparsity": {}}, "sparsity names no kind of group"),
        ({"sparsity": {"ffn": 1.0}}, r"sparsity must be in \[0, 1\), got 1\.0 for model\.layers\.0\.mlp:ffn"),
        ({"budget": {"model.layers.7.mlp:ffn": 0.5}}, "unknown group 'model.layers.7.mlp:ffn'; did you mean"),
        ({"budget": "local"}, "budget must be uniform, global or a sparsity per group, got 'local'"),
        ({"compensate": "ls"}, "compensate must be none, bias or least_squares, got 'ls'"),
        ({"scorer": GreedyOutput(), "budget": "global"}, "GreedyOutput rates no units, so budget='global'"),
        ({"scorer": GreedyOutput(), "reduction": Reduction()}, "GreedyOutput rates units as they are; leave out"),
        ({"batches": calibration(num=1)}, "keeps 36 inputs and saw 64 calibration tokens; least squares needs"),
        ({"multiple_of": 64}, r"model\.layers\.0\.mlp:ffn has 48 units in 1 parts, so no multiple of 64 can stay"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_later_block_with_too_few_tokens_leaves_no_trace_in_the_earlier(dtype: torch.dtype) -> None:
    model = tiny_llama(layers=3).to(dtype)
    is_as_before = unchanged_since(model)
    with pytest.raises(ValueError, match="keeps 36 inputs and saw 64 calibration tokens"):  # the heads were refitted
        prune(model, sparsity={"heads": 0.5, "ffn": 0.25}, batches=calibration(num=1))
    assert is_as_before()


@pytest.mark.parametrize("scorer", [Wanda(), Taylor()], ids=repr)
def test_an_interruption_in_a_late_block_leaves_no_trace(scorer: Any) -> None:
    model = tiny_llama(layers=3)
    model(input_ids=token_windows(2, 6), labels=token_windows(2, 6)).loss.backward()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    is_as_before = unchanged_since(model)

    def stop(module: nn.Module, args: tuple[object, ...]) -> None:
        if not model.model.layers[0].mlp.down_proj.weight.all():  # the first block is cut
            raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsity={"heads": 0.5, "ffn": 0.25}, scorer=scorer)
    handle.remove()
    assert is_as_before()


def test_groups_that_share_columns_are_refused() -> None:
    model = tiny_llama()
    groups = llama_groups(model)
    kv = Group(
        "model.layers.0.self_attn",
        "kv_groups",
        0,
        2,
        (Member("model.layers.0.self_attn.o_proj.weight", 1, ((0, 16),), "in"),),
    )
    with pytest.raises(ValueError, match=r"self_attn:heads and .*self_attn:kv_groups cut the same columns of .*o_proj"):
        prune(model, [*groups, kv], sparsity={"heads": 0.5, "kv_groups": 0.5})


def prune_share(compensate: Any) -> tuple[Plan, dict[str, Tensor]]:
    """Prune with every second batch, in one of two processes."""
    model = tiny_family("gpt2")
    batches = calibration()[dist.get_rank() :: 2]
    plan = prune(model, gpt2_groups(), scorer=Fluctuation(), compensate=compensate, batches=batches)
    return plan, model.state_dict()


@pytest.mark.slow
def test_two_processes_with_half_of_the_batches_each_cut_as_one_does_with_all() -> None:
    with Processes() as processes:
        for compensate in ("least_squares", "bias"):
            model = tiny_family("gpt2")
            plan = prune(model, gpt2_groups(), scorer=Fluctuation(), compensate=compensate)
            ranks = processes.run(prune_share, compensate)
            for rank_plan, state in ranks:
                assert rank_plan.cuts == plan.cuts
                for name, value in model.state_dict().items():
                    torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_a_sparsity_that_removes_nothing_is_refused() -> None:
    model = tiny_llama()  # 2 query heads in each key/value group
    with pytest.raises(ValueError, match=r"0.4 of heads removes nothing: they come in runs of 2 .* at least 0.5"):
        prune_width(
            model,
            llama_groups(model),
            (),
            scorer=Magnitude(),
            sparsity={"heads": 0.4},
            compensate="none",
            progress=False,
        )


@pytest.mark.parametrize("budget", ["uniform", "global", {"model.layers.1.mlp:ffn": 0.0}])
def test_a_budget_that_removes_nothing_is_refused(budget: Any) -> None:
    model = tiny_llama()
    is_as_before = unchanged_since(model)
    with pytest.raises(ValueError, match="this budget removes nothing: all units of the 2 groups stay; give a higher"):
        prune(model, sparsity={"ffn": 0.0}, budget=budget)
    assert is_as_before()


def test_a_group_outside_the_blocks_is_named() -> None:
    model = tiny_llama()
    model.stem = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    members = (Member("stem.0.weight", 0, ((0, 1),), "out"), Member("stem.1.weight", 1, ((0, 1),), "in"))
    with pytest.raises(ValueError, match="stem:ffn lies in none of the repeated blocks of the model"):
        prune(model, [*llama_groups(model), Group("stem", "ffn", 0, 6, members)])
