"""Width pruning of a trained model: the perplexities that independent code measured before."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_prune.scorers.random import Random
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import GreedyOutput, OutputEnergy
from lightning_prune.structured.width.block_by_block import prune_width
from tests.structured.llama_groups import llama_groups

DATA = os.environ.get("LIGHTNING_PRUNE_DATA", "")


@pytest.fixture(scope="module")
def trained() -> tuple[Callable[[], PreTrainedModel], list[dict[str, Tensor]], Tensor]:
    """Return how to load the trained model, and its own samples: 128 sequences to calibrate on, 128 to test on."""
    if not DATA:
        pytest.skip("LIGHTNING_PRUNE_DATA names no folder with the trained models")

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(f"{DATA}/models/stories3M").eval()

    model, samples = load(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        start = torch.full((128, 1), model.config.bos_token_id)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_length": 128, "min_length": 128}
        ids = model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **options)
        samples.append(ids)
    return load, [{"input_ids": ids} for ids in samples[0].split(16)], samples[1]


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    losses = [model(input_ids=part, labels=part).loss for part in ids.split(16)]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.long
def test_perplexities_of_a_trained_model_are_the_measured_ones(trained: Any) -> None:
    # measured before by independent code, on other samples of the same model; dense 3.62
    load, batches, test_ids = trained
    assert perplexity(load(), test_ids) == pytest.approx(3.62, rel=0.03)
    expected = {
        ("ffn", 0.25, Wanda(), "none"): 10.2,
        ("ffn", 0.25, Wanda(), "least_squares"): 6.92,
        ("ffn", 0.25, GreedyOutput(), "least_squares"): 6.85,
        ("ffn", 0.25, Random(), "none"): 25.7,
        ("ffn", 0.25, Random(), "least_squares"): 8.70,
        ("heads", 1 / 3, OutputEnergy(), "none"): 13.1,
        ("heads", 1 / 3, OutputEnergy(), "least_squares"): 4.81,
    }
    measured = {}
    for case in expected:
        kind, sparsity, scorer, compensate = case
        model = load()
        options = {"scorer": scorer, "sparsity": {kind: sparsity}, "compensate": compensate, "progress": False}
        prune_width(model, llama_groups(model), batches, **options)  # type: ignore[arg-type]
        measured[case] = perplexity(model, test_ids)
    assert measured == {case: pytest.approx(value, rel=0.1) for case, value in expected.items()}
    assert sorted(measured, key=measured.get) == sorted(expected, key=expected.get)  # type: ignore[arg-type]
