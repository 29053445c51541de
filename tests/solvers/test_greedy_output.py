"""Units by output error: against brute force over refits, twins, heads, parts."""

import pytest
import torch
from torch import Tensor

from lightning_prune.solvers.greedy_output import GreedyOutput, greedy_units, output_energy
from lightning_prune.solvers.least_squares import least_squares

EXACT = GreedyOutput(damping=1e-9)


def draw(num_inputs: int = 8) -> tuple[Tensor, Tensor]:
    """Return correlated inputs and weights."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(num_inputs, num_inputs, generator=generator).double()
    inputs = torch.randn(100, num_inputs, generator=generator).double() @ mix
    return inputs, torch.randn(5, num_inputs, generator=generator).double()


def loss_after_refit(inputs: Tensor, weight: Tensor, removed: set[int], size: int = 1) -> float:
    """Return the squared output error that is left when units are removed and the rest is refitted."""
    keep = [index for index in range(weight.shape[1]) if index // size not in removed]
    refit = least_squares(weight, inputs.T @ inputs, keep, 0.0)
    return float((inputs @ weight.T - inputs[:, keep] @ refit.T).square().sum())


def brute_force(inputs: Tensor, weight: Tensor, num: int, size: int = 1) -> list[int]:
    removed: list[int] = []
    for _ in range(num):
        left = [unit for unit in range(weight.shape[1] // size) if unit not in removed]
        removed.append(min(left, key=lambda unit: loss_after_refit(inputs, weight, {*removed, unit}, size)))
    return removed


@pytest.mark.parametrize("size", [1, 2])
def test_energy_is_the_squared_output_of_the_unit_alone(size: int) -> None:
    inputs, weight = draw()
    expected = [
        float((inputs[:, start : start + size] @ weight[:, start : start + size].T).square().sum())
        for start in range(0, 8, size)
    ]
    ours = output_energy(weight.float(), inputs.T @ inputs, size=size)
    torch.testing.assert_close(ours, torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("num_inputs", "size"), [(8, 1), (8, 2), (12, 3)])
@pytest.mark.parametrize("batch", [1, 16])
def test_one_at_a_time_it_is_brute_force(num_inputs: int, size: int, batch: int) -> None:
    inputs, weight = draw(num_inputs)
    options = GreedyOutput(damping=1e-9, batch=batch)  # a pool of 32 holds all, so it is exact too
    ours = greedy_units(weight, inputs.T @ inputs, 3, options, size=size)
    assert ours == brute_force(inputs, weight, 3, size)


def test_pools_smaller_than_the_layer_still_find_good_units() -> None:
    inputs, weight = draw(40)
    ours = greedy_units(weight, inputs.T @ inputs, 12, GreedyOutput(damping=1e-9, batch=4))
    best = brute_force(inputs, weight, 12)
    assert len(set(ours)) == 12
    assert loss_after_refit(inputs, weight, set(ours)) < 1.1 * loss_after_refit(inputs, weight, set(best))


@pytest.mark.parametrize("batch", [1, 16])
def test_of_twins_only_one_goes_and_it_costs_nothing(batch: int) -> None:
    inputs, weight = draw()
    inputs[:, 6] = inputs[:, 2]
    weight[:, 6] = 100.0  # large, and still redundant
    removed = greedy_units(weight, inputs.T @ inputs, 2, GreedyOutput(damping=1e-9, batch=batch))
    assert removed[0] in (2, 6)
    assert removed[1] not in (2, 6)
    assert loss_after_refit(inputs, weight, {removed[0]}) < 1e-6


def test_equally_many_go_from_every_part() -> None:
    inputs, weight = draw(12)
    weight[:, :6] *= 1e-3  # freely chosen, all would come from the first half
    gram = inputs.T @ inputs
    assert set(greedy_units(weight, gram, 4, EXACT)) <= set(range(6))
    removed: list[int] = []
    while len(removed) < 4:
        halves = [unit // 6 for unit in removed]
        left = [unit for unit in range(12) if unit not in removed and halves.count(unit // 6) < 2]
        removed.append(min(left, key=lambda unit: loss_after_refit(inputs, weight, {*removed, unit})))
    for batch in (1, 16):
        assert greedy_units(weight, gram, 4, GreedyOutput(damping=1e-9, batch=batch), num_parts=2) == removed


def test_a_dead_input_goes_first_and_nothing_is_changed() -> None:
    inputs, weight = draw()
    inputs[:, 5] = 0
    gram, before = inputs.T @ inputs, weight.clone()
    copy = gram.clone()
    assert greedy_units(weight, gram, 1, EXACT) == [5]
    assert torch.equal(gram, copy)
    assert torch.equal(weight, before)
    assert greedy_units(weight, gram, 0, EXACT) == []


def test_what_is_wrong_is_refused() -> None:
    inputs, weight = draw()
    gram = inputs.T @ inputs
    with pytest.raises(ValueError, match="cannot remove 3 of 8 units in 2 equal parts; give a multiple of 2"):
        greedy_units(weight, gram, 3, EXACT, num_parts=2)
    with pytest.raises(ValueError, match="cannot remove 8 of 8 units"):
        greedy_units(weight, gram, 8, EXACT)
    with pytest.raises(ValueError, match=r"8 input columns, a Gram matrix of shape \(8, 8\) and units of 3 columns do"):
        output_energy(weight, gram, size=3)
    with pytest.raises(ValueError, match=r"not positive definite with damping 0\.001; raise it"):
        greedy_units(weight, gram * torch.nan, 1, GreedyOutput())
    with pytest.raises(ValueError, match=r"batch must be >= 1 and damping > 0, got 0 and 0\.001"):
        GreedyOutput(batch=0)
