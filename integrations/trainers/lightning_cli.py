"""Train and prune from the command line: LightningCLI with the recipe's callback added.

The recipe's `trainer`, `model` and `data` sections are LightningCLI's and take every option it takes; the library's own
sections are read by `lightning_prune.recipe.recipe`, as in every other way of running a recipe.
"""

import importlib
import logging
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_prune.integrations.text.text_data import TextData
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from lightning_prune.recipe.recipe import Recipe, one_line

__all__ = ["RecipeCLI", "run_recipe"]

logger = logging.getLogger(__name__)

_CAUSAL_LM = "lightning_prune.integrations.causal_lm.CausalLM"
_UNKNOWN_CLASS = re.compile(r"(?:GLOBAL|global|class) ([\w.]+\.\w+)")  # in what torch says of a file
_SECTIONS = ("trainer", "model", "data")


def run_recipe(
    config: str,
    arguments: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    ckpt_path: str | None = None,
    print_config: bool = False,
) -> int:
    """Train the recipe's model on its data with its pruning, or show what would run.

    Args:
        config: a packaged recipe name or a path.
        arguments: command-line arguments for the trainer, model and data sections.
        overrides: `section.key=value` for the library's own sections.
        ckpt_path: a checkpoint to resume from.
        print_config: print the whole configuration and do nothing.

    Returns:
        0.

    Raises:
        ValueError: if the recipe or an argument is wrong.
    """
    recipe = Recipe.load(config, overrides=overrides)
    arguments = list(_name_model(recipe, arguments))
    if recipe.model is None and not any(argument.startswith("--model") for argument in arguments):
        raise ValueError(f"recipe {recipe.name} has no model section; give --model a class, a path or a hub id")
    if ckpt_path is not None and not print_config:
        _check_checkpoint(Path(ckpt_path).expanduser())
    try:
        cli = RecipeCLI(recipe, arguments, is_dry=print_config)
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{config}: {one_line(error)}") from error
    if print_config:
        print(cli.whole_config(), end="")  # noqa: T201
        return 0
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    return 0


def _check_checkpoint(path: Path) -> None:
    """Refuse a file that holds no checkpoint; what is no file (`last`, an address, a folder) is left to Lightning.

    The tensors in it stay on the disk.

    Raises:
        ValueError: if it is damaged, no checkpoint of Lightning, or holds what could run code.
    """
    if not path.is_file():
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:
        unknown = _UNKNOWN_CLASS.search(str(error))
        if unknown is not None:
            raise ValueError(
                f"the checkpoint {path} holds a {unknown[1]}, and opening it could run code: keep hyperparameters as "
                "plain values (save_hyperparameters(ignore=...)), or resume in a program of your own"
            ) from error
        raise ValueError(
            f"cannot read the checkpoint {path}: it is truncated or damaged; use an earlier one"
        ) from error
    lacking = (
        [name for name in ("pytorch-lightning_version", "state_dict") if name not in content]
        if isinstance(content, dict)
        else ["everything"]
    )
    if lacking:
        raise ValueError(
            f"{path} is no checkpoint of a Lightning training (it lacks {lacking[0]}); name one that ModelCheckpoint "
            "has written, or give a model folder as --model"
        )


class RecipeCLI(LightningCLI):
    """LightningCLI over the `trainer`, `model` and `data` sections of a recipe."""

    def __init__(self, recipe: Recipe, arguments: Sequence[str], *, is_dry: bool = False) -> None:
        self.recipe = recipe
        self._is_dry = is_dry
        sections = {key: getattr(recipe, key) for key in _SECTIONS if getattr(recipe, key) is not None}
        super().__init__(
            args=["--config", yaml.safe_dump(sections), *arguments] if sections else list(arguments),
            run=False,
            seed_everything_default=recipe.seed,
            trainer_defaults={"callbacks": []},
            save_config_callback=_SaveWholeConfig,
            save_config_kwargs={"text": self.whole_config, "overwrite": True, "save_to_log_dir": False},
            parser_kwargs={"exit_on_error": False},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; those of the process belong to the command that made them."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data, unless only the configuration is wanted."""
        if not self._is_dry:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the recipe's callback, which looks for the tasks that the data may write."""
        if isinstance(self.datamodule, TextData):
            self.datamodule.write_tasks()
        self.trainer_defaults = {"callbacks": [PruningCallback(self.recipe)]}
        return super().instantiate_trainer(**kwargs)

    def whole_config(self) -> str:
        """Return the recipe as YAML, with every trainer, model and data option written out."""
        with_nulls = self.parser.dump(self.config, "parser_mode", False, skip_link_targets=False)
        config = yaml.safe_load(with_nulls)
        sections = {key: config[key] for key in _SECTIONS if config.get(key) is not None}
        return yaml.safe_dump(self.recipe.as_dict() | sections, sort_keys=False, width=120)


class _SaveWholeConfig(SaveConfigCallback):
    """Save the recipe as it ran beside the logs, in a form that `run --config` reads."""

    def __init__(self, *args: Any, text: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._text = text

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` into the run's log folder, if it has one."""
        if trainer.log_dir is not None and trainer.is_global_zero:
            folder = Path(trainer.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.config_filename).write_text(self._text(), encoding="utf-8")


def _name_model(recipe: Recipe, arguments: Sequence[str]) -> Iterator[str]:
    """Turn `--model PATH_OR_HUB_ID` into the `model` argument of the recipe's model class, or of CausalLM."""
    tokens = iter(arguments)
    for token in tokens:
        value = next(tokens, None) if token == "--model" else token.removeprefix("--model=")
        if token != "--model" and not token.startswith("--model="):
            yield token
        elif value is None:
            raise ValueError("--model needs a value: a class, a path or a hub id")
        elif _is_class(value):
            yield f"--model={value}"
        else:
            if recipe.model is None:
                yield f"--model={_CAUSAL_LM}"
            yield f"--model.model={value}"


def _is_class(value: str) -> bool:
    """Return whether a value names a LightningModule and not a folder or a hub id.

    Raises:
        ValueError: if it looks like a dotted class path that does not import.
    """
    if "/" in value or Path(value).expanduser().is_dir():
        return False
    module, dot, name = value.rpartition(".")
    if not dot:
        return any(cls.__name__ == value for cls in _subclasses(LightningModule))
    try:
        is_found = hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        is_found = False
    if not is_found:
        raise ValueError(
            f"--model {value} is neither a class that can be imported, a folder, nor a hub id such as org/name"
        )
    return True


def _subclasses(base: type[object]) -> Iterator[type[object]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)
