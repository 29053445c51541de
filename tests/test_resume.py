"""What is saved and taken up again: a resume equals no pause, and a state of another run is refused."""

import copy
import io
from typing import Any

import pytest
import torch

from tests.loops import (
    NUM_STEPS,
    SCORERS,
    adamw,
    assert_same_masks,
    assert_same_weights,
    recipe,
    sparsifier,
    train,
    train_pruned,
)
from tests.tiny_models import tiny_llama


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("stop", [1, 5, 8, 10])
def test_resume_equals_no_pause(scorer: str, stop: int) -> None:
    whole, conductor = train_pruned(recipe(scorer=scorer))
    model = tiny_llama()
    optimizer = adamw(model)
    first = sparsifier(recipe(scorer=scorer))
    first.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=stop)
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "s": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = tiny_llama(seed=99)
    resumed.load_state_dict(saved["m"])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(saved["o"])
    second = sparsifier(recipe(scorer=scorer))
    second.load_state_dict(saved["s"])
    second.attach(resumed, [optimizer], total_steps=NUM_STEPS)
    assert second.step == stop
    train(resumed, optimizer, first=stop)
    second.detach()
    assert_same_weights(whole, resumed)
    assert_same_masks(conductor, second)
    assert second.history == conductor.history
    assert second.report() == conductor.report()


def test_a_saved_mask_takes_one_bit_a_weight() -> None:
    _, conductor = train_pruned()
    packed = conductor.state_dict()["masks"]
    num_weights = sum(target.num_weights for target in conductor.report().targets)
    assert sum(bits.numel() * bits.element_size() for bits in packed.values()) * 8 == num_weights
    assert sum(mask.numel() * mask.element_size() for mask in conductor.masks.values()) == num_weights


def _state() -> dict[str, Any]:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier()
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=6)
    return conductor.state_dict()


def test_a_state_of_another_run_is_refused() -> None:
    state = _state()
    with pytest.raises(ValueError, match=r"another recipe: schedule was .*0\.5.* is now .*0\.6"):
        sparsifier(recipe(sparsity=0.6)).load_state_dict(state)
    with pytest.raises(ValueError, match="format version 99, this release reads 1"):
        sparsifier().load_state_dict(state | {"format_version": 99})
    with pytest.raises(ValueError, match=r"lacks \['digest'\]"):
        sparsifier().load_state_dict({key: value for key, value in state.items() if key != "digest"})
    flipped = {name: bits.clone() for name, bits in state["masks"].items()}
    next(iter(flipped.values()))[0] ^= 1
    with pytest.raises(ValueError, match="does not match its digest"):
        sparsifier().load_state_dict(state | {"masks": flipped})
    other = sparsifier()
    other.load_state_dict(state)
    model = tiny_llama(layers=3)
    with pytest.raises(ValueError, match=r"another model: model\.layers\.2\.\S+ was None"):
        other.attach(model, [adamw(model)], total_steps=NUM_STEPS)


def test_a_changed_number_of_steps_is_refused_where_it_moves_the_schedule() -> None:
    source = {"prune": {"schedule": {"class_path": "Cubic", "init_args": {"sparsity": 0.5, "end": 0.5}}}}
    model = tiny_llama()
    optimizer = adamw(model)
    first = sparsifier(source)
    first.attach(model, [optimizer], total_steps=12)
    state = first.state_dict()
    second = sparsifier(source)
    second.load_state_dict(state)
    with pytest.raises(ValueError, match="schedule ran over steps 0 to 6 every 1, now it would be 0 to 12"):
        second.attach(model, [optimizer], total_steps=24)


def test_a_longer_training_goes_on_with_the_old_plan_given_as_steps() -> None:
    """Moments as fractions of 12 steps, and the same moments as steps of 24, are one plan."""
    ends: list[Any] = []
    for moments, total in (({"start": 0.25, "end": 0.75, "interval": 3}, 12), ({"start": 3, "end": 9}, 24)):
        schedule = {"class_path": "Cubic", "init_args": {"sparsity": 0.5, "interval": 3} | moments}
        conductor = sparsifier({"prune": {"schedule": schedule}})
        model = tiny_llama()
        optimizer = adamw(model)
        if ends:
            conductor.load_state_dict(ends[0])
            model.load_state_dict(ends[1])
            optimizer.load_state_dict(ends[2])
        conductor.attach(model, [optimizer], total_steps=total)
        train(model, optimizer, first=6 if ends else 0, last=NUM_STEPS if ends else 6)
        ends += [conductor.state_dict(), copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())]
    whole, alone = train_pruned(
        {
            "prune": {
                "schedule": {"class_path": "Cubic", "init_args": {"sparsity": 0.5, "start": 3, "end": 9, "interval": 3}}
            }
        }
    )
    assert conductor.step == NUM_STEPS
    assert_same_weights(whole, model)
    assert_same_masks(alone, conductor)


def test_weights_that_the_masks_do_not_prune_are_refused() -> None:
    dense = tiny_llama()
    conductor = sparsifier()
    conductor.load_state_dict(_state())
    with pytest.raises(ValueError, match=r"pruned weights are not zero, in 14 targets.*mixed up, or .* not loaded"):
        conductor.attach(dense, [adamw(dense)], total_steps=NUM_STEPS)
    assert not conductor.is_attached
    assert bool((dense.model.layers[0].mlp.up_proj.weight != 0).all()), "nothing was cut"


def test_frozen_weights_that_a_checkpoint_of_adapters_leaves_out_are_pruned_again() -> None:
    saved: list[dict[str, Any]] = []
    for _ in range(2):
        model = tiny_llama()
        model.model.layers.requires_grad_(False)
        optimizer = adamw(model)
        conductor = sparsifier()
        if saved:
            conductor.load_state_dict(saved[0])
        conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
        train(model, optimizer, last=6)
        saved.append(conductor.state_dict())
        assert conductor.verify(model) == ()


@pytest.mark.parametrize("scorer", ["Wanda", "Taylor", "Movement"])
def test_a_state_saved_after_training_ended_resumes_exactly_and_says_nothing_stale(scorer: str) -> None:
    whole, conductor = train_pruned(recipe(scorer=scorer))
    model = tiny_llama()
    optimizer = adamw(model)
    first = sparsifier(recipe(scorer=scorer))
    first.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=5)
    first.detach()
    assert first.report().notes[0].startswith("training ended at step 5")
    second = sparsifier(recipe(scorer=scorer))
    second.load_state_dict(first.state_dict())
    second.attach(model, [optimizer], total_steps=NUM_STEPS)
    assert second.report().notes == ()
    train(model, optimizer, first=5)
    second.detach()
    assert_same_weights(whole, model)
    assert_same_masks(conductor, second)
    assert second.report() == conductor.report()
    assert second.broken == ()


def test_a_state_from_before_the_training_starts_it_anew() -> None:
    conductor = sparsifier()
    conductor.load_state_dict(sparsifier().state_dict())
    assert not conductor.is_restoring
    model = tiny_llama()
    conductor.attach(model, [adamw(model)], total_steps=NUM_STEPS)
    assert conductor.step == 0
