"""Activations by sequence: the golden value, padding, ranks against batches."""

import pytest
import torch
from torch import nn

from lightning_prune import Targets
from lightning_prune.calibration import hooks
from lightning_prune.statistics.activation import Activation
from lightning_prune.statistics.input_norm import InputNorm
from tests.tiny_models import tiny_llama, token_windows

INPUT_BTI = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[0.0, 4.0], [2.0, -2.0]]])


def observe(model: nn.Module, kind: type[Activation | InputNorm] = Activation) -> dict[str, Activation | InputNorm]:
    bindings = Targets().resolve(model)
    statistics = {binding.name: kind(binding.parameter.detach(), binding.shape_OI[1]) for binding in bindings}
    hooks.observe_inputs(model, [(each, statistics[each.name]) for each in bindings], only_training=False)
    return statistics


def test_golden_value_of_l2_over_sequences_of_the_mean() -> None:
    # sequence means of |x|: (2, 1) and (1, 3); roots of 2^2 + 1^2 and 1^2 + 3^2
    activation = Activation(torch.ones(1, 2), 2)
    for input_TI in INPUT_BTI:
        activation.update(input_TI)
    torch.testing.assert_close(activation.compute(), torch.tensor([2.236068, 3.162278]))
    assert activation.compute().dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 2, 2)])
def test_a_layer_shows_its_sequences(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(2, 3)
    model = nn.Sequential(layer, nn.Linear(3, 2))
    statistics = observe(model)
    model(INPUT_BTI.reshape(shape))
    torch.testing.assert_close(statistics["0.weight"].compute(), torch.tensor([2.236068, 3.162278]))


def test_flat_inputs_are_one_sequence() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    statistics = observe(model)
    model(INPUT_BTI.reshape(4, 2))
    torch.testing.assert_close(statistics["0.weight"].compute(), torch.tensor([1.5, 2.0]))
    model(INPUT_BTI[:, :0].reshape(0, 2))  # an expert without tokens
    torch.testing.assert_close(statistics["0.weight"].compute(), torch.tensor([1.5, 2.0]))


def test_padding_is_no_part_of_a_sequence() -> None:
    ids = token_windows(3, 8)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 5:] = 0
    attention_mask[2] = 0  # an empty sequence counts for nothing
    model = tiny_llama()
    together, alone = observe(model), observe(model)
    num_seen = [0]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=attention_mask)
        first = {name: each.compute().clone() for name, each in together.items()}
        for each in alone.values():
            each.reset()
        model(input_ids=ids[:1, :5])
        model(input_ids=ids[1:2])
    num_seen = [int(each.num_sequences) for each in alone.values() if isinstance(each, Activation)]
    assert set(num_seen) == {2}
    for name, value in first.items():
        torch.testing.assert_close(alone[name].compute(), value, rtol=1e-4, atol=1e-6)


def test_two_ranks_of_one_sequence_equal_one_rank_of_two() -> None:
    whole = Activation(torch.ones(1, 2), 2)
    ranks = [Activation(torch.ones(1, 2), 2) for _ in INPUT_BTI]
    for rank, input_TI in zip(ranks, INPUT_BTI, strict=True):
        whole.update(input_TI)
        rank.update(input_TI)
    merged = whole._reductions["sum_of_squared_means"](torch.stack([rank.sum_of_squared_means for rank in ranks]))
    assert torch.equal(merged.sqrt().float(), whole.compute())


def test_other_statistics_still_get_all_tokens_in_one_call() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    statistics = observe(model, InputNorm)
    model(INPUT_BTI)
    assert statistics["0.weight"]._update_count == 1
    torch.testing.assert_close(statistics["0.weight"].compute(), torch.tensor([14.0, 24.0]).sqrt())


def test_large_inputs_in_low_precision_do_not_overflow() -> None:
    activation = Activation(torch.ones(1, 1), 1)
    activation.update(torch.full((1000, 1), 4096.0, dtype=torch.float16))
    assert float(activation.compute()) == 4096.0
