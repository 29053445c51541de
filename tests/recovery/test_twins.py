"""Twins of batches: which weights are in force, and inputs of both models in pairs or not."""

import torch
from torch import Tensor, nn

from lightning_prune.recovery.twins import PairedGram, Twins

CPU = torch.device("cpu")


def rows(number: int, seed: int) -> Tensor:
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(seed))


def extended(inputs_TI: Tensor) -> Tensor:
    return torch.cat([inputs_TI.double(), torch.ones(len(inputs_TI), 1).double()], 1)


def test_every_batch_follows_its_twin_and_finds_its_weights() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 0.0]))
    place, dense = parameter.data, torch.tensor([1.0, 2.0])
    batches = [{"input_ids": torch.tensor([[number]])} for number in range(2)]
    twins = Twins(batches, CPU)
    twins.hold([(parameter, dense)])
    seen = []
    for batch in twins.batches:
        twins.announce(batch)
        seen.append((int(batch["input_ids"]), parameter.tolist(), twins.is_dense, twins.turn))
    assert seen == [
        (0, [1.0, 2.0], True, 1),
        (0, [1.0, 0.0], False, 1),
        (1, [1.0, 2.0], True, 2),
        (1, [1.0, 0.0], False, 2),
    ]
    twins.use_dense(True)
    twins.hold([])
    assert parameter.data.data_ptr() == place.data_ptr()


def test_inputs_of_both_models_are_paired() -> None:
    twins = Twins([], CPU)
    statistic = PairedGram(torch.zeros(1), 3, twins)
    pairs = [(rows(5, 0), rows(5, 1)), (rows(4, 2), rows(4, 3))]
    for turn, (dense, own) in enumerate(pairs):
        twins.is_dense, twins.turn = True, turn
        statistic.update(dense)
        twins.is_dense = False
        statistic.update(own)
    found = statistic.readings()
    dense_TJ, own_TJ = (extended(torch.cat(parts)) for parts in zip(*pairs, strict=True))
    assert torch.allclose(found.own_JJ, own_TJ.T @ own_TJ / 9)
    assert torch.allclose(found.cross_JJ, dense_TJ.T @ own_TJ / 9)
    assert torch.allclose(found.dense_JJ, dense_TJ.T @ dense_TJ / 9)
    assert found.num_tokens == 9
    assert found.is_paired


def test_a_layer_called_twice_is_paired_in_order() -> None:
    twins = Twins([], CPU)
    statistic = PairedGram(torch.zeros(1), 3, twins)
    dense, own = [rows(2, 0), rows(2, 1)], [rows(2, 2), rows(2, 3)]
    for is_dense, parts in ((True, dense), (False, own)):
        twins.is_dense = is_dense
        for part in parts:
            statistic.update(part)
    cross = extended(torch.cat(dense)).T @ extended(torch.cat(own)) / 4
    assert torch.allclose(statistic.readings().cross_JJ, cross)


def test_what_cannot_be_paired_counts_for_the_pruned_model_alone() -> None:
    for dense, own in (([rows(3, 0)], [rows(2, 1)]), ([], [rows(2, 1)]), ([rows(2, 0), rows(2, 2)], [rows(2, 1)])):
        twins = Twins([], CPU)
        statistic = PairedGram(torch.zeros(1), 3, twins)
        for is_dense, parts in ((True, dense), (False, own)):
            twins.is_dense = is_dense
            for part in parts:
                statistic.update(part)
        found = statistic.readings()
        own_TJ = extended(rows(2, 1))
        assert not found.is_paired
        assert torch.allclose(found.own_JJ, own_TJ.T @ own_TJ / 2)
        assert found.cross_JJ.equal(found.own_JJ)
        assert found.dense_JJ.equal(found.own_JJ)


def test_an_expert_that_only_the_dense_model_reached_is_noticed() -> None:
    twins = Twins([], CPU)
    statistic = PairedGram(torch.zeros(1), 3, twins)
    twins.is_dense, twins.turn = True, 1
    statistic.update(rows(2, 0))
    twins.turn = 2
    statistic.update(rows(2, 1))
    twins.is_dense = False
    statistic.update(rows(2, 2))
    assert not statistic.readings().is_paired


def test_without_twins_only_own_inputs_are_summed() -> None:
    statistic = PairedGram(torch.zeros(1), 3, None)
    statistic.update(rows(4, 0))
    found = statistic.readings()
    own_TJ = extended(rows(4, 0))
    assert torch.allclose(found.own_JJ, own_TJ.T @ own_TJ / 4)
    assert not found.is_paired
