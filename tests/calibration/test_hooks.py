"""What is hooked into torch: inputs are seen once and without padding, gradients of pruned weights are zero."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import Targets
from lightning_prune.calibration import hooks
from lightning_prune.statistics.input_norm import InputNorm
from tests.tiny_models import recompute_activations, tiny_family, tiny_llama, token_windows


def observed(model: nn.Module, **options: Any) -> tuple[dict[str, InputNorm], list[Any]]:
    """Observe all linear layers of a model."""
    bindings = Targets(include=("*",) if isinstance(model, nn.Sequential) else ()).resolve(model)
    statistics = {b.name: InputNorm(b.parameter.detach(), b.shape_OI[1]) for b in bindings}
    feeds = [(binding, statistics[binding.name]) for binding in bindings]
    return statistics, hooks.observe_inputs(model, feeds, **({"only_training": False} | options))


def counts(statistics: dict[str, InputNorm]) -> set[int]:
    return {int(statistic.num_tokens) for statistic in statistics.values()}


def test_inputs_are_those_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    statistics, _ = observed(model)
    inputs = torch.randn(2, 5, 3)
    model(inputs)
    torch.testing.assert_close(statistics["0.weight"].compute(), inputs.reshape(-1, 3).norm(dim=0))
    hidden = model[1](model[0](inputs)).detach()
    torch.testing.assert_close(statistics["2.weight"].compute(), hidden.reshape(-1, 4).norm(dim=0))


def test_padding_is_left_out() -> None:
    model = tiny_llama()
    statistics, handles = observed(model)
    ids = token_windows(3, 8)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 5:] = 0
    attention_mask[2, 1:] = 0
    with torch.no_grad():
        model(input_ids=ids, attention_mask=attention_mask)
    assert counts(statistics) == {5 + 8 + 1}
    for handle in handles:
        handle.remove()
    # Causal, padded on the right: the same norms as the three sequences alone, each of its own length.
    alone, _ = observed(model)
    with torch.no_grad():
        for row, length in zip(ids, (5, 8, 1), strict=True):
            model(input_ids=row[None, :length])
    for name, statistic in alone.items():
        torch.testing.assert_close(statistics[name].compute(), statistic.compute(), rtol=1e-4, atol=1e-5)


def test_the_mask_of_one_call_does_not_reach_into_the_next() -> None:
    model = tiny_llama()
    statistics, _ = observed(model)
    ids = token_windows(2, 8)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 2:] = 0
    with torch.no_grad():
        model(ids, attention_mask)  # by position
        model(ids)
    assert counts(statistics) == {10 + 16}


def test_a_mask_of_four_dimensions_is_no_padding_mask() -> None:
    model = tiny_llama()
    statistics, _ = observed(model)
    ids = token_windows(1, 4)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())
    assert counts(statistics) == {4}


def test_a_batch_shows_its_mask_also_where_the_model_inside_gets_none() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.inner(batch["input_ids"]).logits  # causal: on the right, padding needs no mask

    model = Outer()
    statistics, _ = observed(model)
    attention_mask = torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad():
        model({"input_ids": token_windows(1, 4), "attention_mask": attention_mask})
    assert counts(statistics) == {3}


def test_recomputed_activations_are_not_counted_twice() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, inputs: Tensor) -> Tensor:
            for layer in self.layers:
                inputs = checkpoint(layer, inputs, use_reentrant=False)
            return inputs

    model = Checkpointed()
    statistics, _ = observed(model)
    model(torch.randn(7, 3)).sum().backward()
    assert counts(statistics) == {7}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_a_model_is_not_counted_twice(use_reentrant: bool) -> None:
    model = tiny_llama()
    recompute_activations(model, use_reentrant=use_reentrant)
    model.train()
    statistics, _ = observed(model, only_training=True)
    ids = token_windows(2, 6)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counts(statistics) == {12}


def test_passes_count_in_training_where_gradients_are_taken_whatever_the_mode() -> None:
    model = tiny_llama().eval()
    statistics, handles = observed(model, only_training=True)
    ids = token_windows(1, 5)
    with torch.no_grad():
        model(ids)
        model.train()(ids)
    assert counts(statistics) == {0}
    model.eval()(ids)
    assert counts(statistics) == {5}
    for handle in handles:
        handle.remove()
    model(ids)
    assert counts(statistics) == {5}


def test_evaluation_beside_training_does_not_count() -> None:
    model = tiny_llama().train()
    statistics, _ = observed(model, only_training=True)
    ids = token_windows(1, 5)
    model(ids)
    model.eval()(ids)
    model.train()(ids)
    assert counts(statistics) == {10}


def test_a_copy_of_the_model_does_not_feed_the_statistics() -> None:
    model = tiny_llama()
    statistics, _ = observed(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin(token_windows(1, 5))
    assert counts(statistics) == {0}


def test_removed_handles_leave_no_hook() -> None:
    model = tiny_family("bert")
    _, handles = observed(model)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradients_of_pruned_weights_are_zero_after_every_backward() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    masks: dict[str, Tensor] = {}
    handle = hooks.mask_gradient(weight, masks, "w")
    (weight * 3).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[3.0, 3.0], [3.0, 3.0]]  # no mask yet
    masks["w"] = torch.tensor([[True, False], [False, True]])
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [[5.0, 0.0], [0.0, 5.0]]
    handle.remove()
    weight.sum().backward()
    assert weight.grad.tolist() == [[6.0, 1.0], [1.0, 6.0]]


def test_optimizers_forget_changed_weights_alone() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    hooks.clear_state(optimizer, weight, torch.tensor([[True, False], [False, False]]))
    state = optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"], torch.tensor([[0.0, 0.1], [0.1, 0.1]]))
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([[0.0, 1e-3], [1e-3, 1e-3]]))
    assert int(state["step"]) == 1


def test_a_state_that_cannot_be_zeroed_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["momentum_buffer"] = torch.ones(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"SGD keeps 'momentum_buffer' as torch\.uint8, which cannot be reset.*float"):
        hooks.clear_state(optimizer, weight, torch.ones(2, 2, dtype=torch.bool))


class Wrapper:
    """What a trainer puts around an optimizer."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def test_wrappers_around_optimizers_are_looked_through() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert hooks.unwrap_optimizer(inner) is inner
    assert hooks.unwrap_optimizer(Wrapper(Wrapper(inner))) is inner


@pytest.mark.parametrize("wrap", [lambda other: other, Wrapper])
def test_an_optimizer_that_torch_does_not_step_is_refused(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"Foreign is not stepped by torch.*train with a torch\.optim optimizer"):
        hooks.unwrap_optimizer(wrap(type("Foreign", (), {})()))
