"""Masks that cannot be chosen in training are kept, said once, and chosen as soon as there is something to go by."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Cubic, Once, Sparsifier, Targets, Unstructured
from lightning_prune.allocations.uniform import Uniform
from lightning_prune.base import distributed
from lightning_prune.calibration import observation
from lightning_prune.calibration.observation import Observation
from lightning_prune.conductor.chosen_masks import choose
from lightning_prune.conductor.decision import Decision
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from tests.tiny_models import tiny_llama, token_windows


class Rare(nn.Module):
    """Two layers, of which the second is called in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, inputs: Tensor, *, both: bool) -> Tensor:
        hidden = self.blocks[0](inputs)
        return (hidden + self.blocks[1](hidden)) if both else hidden


def train(conductor: Sparsifier, model: Rare, used: list[bool]) -> None:
    """Take one step per entry: whether the second layer is used in it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    conductor.attach(model, [optimizer], total_steps=len(used))
    for step, both in enumerate(used):
        inputs = torch.rand(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs, both=both).square().mean().backward()
        optimizer.step()
    conductor.detach()


def num_zeros(conductor: Sparsifier) -> list[int]:
    return [target.num_zeros for target in conductor.report().targets]


def test_a_part_without_tokens_is_pruned_by_what_it_saw_before_and_that_is_said_once() -> None:
    conductor = Sparsifier(schedule=Cubic(sparsity=0.5, start=2, end=8, interval=2), scorer=Wanda())
    train(conductor, Rare(), [True, True, *[False] * 8])
    assert num_zeros(conductor) == [32, 32]
    [note] = conductor.notes
    assert note.startswith("step 6: no token reached blocks.1.weight since the last change of masks")


def test_what_it_saw_before_is_forgotten_with_the_next_token() -> None:
    model = Rare()
    schedule = Cubic(sparsity=0.5, initial=0.25, start=1, end=3, interval=2)
    conductor = Sparsifier(schedule=schedule, scorer=Wanda())
    weight = model.blocks[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    conductor.attach(model, [optimizer], total_steps=4)
    loud, other = torch.ones(4, 8), torch.ones(4, 8)
    loud[:, :4], other[:, 4:] = 100, 50
    for hidden in (loud, other, other):
        model.blocks[1](hidden).square().mean().backward()
        model.blocks[0](hidden).square().mean().backward()
        optimizer.step()
    conductor.detach()
    kept = conductor.masks["blocks.1.weight"]
    assert num_zeros(conductor) == [32, 32]
    pruned_first = (weight.abs() * loud[0]).topk(2, 1, largest=False).indices
    highest = (weight.abs() * other[0]).scatter(1, pruned_first, -1).topk(4, 1).indices
    assert torch.equal(kept, torch.zeros_like(kept).scatter(1, highest, True))


def test_a_part_that_was_never_reached_keeps_its_weights_until_it_is() -> None:
    conductor = Sparsifier(schedule=Once(sparsity=0.5, at=2), scorer=Wanda())
    train(conductor, Rare(), [False] * 6)
    assert num_zeros(conductor) == [32, 0]
    assert "nothing of blocks.1.weight" in conductor.notes[0]
    assert 'exclude: ["blocks.1.*"]' in conductor.notes[0]
    assert conductor.broken == ("the masks of blocks.1.weight could not be chosen as due at step 2",)
    late = Sparsifier(schedule=Once(sparsity=0.5, at=2), scorer=Wanda())
    train(late, Rare(), [False] * 4 + [True] * 4)
    assert num_zeros(late) == [32, 32]
    assert late.report().sparsity == 0.5
    assert late.broken == ()


@pytest.mark.parametrize("scorer", [Wanda(), Wanda(scope="global"), Taylor()])
def test_nothing_seen_of_any_target_is_refused(scorer: Any) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    conductor = Sparsifier(schedule=Once(sparsity=0.5, at=1), scorer=scorer)
    conductor.attach(model, [optimizer], total_steps=2)
    with pytest.raises(ValueError, match="has observed nothing of"):
        optimizer.step()
    conductor.detach(has_failed=True)


def test_labels_that_do_not_count_leave_the_weights_as_they_are() -> None:
    model, ids = tiny_llama(), token_windows(2, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    conductor = Sparsifier(schedule=Cubic(sparsity=0.5, start=1, end=4, interval=1), scorer=Taylor())
    conductor.attach(model, [optimizer], total_steps=6)
    for _ in range(6):
        loss = model(input_ids=ids).logits.square().mean() * 0.0
        loss.backward()
        optimizer.step()
    conductor.detach()
    assert not conductor.masks
    assert conductor.report().sparsity == 0.0
    assert "all scores of model.layers.0.self_attn.q_proj.weight are equal" in conductor.notes[0]
    assert sum("are equal" in note for note in conductor.notes) == 1


@pytest.mark.parametrize("used", [[True, *[False] * 4], [False] * 8], ids=["old", "never reached"])
def test_what_is_behind_comes_back_from_a_saved_state(used: list[bool]) -> None:
    def attached(model: Rare, state: Any = None) -> tuple[Rare, Sparsifier, torch.optim.Optimizer]:
        conductor = Sparsifier(schedule=Cubic(sparsity=0.5, start=2, end=6, interval=2), scorer=Wanda())
        if state is not None:
            conductor.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        conductor.attach(model, [optimizer], total_steps=16)
        return model, conductor, optimizer

    def steps(model: Rare, optimizer: torch.optim.Optimizer, used: list[bool]) -> None:
        for index, both in enumerate(used):
            model(torch.rand(4, 8, generator=torch.Generator().manual_seed(index)), both=both).sum().backward()
            optimizer.step()

    model, conductor, optimizer = attached(Rare())
    steps(model, optimizer, used)
    state = conductor.state_dict()
    twin = Rare()
    twin.load_state_dict(model.state_dict())
    twin, again, optimizer_again = attached(twin, state)
    for net, steps_of in ((model, optimizer), (twin, optimizer_again)):
        steps(net, steps_of, [False, False, True, *[False] * 4])
    assert num_zeros(again) == num_zeros(conductor) == [32, 32]
    assert all(torch.equal(again.masks[name], mask) for name, mask in conductor.masks.items())
    assert again.state_dict()["digest"] == conductor.state_dict()["digest"]


def test_what_only_another_rank_has_seen_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Rare()
    bindings = Targets().resolve(model)
    seen = Observation(Wanda(), bindings)
    decision = Decision(
        bindings=bindings,
        scorer=Wanda(),
        granularity=Unstructured(),
        allocation=Uniform(),
        held={},
        read=seen.read,
        step=0,
        seed=0,
    )
    two_ranks = {"is_active": lambda: True, "sum_everywhere": lambda flags: flags + 1}
    monkeypatch.setattr(observation, "distributed", SimpleNamespace(**vars(distributed) | two_ranks))
    choice = choose(decision, seen, 0.5)
    assert choice.missed == []
    assert [binding.name for binding in choice.blind] == ["blocks.0.weight", "blocks.1.weight"]
