"""What a pruning run does around the masks, in any trainer: log, evaluate, keep the report, export.

The adapters call it at their trainer's moments; it knows no trainer.
"""

import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.types import Report
from lightning_prune.export.folder import check_writable, write_errors
from lightning_prune.integrations.instruction.condition_run import ConditionRun
from lightning_prune.integrations.models.language_model import check_answers_tasks, language_model
from lightning_prune.integrations.runs.recovery_run import Batches, RecoveryRun, whole_copy
from lightning_prune.integrations.runs.run_export import RunExport
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.report import page as report_page

__all__ = ["PruningRun"]

logger = logging.getLogger(__name__)
Log = Callable[[dict[str, float]], None]
_SPARE = "lightning_prune_export"  # in the trainer's folder


def _log_nothing(metrics: dict[str, float]) -> None:
    """Stand in for a trainer's log where there is no trainer."""


class PruningRun:
    """One recipe at work in one training.

    Args:
        recipe: a packaged name, a path, or a recipe.

    Raises:
        ValueError: if the recipe cannot be used, before any training time is spent.
        ImportError: if an extra that it asks for is missing.
    """

    def __init__(self, recipe: "str | Path | Recipe | Mapping[str, Any]") -> None:
        self.recipe = Recipe.load(recipe)
        self.sparsifier = self.recipe.sparsifier()
        self.recovery = None if self.recipe.recover is None else RecoveryRun(self.recipe, self.sparsifier)
        self.condition = None if self.recipe.condition is None else ConditionRun(self.recipe.condition)
        self.export = RunExport(self.recipe, self.recovery, self.condition)
        self.evaluations: list[dict[str, Any]] = []
        self.broken: tuple[str, ...] = ()  # in what the model and the files are not as promised, known at the end
        self.last_step = 0  # of the schedule in this training
        self._model: nn.Module | None = None
        self._tokenizer: Any = None
        self._spare: str | Path | None = None
        self._log: Log = _log_nothing
        self._num_logged = self._last_evaluated = -1
        self._notes: list[str] = []
        if self.recipe.shrink is not None and (self.recipe.export is None or self.recipe.export.dir is None):
            raise ValueError("shrink.zeros has no effect without a folder for the smaller model; set export.dir")
        if self.recipe.report.dir is not None:
            report_page.check_requirements()
        if self.recipe.evaluate is not None:
            self._harness().check_tasks(list(self.recipe.evaluate.tasks), self.recipe.evaluate.include_path)

    @staticmethod
    def _harness() -> Any:
        return importlib.import_module("lightning_prune.integrations.evaluation.lm_eval_harness")

    def prepare(self, module: nn.Module) -> nn.Module:
        """Change what is trained where the recipe conditions it, or trains less of it, before optimizers are made.

        Returns:
            what the trainer is to train; the same module where it can stay.
        """
        if self.condition is not None:
            if self.recovery is not None:
                self.recovery.copy_teacher(language_model(module))
            self.condition.prepare(module)
        if self.recovery is None:
            return module
        if (before := self.recovery.prepared) is not None and self.recovery.has_prepared(module):
            return before
        if before is not None:
            self.recovery = self.export.recovery = RecoveryRun(self.recipe, self.sparsifier)
        self.export.check_units(module, is_restoring=self.sparsifier.is_restoring)
        return self.recovery.prepare(module)

    def start(
        self,
        model: nn.Module,
        optimizers: Iterable[object],
        *,
        total_steps: int,
        tokenizer: Any,
        log: Log,
        eval_batches: Batches | None = None,
        train_batches: Batches | None = None,
        takes_loss: Callable[[Any], float] | None = None,
        saves_whole: bool = True,
        spare: str | Path | None = None,
    ) -> None:
        """Evaluate the dense model if asked to, then hold masks; collective.

        Args:
            model: the module being trained, as the trainer has wrapped or sharded it.
            optimizers: the trainer's.
            total_steps: optimizer steps of the whole training.
            tokenizer: of the language model in it, or None; needed for evaluation.
            log: sends metrics to the trainer's logger.
            eval_batches: gives the trainer's evaluation data anew at each call; None if it has none.
            train_batches: the same of its training data.
            takes_loss: see `RecoveryRun.start`.
            saves_whole: whether the trainer's checkpoints hold the weights below adapters.
            spare: a folder of the trainer's, for an export that cannot be written where it should go.
        """
        self._model, self._tokenizer, self._log, optimizers = model, tokenizer, log, list(optimizers)
        self._num_logged, self._last_evaluated = -1, -1
        self._notes, self.broken, self._spare = [], (), spare
        self.export.check_units(model, is_restoring=self.sparsifier.is_restoring)
        self._check_language_model(model)
        self._check_folders(model, saves_whole=saves_whole)
        self.last_step = self.sparsifier.schedule.resolve(total_steps)[1]
        is_new = not self.sparsifier.is_restoring
        if self.recovery is not None:
            self.recovery.start(model, tokenizer=tokenizer, eval_batches=eval_batches, takes_loss=takes_loss)
        if self.condition is not None:
            about = {"train_batches": train_batches, "tokenizer": tokenizer}
            self.condition.start(model, optimizers, total_steps=total_steps, is_new=is_new, **about)
        if is_new:
            self._evaluate_dense(model)
        self.sparsifier.attach(model, optimizers, total_steps=total_steps)
        if self.recovery is not None:
            self.recovery.begin()
        self._log_report()
        self._measure_pruned()

    def prune_once(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        tokenizer: Any,
        parent: nn.Module | None = None,
    ) -> Report:
        """Evaluate, prune once, refit, evaluate, report and export, each as far as the recipe asks for it.

        Args:
            model: changed in place.
            batches: calibration.
            tokenizer: of the model, or None.
            parent: the dense model, for a recipe that refits a model that comes pruned.
        """
        self._model, self._tokenizer = model, tokenizer
        self._notes, self.broken = [], ()
        self.export.check_units(model, is_restoring=self.sparsifier.is_restoring)
        self._check_language_model(model)
        self._check_folders(model, saves_whole=True)
        self._evaluate_dense(model)
        dense = {} if self.recovery is None else whole_copy(model if parent is None else parent)
        self.sparsifier.prune_once(model, batches)
        if self.recovery is not None:
            self._measure_pruned()
            refitted = self.recovery.reconstruct(model, dense, batches)
            self._notes += refitted.notes
            before, after = (sum(getattr(t, end) for t in refitted.targets) for end in ("before", "after"))
            self._notes.append(f"refitted: squared output error {after / max(before, 1e-30):.3g} of that before")
        self._conclude(has_trained=False)
        if self.broken:
            raise ValueError("; ".join(self.broken))
        return self.report()

    def report(self) -> Report:
        """Return what was pruned, and what became of it in the export."""
        report = self.sparsifier.report()
        return dataclasses.replace(report, notes=(*report.notes, *self._notes, *self.export.notes))

    def final_since(self) -> int | None:
        """Return the step since which the masks are what the whole schedule has made of them; None before its end."""
        if not self.sparsifier.is_finished and self.sparsifier.step < self.last_step:
            return None
        return max((int(entry["step"]) for entry in self.sparsifier.history if "sparsity" in entry), default=0)

    def _evaluate_dense(self, model: nn.Module) -> None:
        self.evaluations.clear()
        if self.recipe.evaluate is not None and "start" in self.recipe.evaluate.at:
            self._evaluate("before", self.sparsifier.measure(model))
        if self.recovery is not None and self.recipe.prune is not None:
            self.recovery.measure("before", model, self._last_results())

    def _measure_pruned(self) -> None:
        """Measure what recovery starts from, at the step at which the last masks are set; collective."""
        if self.recovery is None or "pruned" in self.recovery.moments or not self.sparsifier.is_finished:
            return
        assert self._model is not None
        if has_tasks := self.recipe.evaluate is not None and "start" in self.recipe.evaluate.at:
            self._evaluate("pruned", self.sparsifier.report())
        self.recovery.measure("pruned", self._model, self._last_results() if has_tasks else {})

    def _last_results(self) -> Mapping[str, Mapping[str, float]]:
        return self.evaluations[-1]["results"] if self.evaluations else {}

    def _check_language_model(self, model: nn.Module) -> None:
        options, found = self.recipe.evaluate, language_model(model)
        if options is not None and (found is None or self._tokenizer is None):
            missing = "a Hugging Face model" if found is None else "its tokenizer"
            raise ValueError(
                f"the recipe evaluates tasks, but {missing} was not found in this training; give the trainer a "
                "processing_class, or the module or data module a `tokenizer` attribute, or set evaluate: null"
            )
        if options is not None and found is not None:
            check_answers_tasks(found)

    def _check_folders(self, model: nn.Module, *, saves_whole: bool) -> None:
        self.export.check(model, saves_whole=saves_whole)
        if self.recipe.report.dir is not None and distributed.is_first_rank():
            check_writable(self.recipe.report.dir)

    def after_step(self) -> None:
        """Log and evaluate what an optimizer step has made due; collective."""
        if self.recovery is not None:
            self.recovery.after_step()
        if self.condition is not None:
            self.condition.after_step(self.sparsifier.step, self._log)
        self._log_report()
        self._measure_pruned()
        options = self.recipe.evaluate
        step = self.sparsifier.step
        every = None if options is None else options.every
        if every is not None and 0 < step != self._last_evaluated and step % every == 0:
            self._evaluate(f"step {step}", self.sparsifier.report())

    def observe(self, metrics: Mapping[str, object]) -> None:
        """Take in what the trainer has logged, for the guard and the report; collective."""
        self.sparsifier.observe({name: value for name, value in metrics.items() if not name.startswith("prune/")})
        terms: dict[str, float] = {}
        for part in (self.recovery, self.condition):
            terms |= {} if part is None else part.metrics()
        if terms:
            self._log({f"prune/{name}": value for name, value in terms.items()})
        self._log_report()

    def _log_report(self) -> None:
        if self.sparsifier.num_updates != self._num_logged:
            self._num_logged = self.sparsifier.num_updates
            metrics = self.sparsifier.report().metrics()
            self._log({name: value for name, value in metrics.items() if name.count("/") == 1})

    def _evaluate(self, label: str, report: Report) -> None:
        options, model = self.recipe.evaluate, self._model
        assert options is not None
        assert model is not None
        distributed.log(logger, logging.INFO, "evaluating (%s): %s", label, ", ".join(options.tasks))
        results = self._harness().evaluate_model(language_model(model), self._tokenizer, **options.scoring)
        self._last_evaluated = self.sparsifier.step
        summary = {key: value for key, value in report.as_dict().items() if key != "targets"}
        self.evaluations.append({"label": label, "step": report.step, "report": summary, "results": results})
        self._log({f"prune/{task}/{name}": v for task, metrics in results.items() for name, v in metrics.items()})

    def finish(self) -> None:
        """Let go of the model, evaluate, write report and export; collective. Call it when training has ended.

        What cannot be written does not end the program, which still has the trained model: it is said, and in `broken`.

        Raises:
            ValueError: if no optimizer step was taken, or masked units cannot be cut.
        """
        if not self.sparsifier.is_attached:
            return
        self.sparsifier.detach()
        self.broken = self.sparsifier.broken
        self._log(self.sparsifier.report().metrics())
        if self.sparsifier.step == 0:
            self._write_report()
            self._let_go()
            raise ValueError(f"nothing was pruned: {'; '.join(self.broken)}")
        self._conclude(has_trained=True)

    def _conclude(self, *, has_trained: bool) -> None:
        has_tasks = self.recipe.evaluate is not None and "end" in self.recipe.evaluate.at
        try:
            if self.condition is not None:
                self.condition.conclude(self._log, is_served=self.recipe.report.dir is not None)
            if has_tasks:
                self._evaluate("after", self.sparsifier.report())
            if self.recovery is not None and self._model is not None:
                self.recovery.measure("recovered", self._model, self._last_results() if has_tasks else {})
                self.recovery.finish()
        finally:
            try:
                self._export(has_trained=has_trained)
            finally:
                self._write_report()
                self._let_go()

    def abort(self) -> bool:
        """Let go of the model after an error or an interruption; the report shows what was reached.

        Returns:
            whether there was anything to let go of.
        """
        was_training = self.sparsifier.is_attached
        if self.recovery is not None:
            self.recovery.stop()
        if was_training:
            self.sparsifier.detach(has_failed=True)
            self.broken = ("the training was interrupted", *self.sparsifier.broken)
            self._write_report()
        self._let_go()
        return was_training

    def check_again(self, model: nn.Module) -> None:
        """Compare the model once more, after all else that a trainer does at its end; collective."""
        if found := [new for new in self.sparsifier.verify(model) if not any(new in one for one in self.broken)]:
            for sentence in found:
                self._break(f"the weights were replaced after pruning had ended; put its callback last: {sentence}")
            self._write_report()

    def _let_go(self) -> None:
        """Keep nothing of a trainer that is gone."""
        if self.condition is not None:
            self.condition.stop()
        self._model, self._log = None, _log_nothing

    def _break(self, sentence: str) -> None:
        self.broken += (sentence,)
        self._notes.append(sentence)
        logger.error("%s", sentence)

    def _write_report(self) -> None:
        """Write the report; a training that has ended is not lost over a page that cannot be written."""
        if self.recipe.report.dir is None or not distributed.is_first_rank():
            return
        try:
            page = report_page.write_report(
                Path(self.recipe.report.dir).expanduser(),
                report=self.report().as_dict(),
                history=self.sparsifier.history,
                evaluations=self.evaluations,
                recipe_text=self.recipe.dump(),
                recovery=None if self.recovery is None else self.recovery.report().as_dict(),
                condition=None if self.condition is None else self.condition.report(),
            )
        except (OSError, ValueError, RuntimeError) as error:
            self._break(f"the report could not be written to {self.recipe.report.dir}: {error}")
        else:
            logger.info("report: %s", page)

    def _export(self, *, has_trained: bool) -> None:
        """Write the model; after a training, to a folder of the trainer's if it cannot go where it should."""
        model = self._model
        if model is None:
            return
        error = self._try_export(self.export, model)
        has_written = distributed.agree(error is None, next(model.parameters()).device)
        if error is not None and not has_trained:
            raise error
        if has_written:
            return
        spare = None if self._spare is None else Path(self._spare) / _SPARE
        self._break(f"the export could not be written to {self.export.folder}: {error}")
        if spare is not None and self._try_export(self.export.moved(spare), model) is None:
            self._break(f"the export was written to {spare} instead")
        else:
            self._break("the pruned weights are in memory alone: save them with the trainer or the model")

    def _try_export(self, export: RunExport, model: nn.Module) -> BaseException | None:
        """Write the model, and return what the disk had against it; raise what is the model's fault."""
        try:
            difference = export.write(model, self.report(), tokenizer=self._tokenizer)
        except write_errors() as error:
            return error
        if difference is not None:
            self._break(difference)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as plain values and tensors; collective."""
        state = {"sparsifier": self.sparsifier.state_dict(), "evaluations": self.evaluations}
        parts = {"recovery": self.recovery, "condition": self.condition}
        return state | {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; it is put in force by the next `start`.

        Raises:
            ValueError: if it is damaged or belongs to another recipe.
        """
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.evaluations = list(state["evaluations"])
        if self.recovery is not None:
            self.recovery.load_state_dict(state["recovery"])
        if self.condition is not None:
            self.condition.load_state_dict(state["condition"])
