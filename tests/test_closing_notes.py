"""Say what was not kept, and nothing else."""

from lightning_prune.closing_notes import closing_notes
from lightning_prune.types import Report, TargetReport


def report(num_zeros: int) -> Report:
    target = TargetReport("weight", (2, 5), 10, num_zeros)
    return Report(7, (target,), 10, 10 - num_zeros, 40, 4 * (10 - num_zeros), 20, 20)


def test_kept_promises_need_no_words() -> None:
    assert list(closing_notes(report(5), 9, 8, 0.5, 0.5, num_pruned=5, unseen_metric=None)) == []


def test_every_broken_promise_gets_a_sentence() -> None:
    said = list(closing_notes(report(2), 7, 9, 0.3, 0.5, num_pruned=3, unseen_metric="eval_loss"))
    assert said == [
        "training ended at step 7 of a schedule that ends at step 9: sparsity is 0.3, not the promised 0.5",
        "the weights were replaced after the last step (by the best checkpoint?): sparsity is 0.2, while the masks "
        "hold 0.3",
        "the guarded metric 'eval_loss' was never logged, so the guard had no effect",
    ]
