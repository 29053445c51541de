"""One suite over all scorers; it finds a new one by its file and asks of it what every scorer must do."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_prune import NM, Block, Once, Sparsifier, Unstructured
from lightning_prune.base import registry
from lightning_prune.base.types import Granularity, Scorer, Stats, Target
from lightning_prune.targets.targets import Targets
from tests.loops import adamw, batches
from tests.tiny_models import tiny_llama, token_windows

ENTRIES = registry.entries("scorers")
RECIPES = Path(__file__).parents[2] / "recipes"
HALF = Once(sparsity=0.5)

every_scorer = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def seen(scorer: Scorer, dtype: torch.dtype = torch.float32, rows: int = 6, cols: int = 8) -> tuple[Target, Stats]:
    """Return a target and what two steps and two passes show of it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    values: dict[str, Tensor] = {}
    for name, options in scorer.needs.items():
        statistic: Any = registry.statistic(name)(weight, cols, **options)
        for _ in range(2):
            if statistic.source == "input":
                statistic.update(torch.randn(5, cols, generator=generator).to(dtype))
            else:
                statistic.update(weight, torch.randn(rows, cols, generator=generator).to(dtype))
        values[name] = statistic.compute()
    return Target(name="w", weight_OI=weight, row_start=0, num_rows=rows), Stats(values, step=2, seed=0)


def test_all_files_are_found() -> None:
    files = {path.stem for path in (Path(inspect.getfile(Scorer)).parents[1] / "scorers").glob("[!_]*.py")}
    assert {entry.name for entry in ENTRIES} == files
    assert len(ENTRIES) >= 6


@every_scorer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_score_has_the_shape_of_the_weight_in_float32(entry: registry.Entry, dtype: torch.dtype) -> None:
    scorer = entry.cls()
    target, stats = seen(scorer, dtype)
    score = scorer.score(target, stats)
    assert score.shape == target.weight_OI.shape
    assert score.dtype == torch.float32
    assert score.device == target.weight_OI.device
    assert torch.isfinite(score).all()
    assert not score.requires_grad


@every_scorer
def test_scoring_changes_nothing_and_answers_the_same_twice(entry: registry.Entry) -> None:
    scorer = entry.cls()
    target, stats = seen(scorer)
    before = copy.deepcopy((target.weight_OI, dict(stats.values)))
    torch.manual_seed(1)
    first = scorer.score(target, stats).clone()
    torch.manual_seed(2)
    second = scorer.score(target, stats)
    assert torch.equal(first, second)
    assert torch.equal(target.weight_OI, before[0])
    assert all(torch.equal(stats[name], value) for name, value in before[1].items())


@every_scorer
def test_rows_are_scored_on_their_own(entry: registry.Entry) -> None:
    # what one process holds of a weight gets the scores it has in the whole
    scorer = entry.cls()
    target, stats = seen(scorer)
    whole = scorer.score(target, stats)
    part = Target(name="w", weight_OI=target.weight_OI[2:5], row_start=2, num_rows=target.num_rows)
    values = {name: value[2:5] if value.ndim == 2 else value for name, value in stats.values.items()}
    assert torch.equal(scorer.score(part, Stats(values, stats.step, stats.seed)), whole[2:5])


@every_scorer
def test_options_are_frozen_and_give_the_same_scorer_back(entry: registry.Entry) -> None:
    scorer = entry.cls()
    with pytest.raises(AttributeError):
        scorer.scope = "row"
    assert scorer == entry.cls()
    assert scorer.scope in ("row", "tensor", "global")
    for scope in ("row", "tensor", "global"):
        assert entry.cls(scope=scope).scope == scope


@every_scorer
@pytest.mark.parametrize(
    "granularity", [Unstructured(), NM(n=2, m=4), NM(n=4, m=8), Block(rows=4, cols=4), Block(rows=1, cols=8)], ids=repr
)
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_every_granularity_and_scope_prunes_half_while_training(
    entry: registry.Entry, granularity: Granularity, scope: str
) -> None:
    if isinstance(granularity, NM) and scope == "global":
        with pytest.raises(ValueError, match="scope: global has no effect under N:M"):
            Sparsifier(schedule=HALF, scorer=entry.cls(scope=scope), granularity=granularity)
        return
    model = tiny_llama()
    conductor = Sparsifier(schedule=Once(sparsity=0.5, at=1), scorer=entry.cls(scope=scope), granularity=granularity)
    optimizer = adamw(model)
    conductor.attach(model, [optimizer], total_steps=2)
    for ids in batches(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = dict(conductor.masks)
    conductor.detach()
    num_pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert num_pruned == sum(mask.numel() for mask in masks.values()) // 2
    for name, mask in masks.items():
        assert not model.get_parameter(name).detach()[~mask].any()
        check_shape(mask, granularity)


def check_shape(mask: Tensor, granularity: Granularity) -> None:
    """Check that the holes of a mask have the shape asked for."""
    if isinstance(granularity, NM):
        assert (mask.reshape(-1, granularity.m).sum(1) == granularity.n).all()
    if isinstance(granularity, Block):
        rows, cols = granularity.rows, granularity.cols
        blocks = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // cols, cols)
        assert torch.equal(blocks.all(dim=(1, 3)), blocks.any(dim=(1, 3)))


@every_scorer
def test_pruning_once_answers_the_same_twice(entry: registry.Entry) -> None:
    ids = [{"input_ids": token_windows(2, 8, seed=seed)} for seed in range(2)]
    runs = []
    for _ in range(2):
        conductor = Sparsifier(schedule=HALF, scorer=entry.cls())
        assert conductor.prune_once(tiny_llama(), ids, progress=False).sparsity == 0.5
        runs.append(conductor.masks)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@every_scorer
def test_a_layer_of_zeros_is_pruned_without_complaint(entry: registry.Entry) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    nn.init.zeros_(model[0].weight)
    conductor = Sparsifier(
        schedule=Once(sparsity=0.5, at=1), scorer=entry.cls(), targets=Targets(include=("*.weight",))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    conductor.attach(model, [optimizer], total_steps=1)
    inputs_BN = torch.randn(5, 8)
    (model[0](inputs_BN) + model[1](inputs_BN)).square().sum().backward()
    optimizer.step()
    assert {name: int(mask.sum()) for name, mask in conductor.masks.items()} == {"0.weight": 16, "1.weight": 16}
    conductor.detach()


@every_scorer
def test_the_file_is_a_method_card(entry: registry.Entry) -> None:
    card = inspect.getdoc(inspect.getmodule(entry.cls)) or ""
    assert re.search(r"arXiv \d{4}\.\d{5}", entry.source)
    for line in ("Source:", "Default scope:", "Cost:", "Limits:"):
        assert re.search(f"^{line} ", card, re.M), f"{entry.name} lacks the line {line}"
    assert entry.summary.endswith(".")


@every_scorer
def test_a_recipe_uses_it(entry: registry.Entry) -> None:
    used = set()
    for path in RECIPES.rglob("*.yaml"):
        scorer = (yaml.safe_load(path.read_text()).get("prune") or {}).get("scorer")
        used.add(scorer["class_path"] if isinstance(scorer, dict) else scorer)
    assert entry.cls.__name__ in used
