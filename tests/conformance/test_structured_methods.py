"""What every structured method must keep, on the families it works on.

The same plan twice; a plan that survives JSON and a fresh parent; a smaller model that computes what the masked one
does, loads with the stock class, and generates the same with and without cache.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_prune.integrations.per_layer.per_layer_build import build_per_layer
from lightning_prune.scorers.activation import Activation
from lightning_prune.scorers.fluctuation import Fluctuation
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.random import Random
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import GreedyOutput
from lightning_prune.structured import Plan, Width, discover, shrink
from lightning_prune.structured.depth.fuse import FuseGPT, FuseTraining
from lightning_prune.structured.depth.methods import SLEB, BlockPruner, FinerCut, MambaShedder, RemoveTail, ShortGPT
from lightning_prune.structured.depth.replace import ReplaceMe
from lightning_prune.structured.depth.search import Stop
from lightning_prune.structured.depth.share import FlexiGPT
from lightning_prune.structured.method import StructuredMethod
from tests.structured.families import build, randomised
from tests.tiny_models import token_windows

BATCHES = [{"input_ids": ids_NT} for ids_NT in token_windows(24, 16, seed=4).split(6)]
ONE = Stop(count=1)
FAMILIES = (
    "llama",
    "llama, biased, untied",
    "llama, one key/value head",
    "qwen2",
    "mistral",
    "gpt_neox",
    "gpt2",
    "opt",
)
QUICK = ("llama", "gpt2", "opt")  # on the others only one method runs by default
EVERYWHERE: dict[str, StructuredMethod] = {
    "Wanda + least squares": Width(sparsity={"ffn": 0.25}, scorer=Wanda()),
    "ShortGPT": ShortGPT(num_blocks=1),
    "SLEB": SLEB(stop=ONE, protect_first=0, protect_last=0),
    "tail": RemoveTail(num_blocks=1),
    "ReplaceMe": ReplaceMe(num_blocks=1),
    "FuseGPT": FuseGPT(num_blocks=1, training=FuseTraining(rank=2, epochs=2)),
    "FlexiGPT": FlexiGPT(num_blocks=1, rank=2),
    "BlockPruner": BlockPruner(stop=ONE),
    "FinerCut": FinerCut(stop=ONE),
}
ON_LLAMA: dict[str, StructuredMethod] = {
    f"{type(scorer).__name__} {compensate}": Width(
        sparsity={"ffn": 0.25, "heads": 0.5}, scorer=scorer, compensate=compensate, seed=3
    )
    for scorer in (Random(), Magnitude(), Taylor(), Wanda(), Activation(), Fluctuation(), GreedyOutput())
    for compensate in ("none", "least_squares")
}
CASES = [
    pytest.param(family, name, marks=() if family in QUICK or name.startswith("Wanda") else pytest.mark.slow)
    for family in FAMILIES
    for name in EVERYWHERE
]
CASES += [pytest.param("llama", name) for name in ON_LLAMA]
CASES.append(pytest.param("mamba", "Mamba-Shedder"))
METHODS = EVERYWHERE | ON_LLAMA | {"Mamba-Shedder": MambaShedder(stop=ONE)}


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_a_method_keeps_what_it_must(family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    method = METHODS[name]
    models = [randomised(build(family)) for _ in range(3)]
    structure = discover(models[0])
    plans = [method.plan(model, structure, BATCHES, progress=False) for model in models[:2]]
    assert plans[0] == plans[1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    plan = Plan.from_dict(json.loads(json.dumps(plans[0].as_dict())))
    assert plan.cuts or plan.layers is not None or plan.skip or plan.share

    is_per_layer = bool(plan.skip or plan.share)
    make = build_per_layer if is_per_layer else lambda model, structure, plan: shrink(model, plan, structure=structure)
    small = make(models[0], structure, plan)  # compares with the masked model by itself
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in models[0].parameters())
    if not method.repairs:
        again = make(models[2], structure, plan)
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))

    small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=is_per_layer).eval()
    ids_NT = token_windows(2, 8, seed=9).clamp_min(4)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids_NT).logits, small(input_ids=ids_NT).logits)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = loaded.generate(ids_NT, **options)
    assert torch.equal(cached, loaded.generate(ids_NT, use_cache=False, **options))
