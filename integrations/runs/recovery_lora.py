"""The adapters of a recipe's section `recover.lora`: put on before the optimizer is made."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.recovery.retrain import parameters_of_part

__all__ = ["RecoveryLora"]


class RecoveryLora:
    """The section `recover.lora` of one recipe at work.

    Args:
        recipe: with that section.
        sparsifier: holds the masks.

    Raises:
        ValueError: if the section cannot be used.
        ImportError: if PEFT is missing.
    """

    def __init__(self, recipe: Recipe, sparsifier: Sparsifier) -> None:
        assert recipe.recover is not None
        assert recipe.recover.lora is not None
        self.options, self._retrain = recipe.recover.lora, recipe.recover.retrain
        self._sparsifier, self._seed = sparsifier, recipe.seed
        export = recipe.export
        self._merges = export is not None and export.dir is not None and export.format != "adapter"
        _peft().check_config(self.options.form, self.options.config)
        if self.options.form == "plain" and recipe.prune is not None and self._merges:
            raise ValueError(
                "recover.lora.form plain is dense, so merging it would fill the zeros that this recipe prunes; use "
                "form masked or scaled, or export.format adapter"
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with adapters, those of the program where it has made some.

        Raises:
            ValueError: if the options do not fit the model.
        """
        options, adapters = self.options, _peft()
        mask_of = self._sparsifier.mask_of

        def held(parameter: Tensor) -> Tensor | None:  # a plain function: copies of the model share it
            return mask_of(parameter)

        if isinstance(model, adapters.PeftModel):
            if options.config or self._retrain:
                given = "recover.lora.config" if options.config else "recover.retrain"
                raise ValueError(
                    f"this program makes a LoRA by itself, so {given} would contradict it; leave it out and use the "
                    "program's own options (bias, modules_to_save)"
                )
            adapters.take_over_lora(model, form=options.form, masks=held)
            wrapped = model
        else:
            config, saved = self._with_parts(model, options.config)
            with torch.random.fork_rng():  # the same start in every trainer and on every rank
                torch.manual_seed(self._seed)
                wrapped = adapters.add_lora(model, form=options.form, config=config, masks=held, modules_to_save=saved)
        self._sparsifier.surrogate = adapters.LoraGradients(wrapped)
        if self._merges:
            _merging().check_merge(wrapped)
        return wrapped

    def _with_parts(self, model: nn.Module, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the LoRA's configuration and the modules trained whole, for the parts that `retrain` names."""
        result, saved = dict(config), []
        for part in self._retrain:
            names = parameters_of_part(model, part)
            if part == "biases":
                result.setdefault("bias", "all")
                continue
            is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
            if part in ("head", "embeddings") and is_tied:
                raise ValueError(
                    f"recover.retrain: {part} beside a LoRA would train a copy of a weight that head and embeddings "
                    "share, and untie them; leave it out, or retrain without lora"
                )
            saved += [name.rpartition(".")[0] for name in names]
        return result, list(dict.fromkeys(saved))


def _peft() -> Any:
    return importlib.import_module("lightning_prune.integrations.lora.peft_lora")


def _merging() -> Any:
    return importlib.import_module("lightning_prune.integrations.lora.peft_merge")
