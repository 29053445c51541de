"""Shrink a model while a `Trainer` of Transformers trains it: `callbacks=[ShrinkingCallback(GradualShrink(...))]`.

A checkpoint holds the model as small as it is then. To resume, load the model from the checkpoint:
`Trainer(model=AutoModelForCausalLM.from_pretrained(folder), ...).train(resume_from_checkpoint=folder)`.
"""

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_prune.integrations.trainers.hf_trainer import calling_trainer
from lightning_prune.structured.gradual import GradualShrink

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError('ShrinkingCallback needs transformers: pip install "lightning_prune[hf]"') from error

__all__ = ["ShrinkingCallback"]


class ShrinkingCallback(TrainerCallback):
    """Cuts the model at the milestones of a schedule.

    Args:
        shrink: which units go, and when.
    """

    def __init__(self, shrink: GradualShrink) -> None:
        self.shrink = shrink

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: if the model cannot be cut so, or the training keeps references to its old shapes.
        """
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would load a checkpoint of another shape at the end; set it to False"
            )
        if args.torch_compile:
            raise ValueError("a compiled model keeps its old shapes; set torch_compile to False")
        self.shrink.check(kwargs["model"], total_steps=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Cut if a milestone is reached; a checkpoint that is due is written afterwards."""
        trainer, _ = calling_trainer()
        wrapped = trainer.model_wrapped
        self.shrink.after_step(
            kwargs["model"],
            [kwargs["optimizer"]],
            step=state.global_step,
            total_steps=state.max_steps,
            wrapper=wrapped if isinstance(wrapped, DistributedDataParallel) else None,
        )
