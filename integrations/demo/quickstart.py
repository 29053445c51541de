"""The main job in one call: train a small model, prune it while training, evaluate, export, compare with baselines.

Everything lands in one new folder: `model/` (a Hugging Face folder), `report/`, `tasks/` (the lm-eval tasks made from
held-out text), `logs/` and `results.json`.
"""

import dataclasses
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoConfig

from lightning_prune.conductor.fitting import fit_targets
from lightning_prune.export.folder import check_free
from lightning_prune.integrations.demo.causal_lm import CausalLM, TextData
from lightning_prune.integrations.demo.quickstart_table import Row, format_table, write_results
from lightning_prune.integrations.evaluation.lm_eval_harness import check_tasks, evaluate_model
from lightning_prune.integrations.text.next_line_tasks import NEXT_LINE, NUM_CHOICES, WHOLE_TEXT, write_tasks
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from lightning_prune.recipe.recipe import Evaluate, Recipe, ReportOptions
from lightning_prune.report.counts import measure

__all__ = ["run_quickstart"]

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]

_NUM_QUESTIONS = 400
_WHOLE_TEXT_CHARACTERS = 60_000
_CALIBRATION_BATCHES = 16
_FINE_TUNING_RATE = 1e-4  # the recipe's own rate is for a model that starts from nothing


def run_quickstart(
    config: str = "train/quickstart",
    model: str | None = None,
    out: str = "quickstart_out",
    overrides: Sequence[str] = (),
) -> int:
    """Run the whole job and print its table.

    A new model is first trained for `trainer.max_steps`; a given one is taken as it is. That dense model is trained for
    as many steps once more: dense for comparison, and with the recipe's pruning. The table also shows it pruned at once
    without training.

    Args:
        config: a packaged recipe name or a path; its model is a `CausalLM` and its data a `TextData`.
        model: folder or hub id of a causal model to start from.
        out: a folder that does not exist yet or is empty.
        overrides: `section.key=value` each.

    Returns:
        0.

    Raises:
        ValueError: if the folder is not empty, or recipe, model and data do not fit; before anything is trained.
    """
    started = time.monotonic()
    folder = check_free(out)
    recipe = Recipe.load(config, overrides=[*_start_from(model), *overrides])
    evaluate = _check(recipe)
    seed_everything(recipe.seed, verbose=False)
    with _quiet_trainer():
        job = _Job(recipe, evaluate, folder)
        rows = job.run(is_trained=model is not None)
    write_results(
        folder / "results.json",
        rows,
        seconds=job.seconds | {"total": round(time.monotonic() - started, 1)},
        num_questions=job.num_questions,
        recipe=job.recipe.as_dict(),
    )
    chance = f"chance on {job.num_questions} next-line questions is {1 / NUM_CHOICES:.2f}"
    files = "\n".join(f"{name:<8}{folder / path}" for name, path in _FILES.items())
    sys.stdout.write(f"\n{format_table(rows)}\n{chance}\n\n{files}\n")
    return 0


_FILES = {"model": "model", "report": "report/index.html", "results": "results.json"}


def _start_from(model: str | None) -> list[str]:
    """Return the overrides that make the recipe start from a trained model with its own tokenizer."""
    if model is None:
        return []
    path = Path(model).expanduser()
    source = str(path) if path.is_dir() else model
    try:
        AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot open the model {model!r}: {str(error).strip().partition(chr(10))[0]}") from error
    value = json.dumps(source)
    return [
        f"model.init_args.model={value}",
        f"data.init_args.tokenizer={value}",
        "model.init_args.optimizer=adamw",
        f"model.init_args.learning_rate={_FINE_TUNING_RATE}",
    ]


def _check(recipe: Recipe) -> Evaluate:
    """Refuse a recipe that the job could not carry to its end; return its evaluate section."""
    if recipe.evaluate is None or recipe.export is None:
        raise ValueError(f"recipe {recipe.name}: the quickstart needs the sections evaluate and export")
    if not isinstance(recipe.trainer, dict) or not isinstance(recipe.trainer.get("max_steps"), int):
        raise ValueError(f"recipe {recipe.name}: the quickstart needs a number of steps as trainer.max_steps")
    if recipe.export.dir or recipe.report.dir or recipe.evaluate.include_path:
        raise ValueError(
            f"recipe {recipe.name}: the quickstart writes into one folder; leave export.dir, report.dir and "
            "evaluate.include_path null and choose that folder (--out)"
        )
    if not {NEXT_LINE, WHOLE_TEXT} <= set(recipe.evaluate.tasks):
        raise ValueError(
            f"recipe {recipe.name}: the table is made from {NEXT_LINE} and {WHOLE_TEXT}; name both in evaluate.tasks"
        )
    if set(recipe.evaluate.at) != {"start", "end"}:
        raise ValueError(
            f"recipe {recipe.name}: the table compares the model before and after; evaluate.at must be [start, end]"
        )
    return recipe.evaluate


class _Job:
    """One run: the model, its text, and the folder that is filled."""

    def __init__(self, recipe: Recipe, evaluate: Evaluate, folder: Path) -> None:
        tasks = folder / "tasks"
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.evaluate = dataclasses.replace(evaluate, include_path=str(tasks))
        assert recipe.export is not None
        self.recipe = dataclasses.replace(
            recipe,
            evaluate=self.evaluate,
            export=dataclasses.replace(recipe.export, dir=str(folder / "model")),
            report=ReportOptions(dir=str(folder / "report")),
        )
        self._trainer(None)
        with self._timed("prepare", "reading text and building the model"):
            self.module, self.data = _instantiate(recipe)
            self.data.setup()
            self._check_pruning()
            self.num_questions = write_tasks(
                tasks,
                self.data.val_documents,
                num_questions=_NUM_QUESTIONS,
                max_characters=_WHOLE_TEXT_CHARACTERS,
                seed=recipe.seed,
            )
            self.num_questions = min(self.num_questions, evaluate.limit or self.num_questions)
            check_tasks(evaluate.tasks, str(tasks))

    def run(self, *, is_trained: bool) -> list[Row]:
        """Train, prune and measure; return the table's rows in order."""
        if not is_trained:
            self._fit("dense", "training a dense model")
        start = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        callback = PruningCallback(self.recipe)
        self._fit("pruned_while_trained", "training it further while pruning", callback)
        before, *_, after = callback.run.evaluations
        pruned = self._row("pruned while trained", after["results"])
        self.module.load_state_dict(start)
        dense = self._row("dense", before["results"])
        self._prune_once()
        once = self._row("pruned, not trained", self._score("pruned_not_trained"))
        self.module.load_state_dict(start)
        self._fit("trained_further", "training it further without pruning, for comparison")
        longer = self._row("dense, trained further", self._score("trained_further"))
        return [dense, longer, once, pruned]

    def _check_pruning(self) -> None:
        """Let everything that can be wrong with the pruning be said before the dense training."""
        prune = self.recipe.masking()
        fit_targets(self.module, prune.targets, prune.scorer, prune.granularity)
        prune.schedule.resolve(self.recipe.trainer["max_steps"])
        PruningCallback(dataclasses.replace(self.recipe, evaluate=None))

    def _fit(self, name: str, title: str, *callbacks: Callback) -> None:
        with self._timed(name, title):
            self._trainer(name, *callbacks).fit(self.module, datamodule=self.data)

    def _trainer(self, name: str | None, *callbacks: Callback) -> Trainer:
        """Return the recipe's trainer, with a log folder of that name or without logs."""
        options = _parse("trainer", Trainer, self.recipe.trainer, is_class=True)
        options["callbacks"] = [*(options["callbacks"] or ()), *callbacks]
        options["logger"] = CSVLogger(save_dir=self.folder / "logs", name=name, version="") if name else False
        return Trainer(**options)

    def _prune_once(self) -> None:
        with self._timed("one_shot", "pruning the dense model at once, for comparison"):
            number = _CALIBRATION_BATCHES if self.recipe.masking().scorer.needs else 0
            batches = list(islice(self.data.train_dataloader(), number))
            self.recipe.sparsifier().prune_once(self.module.model, batches)

    def _score(self, name: str) -> Scores:
        """Run the recipe's tasks, as the callback does before and after its training."""
        with self._timed(f"evaluate_{name}", f"evaluating: {name}"):
            return evaluate_model(self.module.model, self.data.tokenizer, **self.evaluate.scoring)

    def _row(self, name: str, scores: Scores) -> Row:
        """Measure the model as it is now; its scores on the tasks are known."""
        values = self._trainer(None).validate(self.module, datamodule=self.data, verbose=False)[0]
        report = measure(self.module, self.recipe.masking().targets.resolve(self.module), step=0)
        return Row(
            model=name,
            num_parameters=report.num_parameters,
            num_nonzeros=report.num_nonzeros,
            sparsity=report.sparsity,
            val_ppl=values["val_ppl"],
            accuracy=scores[NEXT_LINE]["acc"],
            bits_per_byte=scores[WHOLE_TEXT]["bits_per_byte"],
        )

    @contextmanager
    def _timed(self, name: str, title: str) -> Iterator[None]:
        logger.info("quickstart: %s", title)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Silence what the trainer says about the machine each time one is made; its progress bars stay."""
    trainer_logger = logging.getLogger("lightning.pytorch")
    level = trainer_logger.level
    trainer_logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module="lightning"
            )  # of torch's own, once per trainer
            yield
    finally:
        trainer_logger.setLevel(level)


def _instantiate(recipe: Recipe) -> tuple[CausalLM, TextData]:
    """Build the recipe's model and data."""
    return _parse("model", CausalLM, recipe.model), _parse("data", TextData, recipe.data)


def _parse(section: str, kind: type, content: Any, *, is_class: bool = False) -> Any:
    """Build the object a section describes, or for the class itself return its arguments."""
    parser = ArgumentParser(exit_on_error=False)
    if is_class:
        parser.add_class_arguments(kind, section, instantiate=False)
    else:
        parser.add_subclass_arguments(kind, section, required=True)
    try:
        parsed = parser.instantiate(parser.parse_object({section: content}))[section]
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"section {section}: {' '.join(str(error).split())}") from error
    return dict(parsed.items()) if is_class else parsed
