"""Open a Hugging Face model, make it smaller at once, and write it again as the class it was.

Found, planned and cut in memory; the folder appears when everything is in it.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.export.folder import PLAN_NAME, check_free
from lightning_prune.export.huggingface import export_huggingface
from lightning_prune.export.plan_note import num_parameters, plan_note, read_plan
from lightning_prune.integrations.models.hf_open import load_model
from lightning_prune.integrations.per_layer.per_layer_export import export_per_layer
from lightning_prune.integrations.text.calibration_text import Text
from lightning_prune.integrations.text.hf_calibration import check_text_fits, read_by_text, text_part_alone
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import outputs
from lightning_prune.structured.discovery.probe_inputs import probes, with_few_answers
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.method import StructuredMethod
from lightning_prune.structured.overview import overview, refusals
from lightning_prune.structured.shrink import check_same, promised, shrink
from lightning_prune.structured.structure import Structure

__all__ = ["inspect_model", "replay_plan", "run_shrink"]

logger = logging.getLogger(__name__)


def run_shrink(
    recipe: Recipe,
    *,
    model: str,
    out: str,
    text: Text | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    state_file: str | None = None,
) -> dict[str, dict[str, float | None]]:
    """Make a model smaller by the method of a recipe, and write it.

    Args:
        recipe: with a section `shrink.method`.
        model: a model folder or a hub id.
        out: a folder that does not exist yet or is empty.
        text: the calibration text.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run a modelling file that comes with the model.
        state_file: where a search keeps its finished scores and finds those of an interrupted one.

    Returns:
        parameters and loss on held-out text, each before and after.

    Raises:
        ValueError: if an input is wrong, or the model cannot be cut as asked. No model has been written then; a plan
            that was made but cannot be carried out is kept beside the folder.
    """
    method = None if recipe.shrink is None else recipe.shrink.method
    if method is None:
        raise ValueError(f"recipe {recipe.name} has no shrink.method; it masks, and hf_oneshot.run_oneshot runs it")
    job = _Job(_Source(model, device, trust_remote_code), out, text or Text(), method=method)
    with text_part_alone(job.model, job.batches if method.needs_batches else ()):
        plan = method.plan(job.model, job.structure, job.batches, state_file=state_file)
    is_per_layer = recipe.export is not None and recipe.export.format == "per_layer"
    try:
        return job.write(plan, is_per_layer=is_per_layer, repaired=method.repairs, recipe=recipe.as_dict())
    except (ValueError, RuntimeError) as error:
        kept = Path(f"{out}.plan.json").expanduser()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(plan.as_dict(), indent=2) + "\n", encoding="utf-8")
        raise ValueError(f"{error}; no model was written, the plan is kept in {kept}") from error


def replay_plan(
    plan_file: str,
    *,
    model: str,
    out: str,
    text: Text | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float | None]]:
    """Cut a fresh parent by a stored plan, and write it.

    Args:
        plan_file: a `lightning_prune.json`, the folder it lies in, or a plan alone.
        model: the parent, a model folder or a hub id.
        out: a folder that does not exist yet or is empty.
        text: for the loss before and after.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Returns:
        parameters and loss on held-out text, each before and after.

    Raises:
        ValueError: if the file holds no plan, or the plan does not fit the model; nothing has been written then.
    """
    plan, note = read_plan(plan_file)
    if note.get("repaired"):
        logger.warning(
            "the plan came with repaired weights (%s), which it does not hold: its cut is repeated, the repair is not",
            plan.method.get("name"),
        )
    job = _Job(_Source(model, device, trust_remote_code), out, text or Text(), normalises=bool(plan.share))
    return job.write(
        plan, is_per_layer=bool(plan.skip or plan.share) or note.get("form", "stock") != "stock", repaired=False
    )


def inspect_model(
    name: str, *, device: str = "auto", trust_remote_code: bool = False
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return a table of what can be cut from a model, and one sentence for each thing that cannot.

    Raises:
        ValueError: if the model cannot be opened, or not be built from its configuration.
    """
    model, _ = load_model(name, device=device, trust_remote_code=trust_remote_code)
    structure = discover(model)
    return overview(structure), refusals(structure)


class _Source(NamedTuple):
    """Where a model comes from, and how it is opened."""

    name: str
    device: str
    trust_remote_code: bool


class _Job:
    """One model on its way from one folder to another."""

    def __init__(
        self,
        source: _Source,
        out: str,
        text: Text,
        *,
        method: StructuredMethod | None = None,
        normalises: bool = False,
    ) -> None:
        check_free(out)
        documents = text.read()
        self.out = out
        self.model, self.tokenizer = load_model(
            source.name, device=source.device, trust_remote_code=source.trust_remote_code
        )
        needs_text = normalises or (method is not None and method.needs_batches)
        if needs_text and method is not None:
            check_text_fits(self.model, method)
        logger.info("looking for what can be cut from %s", source.name)
        self.structure: Structure = discover(self.model)
        self.passages = text.passages(self.model, self.tokenizer, documents, needed=needs_text)
        self.batches = self.passages.calibration
        if needs_text and method is not None:
            self.structure = read_by_text(self.structure, self.model, self.batches)
        self.before = num_parameters(self.model)
        self.loss_before = self.passages.loss(self.model, title="loss before")

    def write(
        self, plan: Plan, *, is_per_layer: bool, repaired: bool, recipe: dict[str, Any] | None = None
    ) -> dict[str, dict[str, float | None]]:
        """Cut the model and write it, with the plan."""
        write = self._write_per_layer if is_per_layer else self._write_stock
        metrics = write(plan, repaired, recipe)
        counts, losses = metrics["parameters"], metrics["loss"]
        logger.info("parameters: %d -> %d", counts["before"], counts["after"])
        self.passages.tell(losses["before"], losses["after"])
        logger.info("written to %s", self.out)
        return metrics

    def _metrics(self, small: nn.Module) -> dict[str, dict[str, float | None]]:
        loss = self.passages.loss(small, title="loss after")
        return {
            "parameters": {"before": self.before, "after": num_parameters(small)},
            "loss": {"before": self.loss_before, "after": loss},
        }

    def _write_stock(
        self, plan: Plan, repaired: bool, recipe: dict[str, Any] | None
    ) -> dict[str, dict[str, float | None]]:
        """Write a stock folder; parent, smaller model and the folder as it loads are never all in memory."""
        text = self._text()
        expected = promised(self.model, self.structure, plan, text)
        small = shrink(self.model, plan, structure=self.structure, consume=True)
        check_same(small, text, expected)
        metrics = self._metrics(small)
        note = plan_note(plan, parent=self.model, repaired=repaired, metrics=metrics, recipe=recipe)
        batches = (*probes(small), *text)
        given = [outputs(small, batch) for batch in batches]
        folder = export_huggingface(small, self.out, tokenizer=self.tokenizer, plan_note=note)
        del small
        self._check_opens(folder, batches, given)
        return metrics

    def _write_per_layer(
        self, plan: Plan, repaired: bool, recipe: dict[str, Any] | None
    ) -> dict[str, dict[str, float | None]]:
        """Write blocks of different shapes; the numbers are those of the folder as it loads."""
        text = [] if plan.skip or plan.share else self._text()
        expected = promised(self.model, self.structure, plan, text) if text else []
        folder = export_per_layer(
            self.model,
            plan,
            self.out,
            structure=self.structure,
            tokenizer=self.tokenizer,
            batches=self.passages.calibration or self.passages.held_out,
        )
        metrics = self._metrics(self._check_opens(folder, text, expected))
        written = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
        note = plan_note(plan, parent=self.model, repaired=repaired, metrics=metrics, recipe=recipe) | written
        (folder / PLAN_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        return metrics

    def _text(self) -> list[dict[str, Tensor]]:
        """Return one row of the calibration text, on which the cut must be exact too."""
        rows = [
            {name: value[:1] for name, value in batch.items() if name != "labels"}
            for batch in (self.batches or self.passages.held_out)[:1]
        ]
        return [with_few_answers(self.model, row) for row in rows]

    def _check_opens(
        self, folder: Path, batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Tensor]
    ) -> PreTrainedModel:
        """Return the model that a written folder gives; the folder does not stay if it is not what was proven.

        Raises:
            ValueError: if it does not open.
            RuntimeError: if it computes something else.
        """
        try:
            model, _ = load_model(str(folder), device=str(self.model.device), trust_remote_code=True)
            check_same(model, batches, expected)
        except (ValueError, RuntimeError):
            shutil.rmtree(folder)
            raise
        return model
