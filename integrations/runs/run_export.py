"""What a pruning run writes: the pruned model in the form that its recipe names, checked before and after.

Everything that can be known is checked when a training starts: the folder by writing into it, the model by its kind.
What was written is read back and its zeros are compared with those of the model.
"""

import dataclasses
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.types import Report
from lightning_prune.export.dense import export_dense
from lightning_prune.export.folder import check_free, check_writable
from lightning_prune.export.huggingface import check_form, export_huggingface
from lightning_prune.export.plan_note import num_parameters, plan_note
from lightning_prune.export.read_back import zeros_lost
from lightning_prune.granularity import Channel
from lightning_prune.integrations.instruction.condition_run import ConditionRun
from lightning_prune.integrations.models.language_model import language_model
from lightning_prune.integrations.runs.recovery_run import RecoveryRun
from lightning_prune.recipe.recipe import Export, Recipe
from lightning_prune.schedules import Existing
from lightning_prune.structured.cut_zeros import check_masks_cut_units, cut_zeros

__all__ = ["RunExport"]

logger = logging.getLogger(__name__)

_ADAPTER = "adapter"  # the subfolder of an adapter that belongs to the base beside it


class RunExport:
    """The section `export` of one recipe at work.

    Args:
        recipe: its sections `export` and `shrink`.
        recovery: what was made of its section `recover`, or None.
        condition: the same of its section `condition`.
    """

    def __init__(self, recipe: Recipe, recovery: RecoveryRun | None, condition: ConditionRun | None = None) -> None:
        self.recipe, self.recovery, self.condition = recipe, recovery, condition
        self.options: Export | None = recipe.export if recipe.export is not None and recipe.export.dir else None
        self.notes: list[str] = []

    @property
    def folder(self) -> str | None:
        """Return where the export goes; None if there is none."""
        return None if self.options is None else self.options.dir

    def moved(self, folder: Path) -> "RunExport":
        """Return the same export into another folder."""
        assert self.options is not None
        moved = RunExport(self.recipe, self.recovery, self.condition)
        moved.options, moved.notes = dataclasses.replace(self.options, dir=str(folder)), self.notes
        return moved

    @property
    def _has_lora(self) -> bool:
        return self.recovery is not None and self.recovery.has_lora

    def check(self, model: nn.Module, *, saves_whole: bool) -> None:
        """Check that this model can be written there in the end, and say what is written if there is no folder.

        Args:
            model: what is trained.
            saves_whole: whether the trainer's own checkpoints hold the weights below adapters.

        Raises:
            ValueError: if it cannot, or if nothing would write the weights that are pruned.
        """
        self.notes = []
        found = language_model(model)
        has_adapters = bool(getattr(found, "peft_config", None))
        if self.options is None:
            if has_adapters:
                self._say_where_adapters_go(saves_whole=saves_whole)
            return
        assert self.options.dir is not None
        if self.options.format == "huggingface":
            merges = self._has_lora or self._keeps_apart(found)
            check_form(model if found is None else found, merges=merges)
        self._check_folder(self.options.dir, next(model.parameters()).device)

    def check_units(self, model: nn.Module, *, is_restoring: bool) -> None:
        """Check, in a new training and before adapters are there, that its masks can end in a smaller model.

        Raises:
            ValueError: if they cannot.
        """
        is_checked = self.recovery is not None and self.recovery.is_prepared
        if self.recipe.shrink is None or is_restoring or is_checked:
            return
        found, prune = language_model(model), self.recipe.masking()
        if found is None:
            raise ValueError("shrink.zeros cuts a Hugging Face model, and none was found in this training")
        assert isinstance(prune.granularity, Channel)
        check_masks_cut_units(found, prune.targets.resolve(model), prune.granularity.width)

    def _check_folder(self, folder: str, device: torch.device) -> None:
        """Check on one rank, and fail on all: the others know nothing of what this program has written."""
        problem = None
        if distributed.is_first_rank():
            try:
                assert self.options is not None
                out = check_free(folder, overwrite=self.options.overwrite, recipe=self.recipe.as_dict())
                check_writable(out if out.is_dir() else out.parent)
                if out.is_dir() and any(out.iterdir()):
                    logger.warning("%s holds an earlier export, which the one of this training will replace", out)
            except ValueError as error:
                problem = error
        if not distributed.agree(problem is None, device):
            raise problem or ValueError(f"the first process cannot write to the export folder {folder}")

    def _keeps_apart(self, model: nn.Module | None) -> bool:
        """Return whether the model carries adapters that the program trains beside the weights that are pruned."""
        return self.recovery is None and bool(getattr(model, "peft_config", None))

    @property
    def _prunes(self) -> bool:
        return self.recipe.prune is not None and not isinstance(self.recipe.prune.schedule, Existing)

    def _say_where_adapters_go(self, *, saves_whole: bool) -> None:
        if self._has_lora:
            lost = ", and the model below it, which this recipe prunes, is written nowhere" if self._prunes else ""
            distributed.log(
                logger,
                logging.WARNING,
                "export.dir is not set: what the trainer saves is the adapter alone%s. It opens on the pruned model "
                "with lightning_prune.integrations.peft_lora.open_adapter(model, FOLDER), stock PEFT refuses it; set "
                "export.dir to write the merged model",
                lost,
            )
        elif self._prunes and saves_whole:
            distributed.log(
                logger,
                logging.WARNING,
                "the recipe prunes weights below adapters that this program trains: checkpoints hold both, but the "
                "save_pretrained of this model writes the adapter alone; set export.dir to write both at the end",
            )
        elif self._prunes:
            raise ValueError(
                "this program trains adapters over the weights that the recipe prunes, and what the trainer saves is "
                "the adapter alone: the pruned weights would be lost. Set export.dir, to which the pruned model and "
                "the adapter are written; or prune first (lightning-prune oneshot) and train the adapter with "
                "recovery/mask_lora; or train without adapters"
            )

    def write(self, model: nn.Module, report: Report, *, tokenizer: Any) -> str | None:
        """Write what was trained, and read it back; collective.

        Returns:
            in what the folder differs from the model; None if it does not, or nothing was written.

        Raises:
            ValueError: if it cannot be written so.
            OSError: if the disk refuses.
        """
        if self.options is None:
            return None
        options = self.options
        assert options.dir is not None
        found = language_model(model)
        is_huggingface = options.format in ("huggingface", "conditional") or self._has_lora
        exported = found if is_huggingface and found is not None else model
        state = distributed.whole_state_dict(exported)
        if not distributed.is_first_rank():
            return None
        common: dict[str, Any] = {"recipe": self.recipe.as_dict(), "overwrite": options.overwrite}
        if self.condition is not None:
            self.condition.export(exported, options.dir, state=state, tokenizer=tokenizer, **common)
            return None
        if options.format == "adapter" and self.recovery is not None:
            self.recovery.export_adapter(exported, options.dir, state=state, tokenizer=tokenizer, **common)
            return None
        if self._has_lora and self.recovery is not None:
            exported, state = self.recovery.merged(exported, state)
            report = self.recovery.merged_report(exported, state, report)
        if self.recipe.shrink is not None:
            self._write_smaller(exported, state, report, tokenizer, common)
            return None
        return self._write_whole(exported, state, report, tokenizer, common)

    def _write_whole(
        self, exported: nn.Module, state: Mapping[str, Tensor], report: Report, tokenizer: Any, common: dict[str, Any]
    ) -> str | None:
        assert self.options is not None
        assert self.options.dir is not None
        out = self.options.dir
        common = common | {"report": report}
        if self.options.format != "huggingface":
            export_dense(exported, out, state_dict=state, **common)
        elif self._keeps_apart(exported):
            self._write_apart(exported, state, tokenizer, common)
        else:
            export_huggingface(exported, out, tokenizer=tokenizer, merges=self._has_lora, state_dict=state, **common)
        logger.info("exported: %s", out)
        return zeros_lost(out, report)

    def _write_apart(
        self, wrapped: nn.Module, state: Mapping[str, Tensor], tokenizer: Any, common: dict[str, Any]
    ) -> None:
        """Write the pruned model as a folder of its own, and the adapter in a subfolder that names it."""
        assert self.options is not None
        out = str(Path(str(self.options.dir)).expanduser())
        merging = importlib.import_module("lightning_prune.integrations.lora.peft_merge")
        base, weights = merging.base_state(wrapped, state)

        def beside(folder: Path) -> None:
            merging.write_beside(wrapped, folder / _ADAPTER, base_folder=out, state=state)

        export_huggingface(base, out, tokenizer=tokenizer, merges=True, state_dict=weights, beside=beside, **common)
        self.notes.append(
            f"{out} holds the pruned model, and {out}/{_ADAPTER} the adapter that was trained over it, not merged: "
            f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{out}"), "{out}/{_ADAPTER}"); merging it '
            "would fill the zeros"
        )
        logger.info("%s", self.notes[-1])

    def _write_smaller(
        self, masked: nn.Module, state: Mapping[str, Tensor], report: Report, tokenizer: Any, common: dict[str, Any]
    ) -> None:
        """Write the model without its masked units; if they cannot be cut, the masked model, and say so.

        Raises:
            ValueError: if the units cannot be cut.
        """
        folder = str(self.folder)
        before = num_parameters(masked)
        try:
            small, plan = cut_zeros(masked, state)
        except (ValueError, RuntimeError) as error:
            self.notes.append(f"not shrunk: {error}")
            whole = dataclasses.replace(report, notes=(*report.notes, *self.notes))
            self._write_whole(masked, state, whole, tokenizer, common)
            raise ValueError(f"{error}; {folder} holds the masked model in its full shape") from error
        after = num_parameters(small)
        self.notes += [*plan.method["notes"], f"shrunk: {before} parameters before, {after} after"]
        counts = {"parameters": {"before": before, "after": after}}
        note = plan_note(plan, parent=masked, repaired=True, metrics=counts, recipe=common["recipe"])
        export_huggingface(small, folder, tokenizer=tokenizer, plan_note=note, overwrite=common["overwrite"])
        logger.info("shrunk from %d to %d parameters; exported: %s", before, after, folder)
