"""What two forms of a model are run on, and how."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import (
    WeightsChangeError,
    first_row,
    guarded_outputs,
    outputs,
    reached,
    skipping,
    told,
)
from tests.tiny_models import tiny_llama


class Block(nn.Module):
    """Adds one, and returns it bare, first of two, or in a dictionary."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, hidden: Tensor) -> Any:
        return {"bare": hidden + 1, "pair": (hidden + 1, "cache"), "named": {"hidden": hidden + 1}}[self.form]


def test_a_block_that_is_passed_over_gives_its_input_in_the_form_of_its_output() -> None:
    hidden = torch.tensor([2.0])
    bare, pair, named = Block("bare"), Block("pair"), Block("named")
    with skipping([bare, pair, named]):
        assert torch.equal(bare(hidden), hidden)
        assert torch.equal(bare(hidden=hidden), hidden)
        first, second = pair(hidden)
        assert torch.equal(first, hidden)
        assert second == "cache"
        with pytest.raises(ValueError, match="Block returns dict, so it cannot be passed over"):
            named(hidden)
    assert torch.equal(bare(hidden), hidden + 1)
    assert torch.equal(pair(hidden)[0], hidden + 1)


def test_what_a_trainer_puts_around_a_model_is_looked_through() -> None:
    model = tiny_llama()
    ids = {"input_ids": torch.arange(8)[None]}
    expected = outputs(model, ids)

    def forward(**batch: Tensor) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return type(model).forward(model, **batch)

    model.forward = forward
    assert torch.equal(outputs(model, ids), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(outputs(model, ids), expected)
    assert model.forward is forward


class Rescaled(nn.Module):
    """Halves its weight whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, hidden: Tensor) -> Tensor:
        self.weight.data.div_(2)
        return hidden * self.weight


def test_weights_that_would_change_in_a_run_have_not() -> None:
    model = Rescaled()
    with pytest.raises(WeightsChangeError, match="Rescaled changes weight while it runs"):
        guarded_outputs(model, {"hidden": torch.ones(1, 2)})
    assert torch.equal(model.weight, torch.ones(2))
    linear = nn.Linear(2, 2)
    given = {"input": torch.ones(1, 2)}
    assert torch.equal(guarded_outputs(linear, given), outputs(linear, given))


@pytest.mark.parametrize("training", [True, False])
def test_models_that_rescale_themselves_are_refused_and_stay_as_they_were(training: bool) -> None:
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=3, context_length=64, rescale_every=1
    )
    model = RwkvForCausalLM(config).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="rescale_every: 0 in RWKV"):
        discover(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training == training


def test_modules_that_run_are_known() -> None:
    names = reached(tiny_llama(layers=1), [{"input_ids": torch.arange(4)[None]}])
    assert {"", "model.layers.0.mlp.up_proj", "lm_head"} <= names
    assert "model.layers" not in names  # a list is not called


def test_rows_are_taken_only_where_all_tensors_count_them() -> None:
    several = first_row({"input_ids": torch.zeros(3, 4), "mask": torch.ones(3, 4)})
    assert [tuple(value.shape) for value in several.values()] == [(1, 4), (1, 4)]
    patches = {"input_ids": torch.zeros(1, 4), "pixel_values": torch.zeros(16, 6)}
    assert first_row(patches)["pixel_values"].shape == (16, 6)


def test_errors_are_told_to_people() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.ones(2, 3) @ torch.ones(2, 3)
    for odd in (error.value, ValueError("shape mismatch"), KeyError("x"), IndexError()):
        sentence = told(odd, "Model with half of heads")
        assert sentence.startswith("Model with half of heads does not run (")
        assert "x3" not in sentence
        assert "shape" not in sentence
    assert told(ValueError("hidden_size must be\n  divisible by 3"), "Model") == "hidden_size must be divisible by 3"
    assert len(told(ValueError("names " * 2000), "Model")) < 300
