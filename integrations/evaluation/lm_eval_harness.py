"""Evaluate a model with lm-eval in the middle of training, and leave the training as it was.

Every rank may run the same evaluation: each one scores all documents by itself, so no rank waits for another unless the
model itself is sharded, and then all of them call it alike. Works with a bare, compiled, DDP-wrapped or PEFT-wrapped
Hugging Face model.
"""

import copy
import difflib
import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.base.distributed import is_first_rank
from lightning_prune.integrations.models.language_model import check_answers_tasks
from lightning_prune.integrations.models.training_state import untouched

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["check_tasks", "evaluate_model"]

MaskFrom = Literal["request", "task"]
_SEED = 1234  # lm-eval's own default, for few-shot examples and sampling
_NOISY_LOGGERS = ("lm_eval", "transformers", "datasets")


def check_tasks(tasks: Sequence[str], include_path: str | None = None) -> None:
    """Check that every task is known, before time is spent on training.

    Args:
        tasks: names of lm-eval tasks, groups or tags, or paths of task files.
        include_path: a folder of further task files.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if there is no such folder or task, naming the nearest known tasks.
    """
    _task_manager(tasks, include_path)


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    mask_from: MaskFrom = "request",
    instruction: str | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model on lm-eval tasks without a trace in its training state.

    Training modes, random states, gradients and the configuration are afterwards what they were before. Neither the
    model nor its parameters are replaced, so masks and optimizer state stay valid.

    Args:
        model: a Hugging Face causal or sequence-to-sequence model, possibly compiled or wrapped.
        tokenizer: its tokenizer; a copy is used.
        tasks: names of lm-eval tasks, groups or tags, or paths of task files.
        include_path: a folder of further task files, searched first.
        limit: documents per task; all when None.
        batch_size: sequences per forward pass.
        num_fewshot: examples before each question; None keeps each task's own number.
        mask_from: of a model that chooses its sub-network: each request's context, or each task's description.
        instruction: text that is read in place of the description of every task.

    Returns:
        task -> metric -> value. A metric computed through a named filter is called `metric,filter`.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if a task is unknown, or the model is not a Hugging Face one or predicts no tokens.
    """
    manager = _task_manager(tasks, include_path)
    bare = _unwrap(model)
    check_answers_tasks(bare)
    _check_masks(bare, mask_from, instruction)
    from lm_eval.evaluator import evaluate

    with untouched(bare, seed=_SEED), _quiet():
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        asked = loaded["tasks"] if mask_from == "task" else None
        scorer = _language_model(bare, tokenizer, batch_size, asked, instruction)
        outcome = evaluate(lm=scorer, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return _numbers(outcome["results"])


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError('evaluation needs lm-eval: pip install "lightning_prune[eval]"') from error


def _task_manager(tasks: Sequence[str], include_path: str | None) -> "TaskManager":
    """Return lm-eval's index of tasks, the small one of the folder where that is enough."""
    _require()
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise ValueError("no task to evaluate; name at least one")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path is a folder of lm-eval task files, but there is no folder {include_path}")
    names = [name for name in tasks if not _is_file(name)]
    own = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) <= set(own.all_subtasks):
        return own
    manager = _full_task_manager(include_path)
    if missing := [name for name in names if name not in manager.task_index]:
        raise ValueError(_unknown_task(missing[0], manager.all_tasks))
    return manager


@functools.lru_cache(maxsize=1)
def _full_task_manager(include_path: str | None) -> "TaskManager":
    """Read all of lm-eval's task files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _unknown_task(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"nearest known: {', '.join(near)}" if near else f"none of the {len(known)} known names is near"
    return f"unknown lm-eval task {name!r}; {hint}; for task files of your own give their folder as include_path"


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside compilation and data-parallel wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise ValueError(
            f"lm-eval scores Hugging Face language models, got {type(model).__name__} without config and generate; "
            "pass the inner transformers model"
        )
    return model


class _Scored:
    """The part of a model that lm-eval calls.

    lm-eval ties weights and changes modes of a module that it is handed; it leaves anything else alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config
        self.generate = model.generate
        self.device = next(model.parameters()).device
        self._model = model

    def __call__(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        return self._model(input_ids=input_ids, **inputs)


def _check_masks(model: nn.Module, mask_from: MaskFrom, instruction: str | None) -> None:
    if instruction is not None and mask_from == "request":
        raise ValueError("instruction is the text of one mask per task; set mask_from: task with it, or leave it out")
    if mask_from == "task" and _masks().condition_of(model) is None:
        raise ValueError(
            f"mask_from: task has no effect: this {type(model).__name__} has no predictor of masks; leave it out"
        )


def _masks() -> Any:
    return importlib.import_module("lightning_prune.integrations.instruction.lm_eval_masks")


def _language_model(
    model: nn.Module, tokenizer: Any, batch_size: int, tasks: Mapping[str, Any] | None, instruction: str | None
) -> Any:
    from lightning_prune.integrations.evaluation.lm_eval_progress import OneBarHFLM

    options = {"pretrained": _Scored(model), "tokenizer": copy.deepcopy(tokenizer), "batch_size": batch_size}
    condition = _masks().condition_of(model)
    if condition is None:
        return OneBarHFLM(**options)
    instructions = None if tasks is None else _masks().instructions_of(tasks, instruction)
    return _masks().ConditionedHFLM(condition=condition, instructions=instructions, **options)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples as lm-eval's own command does: a task that is zero-shot by its file stays so."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Keep what is a measured number, under its plain name."""
    return {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if "," in key and isinstance(value, (int, float))
        }
        for task, metrics in results.items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave lm-eval its progress bars, on the first rank, and silence its messages below an error."""
    import datasets

    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        if not is_first_rank():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w", encoding="ascii"))))
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            datasets.disable_progress_bars()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if had_bars:
                datasets.enable_progress_bars()
