"""A model is what it was after an error or an interruption, whatever had been done to it by then."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structured.depth import replace, share
from lightning_prune.structured.depth.fuse import FuseGPT, FuseTraining
from lightning_prune.structured.depth.fusing import FusedBlock
from lightning_prune.structured.depth.methods import SLEB
from lightning_prune.structured.depth.replace import ReplaceMe
from lightning_prune.structured.depth.search import Stop
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Plan, Share
from lightning_prune.structured.in_place import cut_in_place
from lightning_prune.structured.undo import undone_on_error
from lightning_prune.structured.width import low_rank
from lightning_prune.structured.width.low_rank import RankEdit, reduce_rank_
from tests.structured.depth_models import NOTHING, llama_groups, padded_batches, shake, structure_of
from tests.structured.unchanged import unchanged_since
from tests.tiny_models import tiny_llama, token_windows


def shaken(layers: int = 4) -> Any:
    model = tiny_llama(layers=layers)
    shake(model)
    return model.train()


def interrupt(*args: object, **kwargs: object) -> Any:
    raise KeyboardInterrupt


def after(number: int, function: Any) -> Any:
    """Return the function, but interrupted at the call after so many."""
    calls: list[int] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs) if len(calls) <= number else interrupt()

    return wrapped


def test_all_that_a_block_can_change_is_undone() -> None:
    model = shaken(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(input_ids=token_windows(2, 6), labels=token_windows(2, 6)).loss.backward()
    optimizer.step()
    seen: list[int] = []
    handle = model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    is_as_before = unchanged_since(model, [optimizer])
    weight, norm = model.model.layers[0].mlp.up_proj.weight, model.model.norm.weight

    def change() -> None:
        with undone_on_error(model, [optimizer]) as undo, torch.no_grad():
            undo.keep(weight, 1, torch.tensor([3, 5]))
            weight[:, [3, 5]] = 0
            undo.keep(weight, 0, torch.tensor([1, 2]))  # overlaps with what was changed before
            weight[1:3] = 7
            undo.keep(norm)
            norm.mul_(2)
            model.eval().config.use_cache = not model.config.use_cache
            model.model.layers[1].mlp = nn.Identity()
            model.model.embed_tokens.weight = nn.Parameter(torch.zeros(1))
            model.model.layers[0].forward = interrupt
            model.model.layers[0].register_forward_pre_hook(interrupt)
            norm.requires_grad_(False).grad = None
            optimizer.state.clear()
            optimizer.param_groups[0]["lr"] = 1.0
            optimizer.param_groups[0]["params"] = [norm]
            raise MemoryError

    with pytest.raises(MemoryError):
        change()
    assert is_as_before()
    model(input_ids=token_windows(2, 6))
    handle.remove()
    model(input_ids=token_windows(2, 6))
    assert seen == [1]


def test_what_succeeds_stays() -> None:
    model = shaken(2)
    with undone_on_error(model) as undo, torch.no_grad():
        undo.keep(model.model.norm.weight)
        model.model.norm.weight.fill_(3)
    assert bool((model.model.norm.weight == 3).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replace_me_is_undone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken().to(dtype)
    is_as_before = unchanged_since(model)
    monkeypatch.setattr(replace, "make_plan", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ReplaceMe(num_blocks=1).plan(model, structure_of(llama_groups(model)), padded_batches(8))
    assert is_as_before()


def test_a_second_fusion_that_is_interrupted_undoes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken()
    is_as_before = unchanged_since(model)
    monkeypatch.setattr(FusedBlock, "merge_", after(4, FusedBlock.merge_))  # 3 neighbours, then one of 2
    method = FuseGPT(num_blocks=2, training=FuseTraining(rank=2, epochs=1))
    with pytest.raises(KeyboardInterrupt):
        method.plan(model, NOTHING, padded_batches(), progress=False)
    assert is_as_before()


def test_an_interrupted_search_leaves_no_hooks() -> None:
    model = shaken()
    is_as_before = unchanged_since(model)
    calls: list[int] = []

    def third(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    handle = model.model.embed_tokens.register_forward_hook(third)
    with pytest.raises(KeyboardInterrupt):
        SLEB(stop=Stop(count=2)).plan(model, NOTHING, padded_batches(), progress=False)
    handle.remove()
    assert is_as_before()


def test_blocks_that_began_to_share_get_their_matrices_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken()
    is_as_before = unchanged_since(model)
    monkeypatch.setattr(share, "set_factors", after(1, share.set_factors))
    with pytest.raises(KeyboardInterrupt):
        share.share_blocks(model, (Share(1, 0, 2), Share(2, 0, 2)), width=32)
    assert is_as_before()


def test_ranks_that_were_lowered_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(2)
    is_as_before = unchanged_since(model)
    monkeypatch.setattr(low_rank, "_write", after(1, low_rank._write))
    with pytest.raises(KeyboardInterrupt):
        reduce_rank_(model, [RankEdit(weights="*.mlp.down_proj.weight", share=0.2)], progress=False)
    assert is_as_before()


def test_a_cut_in_place_is_undone_in_model_and_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = shaken(3), token_windows(2, 6)
    names = {n for n, _ in model.named_parameters() if "mlp" in n}
    one = torch.optim.AdamW([p for n, p in model.named_parameters() if n in names], lr=1e-2)
    two = torch.optim.SGD([p for n, p in model.named_parameters() if n not in names], lr=1e-2, momentum=0.9)
    model(input_ids=ids, labels=ids).loss.backward()
    one.step()
    two.step()
    groups = discover(model).of_kind("ffn")
    plan = Plan(cuts=tuple(Cut(g.key, tuple(range(24))) for g in groups), layers=(0, 2))
    is_as_before = unchanged_since(model, (one, two))
    from lightning_prune.structured import in_place

    monkeypatch.setattr(in_place, "_repoint", after(1, in_place._repoint))
    with pytest.raises(KeyboardInterrupt):
        cut_in_place(model, plan, [one, two])
    assert is_as_before()
    assert len(model.model.layers) == 3
    with pytest.raises(ValueError, match="DataParallel cannot follow"):
        monkeypatch.undo()
        cut_in_place(model, plan, [one, two], wrapper=nn.DataParallel(model))
    assert is_as_before()
