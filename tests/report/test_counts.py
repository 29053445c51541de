"""Counts, bytes and FLOPs of models small enough to count by hand."""

import json

import pytest
import torch
from torch import nn

from lightning_prune import Report, Targets
from lightning_prune.base.types import TargetReport
from lightning_prune.report.counts import measure
from tests.tiny_models import needs_stacked_experts, tiny_family, tiny_llama, tiny_mlp


def measured(model: nn.Module, *include: str) -> Report:
    return measure(model, Targets(include=include).resolve(model), step=7, notes=["a note"])


def test_an_mlp_by_hand() -> None:
    model = tiny_mlp()  # 8 -> 16 -> 4, so 128 + 16 + 64 + 4 parameters
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].weight[:8] = 0.0
        model[2].weight[0, :3] = -0.0
        model[2].bias[0] = 0.0
    report = measured(model, "*")
    assert report.targets == (
        TargetReport(name="0.weight", shape=(16, 8), num_weights=128, num_zeros=64),
        TargetReport(name="2.weight", shape=(4, 16), num_weights=64, num_zeros=3),
    )
    assert [target.sparsity for target in report.targets] == [0.5, 3 / 64]
    assert report.sparsity == 67 / 192
    assert report.num_parameters == 212
    assert report.num_nonzeros == 212 - 64 - 3 - 1
    assert report.model_sparsity == pytest.approx(68 / 212)
    assert (report.num_bytes, report.num_bytes_nonzero) == (4 * 212, 4 * 144)
    assert (report.flops_per_token, report.flops_per_token_nonzero) == (2 * 192, 2 * 125)
    assert report.step == 7
    assert report.notes == ("a note",)


def test_the_plain_form_is_json_and_the_metrics_are_numbers() -> None:
    report = measured(tiny_mlp(), "*")
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["targets"][0] == {
        "name": "0.weight",
        "shape": [16, 8],
        "num_weights": 128,
        "num_zeros": 0,
        "sparsity": 0.0,
    }
    assert (plain["step"], plain["notes"], plain["num_parameters"]) == (7, ["a note"], 212)
    metrics = report.metrics()
    assert metrics["prune/num_nonzeros"] == 212.0
    assert metrics["prune/sparsity/2.weight"] == 0.0
    assert all(type(value) is float and name.startswith("prune/") for name, value in metrics.items())


def test_bytes_follow_the_dtype() -> None:
    model = tiny_mlp().bfloat16()
    model[2].double()
    assert measured(model).num_bytes == 2 * (128 + 16) + 8 * (64 + 4)


def test_tied_weights_are_stored_once_and_multiplied_with() -> None:
    tied, untied = measured(tiny_llama(tied=True)), measured(tiny_llama(tied=False))
    assert untied.num_parameters - tied.num_parameters == 64 * 32
    # two layers of q 32x32, k and v 16x32, o 32x32, gate, up and down 48x32; head 64x32
    by_hand = 2 * (2 * (3 * 1024 + 3 * 48 * 32) + 64 * 32)
    assert tied.flops_per_token == untied.flops_per_token == by_hand


def test_transposed_layers_count_like_others() -> None:
    blocks = 2 * 2 * 32 * (96 + 32 + 128 + 128)
    assert measured(tiny_family("gpt2")).flops_per_token == blocks + 2 * 64 * 32


@needs_stacked_experts
def test_only_the_experts_a_token_passes_count() -> None:
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32
    two_of_four_experts = (4 * 32 * 32 + 4 * 32 * 16) // 2
    report = measured(tiny_family("qwen3_moe"))
    assert report.flops_per_token == 2 * (2 * (attention + two_of_four_experts) + 64 * 32)


def test_nothing_divides_by_zero() -> None:
    empty = Report(
        step=0,
        targets=(TargetReport(name="w", shape=(0, 2), num_weights=0, num_zeros=0),),
        num_parameters=0,
        num_nonzeros=0,
        num_bytes=0,
        num_bytes_nonzero=0,
        flops_per_token=0,
        flops_per_token_nonzero=0,
    )
    assert (empty.sparsity, empty.model_sparsity, empty.targets[0].sparsity) == (0.0, 0.0, 0.0)
