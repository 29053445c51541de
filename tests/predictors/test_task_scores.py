import pytest
import torch
from torch import Tensor

from lightning_prune.predictors.task_scores import task_scores
from lightning_prune.structured.discovery.discover import discover
from tests.tiny_models import VOCAB, tiny_llama


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(seed))
    there = torch.ones_like(ids)
    there[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": there}


def test_units_are_scored_by_the_norm_of_what_is_read_times_that_of_who_reads() -> None:
    model = tiny_llama().eval()
    groups = discover(model, kinds=["ffn"]).of_kind("ffn")
    batches = [batch(0), batch(1)]
    found = task_scores(model, groups, batches)
    read: list[Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    with torch.no_grad():
        for one in batches:
            model(**one)
    handle.remove()
    mean_U = torch.zeros(48)
    for one, inputs_BTU in zip(batches, read, strict=True):
        for row, there_T in zip(inputs_BTU, one["attention_mask"], strict=True):
            mean_U += row[there_T.bool()].norm(dim=0) * down.weight.detach().norm(dim=0) / 6
    log_U = mean_U.log()
    torch.testing.assert_close(found[0], (log_U - log_U.mean()) / log_U.std(), rtol=1e-4, atol=1e-4)


def test_a_task_without_text_is_refused() -> None:
    model = tiny_llama().eval()
    with pytest.raises(ValueError, match="without any text"):
        task_scores(model, discover(model, kinds=["ffn"]).of_kind("ffn"), [])
