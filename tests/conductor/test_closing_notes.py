"""Say what was not kept, and nothing else."""

from typing import Any

import pytest

from lightning_prune.base.types import Report, TargetReport
from lightning_prune.conductor.closing_notes import Ending, breaches, remarks


def ending(num_zeros: int, step: int, end: int, held: float, promised: float, **facts: Any) -> Ending:
    target = TargetReport("weight", (2, 5), 10, num_zeros)
    report = Report(7, (target,), 10, 10 - num_zeros, 40, 4 * (10 - num_zeros), 20, 20)
    return Ending(report=report, step=step, end=end, total_steps=10, held=held, promised=promised, **facts)


def test_kept_promises_need_no_words() -> None:
    kept = ending(5, 9, 8, 0.5, 0.5)
    assert list(breaches(kept)) == list(remarks(kept)) == []


def test_every_broken_promise_gets_a_sentence() -> None:
    broken = ending(2, 7, 9, 0.3, 0.5, differences=("3 weights", "a shape"), unseen_metric="eval_loss")
    assert list(breaches(broken)) == [
        "training ended at step 7 of a schedule that ends at step 9: sparsity is 0.3, not the promised 0.5",
        "the weights were replaced after the last step (by averages, or by the best checkpoint?): sparsity is 0.2, "
        "while the masks hold 0.3; 3 weights; a shape. Choose the best checkpoint only among pruned ones, and mask "
        "averages (Sparsifier.apply_to)",
    ]
    assert list(remarks(broken)) == ["the guarded metric 'eval_loss' was never logged, so the guard had no effect"]


@pytest.mark.parametrize("end", [0, 8])
def test_a_run_without_a_step_is_broken_also_where_masks_were_set_at_once(end: int) -> None:
    said = list(breaches(ending(0 if end else 5, 0, end, 0.0 if end else 0.5, 0.5)))
    assert len(said) == 1
    assert said[0].startswith("no optimizer step was seen; sparsity is 0")


def test_what_the_guard_kept_back_is_no_broken_promise() -> None:
    held = ending(3, 9, 8, 0.3, 0.5, guarded="val")
    assert list(breaches(held)) == []
    assert list(remarks(held)) == [
        "training ended at step 9 of a schedule that ends at step 8: sparsity is 0.3, not the promised 0.5, as the "
        "guard on 'val' asked"
    ]


def test_a_failed_run_without_a_step_is_not_called_a_silent_one() -> None:
    said = list(breaches(ending(0, 0, 8, 0.0, 0.5, has_failed=True)))
    assert said == ["training ended at step 0 of a schedule that ends at step 8: sparsity is 0, not the promised 0.5"]


def test_a_clock_that_ran_past_the_plan_is_told() -> None:
    assert list(remarks(ending(5, 10, 8, 0.5, 0.5))) == []
    assert list(remarks(ending(5, 11, 8, 0.5, 0.5))) == [
        "the optimizer was stepped 11 times where 10 steps were planned, so the schedule ran too fast; give the number "
        "of its steps (total_steps)"
    ]


def test_a_guarded_run_without_a_step_is_not_laid_to_the_guard() -> None:
    silent = ending(0, 0, 8, 0.0, 0.5, guarded="val")
    assert list(remarks(silent)) == []
    assert len(list(breaches(silent))) == 1
