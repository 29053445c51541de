"""Block influence by hand, against loops, and on a trained model."""

import math

import pytest
import torch
from torch import nn

from lightning_prune.structured.depth.influence import angular_distance, block_influence, influence, run_distance
from tests.structured.depth_models import padded_batches, sampled, stories3m, tiny_model


def test_influence_by_hand() -> None:
    before, after = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    assert influence(before, after).tolist() == pytest.approx([0.292893, 2.0], abs=1e-6)
    assert angular_distance(before, after).tolist() == pytest.approx([0.25, 1.0], abs=1e-6)
    assert angular_distance(before, 3 * before).tolist() == [0, 0]


def test_streams_in_half_precision_are_compared_in_float32() -> None:
    before = torch.full((1, 4096), 60.0, dtype=torch.float16)  # the squared norm overflows float16
    assert influence(before, before).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mamba"])
def test_influence_equals_a_loop_over_hidden_states(family: str) -> None:
    model, batches = tiny_model(family), padded_batches(2)
    captured: list[torch.Tensor] = []
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k: captured.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    last = blocks[-1].register_forward_hook(lambda m, a, o: captured.append(o[0] if isinstance(o, tuple) else o))
    sums, count = [0.0] * len(blocks), 0
    for batch in batches:
        captured.clear()
        with torch.no_grad():
            model(**batch)
        for row in range(2):
            for position in range(int(batch["attention_mask"][row].sum())):
                count += 1
                for index in range(len(blocks)):
                    a, b = captured[index][row, position].double(), captured[index + 1][row, position].double()
                    sums[index] += 1 - float(a @ b / a.norm() / b.norm())
    for handle in (*handles, last):
        handle.remove()
    assert block_influence(model, batches) == pytest.approx([value / count for value in sums], rel=1e-4)


def test_block_that_does_nothing_has_no_influence() -> None:
    model = tiny_model("llama")
    nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    values = block_influence(model, padded_batches())
    assert values[1] == pytest.approx(0, abs=1e-6)
    assert values[0] > 0.01
    assert run_distance(model, padded_batches(), 1)[1] == 0
    assert run_distance(model, padded_batches(), 2)[0] == pytest.approx(run_distance(model, padded_batches(), 1)[0])


def test_last_token_only_ignores_the_others_and_padding() -> None:
    model, batches = tiny_model("llama"), padded_batches(1)
    alone = [{"input_ids": batches[0]["input_ids"][row : row + 1, :length]} for row, length in ((0, 12), (1, 9))]
    expected = []
    for batch in alone:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        a, b = states[0][0, -1].double(), states[1][0, -1].double()
        expected.append(math.acos(float(a @ b / a.norm() / b.norm())) / math.pi)
    found = run_distance(model, batches, 1, last_token_only=True)
    assert found[0] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_errors() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="num_blocks must be between 1 and the 2 blocks"):
        run_distance(model, padded_batches(), 3)
    with pytest.raises(ValueError, match="got no calibration batches"):
        block_influence(model, [])


@pytest.mark.long
def test_golden_influence_of_the_trained_model() -> None:
    model = stories3m()
    found = block_influence(model, sampled(model, seed=1))
    assert found == pytest.approx([0.475, 0.202, 0.186, 0.214, 0.242, 0.328], rel=0.1)
    assert sorted(range(6), key=found.__getitem__)[:2] == [2, 1]
