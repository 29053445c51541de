"""Masked units are cut out of a copy, however the model is held; the model itself is as before."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lightning_prune.base import distributed
from lightning_prune.structured.cut_zeros import check_masks_cut_units, cut_zeros
from lightning_prune.targets.targets import Targets
from tests.processes import Processes
from tests.tiny_models import tiny_llama, token_windows

IDS_NT = token_windows(2, 8)


def masked_llama() -> PreTrainedModel:
    model = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, 12:24] = 0
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(input_ids=IDS_NT).logits
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_is_smaller_and_the_model_unchanged(dtype: torch.dtype) -> None:
    model = masked_llama().to(dtype).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    small, plan = cut_zeros(model, model.state_dict())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert [cut.keep for cut in plan.cuts] == [(*range(12), *range(24, 48))] * 2
    assert small.config.intermediate_size == 36
    assert model.config.intermediate_size == 48
    assert model.training
    assert {value.dtype for value in small.state_dict().values()} == {dtype}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scale = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(logits(small), logits(model.eval()), rtol=0, atol=scale)


def test_a_compiled_model_is_cut_too() -> None:
    model = masked_llama()
    expected = logits(model)
    model.compile(backend="eager")
    small, _ = cut_zeros(model, model.state_dict())
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-6)
    check_masks_cut_units(model, Targets(include=("*.q_proj.weight",)).resolve(model), 1)  # not told before the end


@pytest.mark.parametrize(
    ("targets", "width", "message"),
    [
        ("*.q_proj.weight", 1, r"cut what masks on model.layers.0.self_attn.q_proj.weight leave behind: it reads no"),
        ("*.o_proj.weight", 4, r"are 8 columns wide, masks of granularity Channel 4; set prune.granularity.width to 8"),
    ],
)
def test_masks_that_cut_no_units_are_refused(targets: str, width: int, message: str) -> None:
    model = tiny_llama()
    check_masks_cut_units(model, Targets(include=("*.down_proj.weight",)).resolve(model), width)
    with pytest.raises(ValueError, match=message):
        check_masks_cut_units(model, Targets(include=(targets,)).resolve(model), width)


def cut_sharded() -> tuple[int, Tensor]:
    """Cut a model that is sharded over two processes."""
    model = masked_llama()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    check_masks_cut_units(model, Targets(include=("*.down_proj.weight",)).resolve(model), 1)
    small, _ = cut_zeros(model, distributed.whole_state_dict(model))
    return small.config.intermediate_size, logits(small)


@pytest.mark.slow
def test_a_sharded_model_is_cut_whole() -> None:
    expected = logits(masked_llama())
    with Processes() as processes:
        for width, values in processes.run(cut_sharded):
            assert width == 36
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
