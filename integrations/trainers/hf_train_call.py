"""Around `Trainer.train`: choose the checkpoint of a resume, and let go of the model when the training dies.

Transformers tells callbacks neither that a resume is asked for before it has opened the folder, nor that an exception
or Ctrl-C has ended the training. So the `train` of the one Trainer that has a callback is called through `TrainCall`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from lightning_prune.integrations.trainers.hf_checkpoints import resume_folder

__all__ = ["TrainCall", "watch"]

Told = Callable[[Trainer], None]
_TRAIN = "train"
_PARTS = ("get_batch_samples", "training_step", "_maybe_log_save_evaluate")  # of a training that already runs
_RESUME = "resume_from_checkpoint"


class TrainCall:
    """Stands in the place of one method of one Trainer; can be pickled and copied with it.

    Args:
        trainer: what the method belongs to.
        method: the method that is called.
        let_go: called with the trainer after an exception, before it goes on its way.
    """

    def __init__(self, trainer: Trainer, method: Callable[..., Any], let_go: Told) -> None:
        self.trainer, self.method, self.let_go = trainer, method, let_go
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        try:
            return self.method(*args, **kwargs)
        except BaseException:
            self.let_go(self.trainer)
            raise


class _ResumingCall(TrainCall):
    """The same for `train`, which may be asked to resume; `done` is called with the trainer after its end."""

    def __init__(self, trainer: Trainer, method: Callable[..., Any], let_go: Told, done: Told) -> None:
        super().__init__(trainer, method, let_go)
        self.done = done

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train, from the last whole checkpoint if the newest is half-written."""
        output_dir = self.trainer.args.output_dir
        asked = kwargs.get(_RESUME, args[0] if args else None)
        if asked and output_dir is not None:
            found = resume_folder(asked, Path(output_dir))
            args, kwargs = ((found, *args[1:]), kwargs) if args else ((), kwargs | {_RESUME: found})
        result = super().__call__(*args, **kwargs)
        self.done(self.trainer)
        return result


def watch(trainer: Trainer, let_go: Told, done: Told) -> None:
    """Call the trainings of a Trainer through `TrainCall`; once, however many callbacks ask for it.

    A callback that is added to a Trainer later is heard of only inside `train`; what `train` calls from there on is
    watched then.
    """
    if isinstance(vars(trainer).get(_TRAIN), TrainCall):
        return
    if trainer.is_in_train:
        for owner, names in ((trainer, _PARTS), (trainer.callback_handler, ("call_event",))):
            for name in names:
                if hasattr(owner, name) and not isinstance(vars(owner).get(name), TrainCall):
                    setattr(owner, name, TrainCall(trainer, getattr(owner, name), let_go))
    setattr(trainer, _TRAIN, _ResumingCall(trainer, trainer.train, let_go, done))
