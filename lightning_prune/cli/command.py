"""The `lightning-prune` command.

Exit codes: 0 done, 1 failed, 2 wrong usage or wrong input, with one line that says what to change. Adapters are
imported inside the command that needs them.
"""

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from lightning_prune.base import registry
from lightning_prune.base.names import shorten
from lightning_prune.cli import options as cli_options
from lightning_prune.cli.overrides import OWN_SECTIONS, RUN_SECTIONS, refuse, split

__all__ = ["main"]

_CLOSED_PIPE = 141  # 128 + SIGPIPE, as other programs end
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; that of this process if left out.

    Returns:
        The exit code.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _answer(tokens)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has seen enough, as `head` does
        _leave_stdout()
        return _CLOSED_PIPE
    except OSError as error:  # the output goes to a file on a full disk
        _leave_stdout()
        return _tell(f"the output cannot be written: {error.strerror or error}", code=1)


def _answer(tokens: list[str]) -> int:
    """Run a command; what is wrong is told in one line, and where it came from only when that is asked for."""
    is_traced = "--traceback" in tokens[: tokens.index("--")] if "--" in tokens else "--traceback" in tokens
    is_own_program = False
    try:
        options, rest = _parse(tokens)
        is_own_program = options.command is _run  # whose own errors need their traceback
        with _log_on_stderr():
            return int(options.command(options, rest))
    except KeyboardInterrupt:
        return _tell("interrupted", code=130)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if is_traced:
            raise
        return _tell(_sentence(error), code=1 if getattr(error, "errno", None) in _NO_ROOM else 2)
    except Exception as error:  # of libraries, for files and devices that are not what they seem
        if is_traced or is_own_program:
            raise
        return _tell(f"{type(error).__name__}: {_sentence(error)}; --traceback shows where it came from", code=1)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return shorten(str(error), 1000)


def _tell(message: str, *, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _leave_stdout() -> None:
    """Send what is still waiting to be written nowhere, or the interpreter would try, and complain, as it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, to be told like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process."""
        raise ValueError(f"{message}; see {self.prog} --help")


def _parse(tokens: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a command, and the tokens it passes on."""
    command_line: list[str] = []
    if "--" in tokens:
        split = tokens.index("--")
        tokens, command_line = tokens[:split], tokens[split + 1 :]
    options, rest = _parser().parse_known_args(tokens)
    if command_line and options.command is not _exec:
        raise ValueError("only exec takes a program after --")
    options.program = command_line
    return options, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-prune", description="Prune language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Any, text: str, *, takes_recipe: bool = True) -> argparse.ArgumentParser:
        epilog = cli_options.OVERRIDES if takes_recipe else None
        added = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
        added.add_argument("--traceback", action="store_true", help="show where an error came from")
        if takes_recipe:
            added.add_argument("--print_config", action="store_true", help="print the whole recipe and do nothing")
        added.set_defaults(command=command)
        return added

    cli_options.add_run(add("run", _run, "Train and prune with Lightning, from a recipe."))
    cli_options.add_oneshot(
        add("oneshot", _oneshot, "Prune or shrink a model once, from calibration text, and export it.")
    )
    cli_options.add_inspect(
        add("inspect", _inspect, "Show what can be cut from a model, and what not.", takes_recipe=False)
    )
    cli_options.add_exec(add("exec", _exec, "Run an unmodified training program with the recipe's callback added."))
    cli_options.add_quickstart(
        add("quickstart", _quickstart, "Train, prune, evaluate and export a small model, on local text.")
    )
    cli_options.add_eval(add("eval", _eval, "Evaluate a model folder with lm-eval.", takes_recipe=False))
    cli_options.add_select(
        add("select", _select, "Write the small model of one instruction as a plain model folder.", takes_recipe=False)
    )
    cli_options.add_export(add("export", _export, "Write a sparse model folder in another form.", takes_recipe=False))
    add("methods", _methods, "List what recipes can choose from, with sources.", takes_recipe=False)
    return parser


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    overrides, passed_on = split(rest, passed_on=RUN_SECTIONS)
    sys.path.insert(0, os.getcwd())  # the user's own classes, as with `python -m`
    adapter = _adapter("trainers.lightning_cli", "lightning-prune run", "lightning")
    code: int = adapter.run_recipe(
        options.config,
        passed_on,
        overrides=overrides,
        ckpt_path=options.ckpt_path,
        print_config=options.print_config,
    )
    return code


def _oneshot(options: argparse.Namespace, rest: list[str]) -> int:
    overrides, _ = split(rest)
    if (options.config is None) == (options.plan is None):
        if options.plan is None:
            raise ValueError("the following arguments are required: --config, or --plan in its place")
        raise ValueError("--plan repeats a cut without a recipe; leave out --config")
    if options.print_config and options.config is not None:
        return _print_recipe(options.config, overrides)
    if options.model is None or options.out is None:
        raise ValueError("oneshot needs --model and --out; see lightning-prune oneshot --help")
    recipe = None if options.config is None else _load(options.config, overrides)
    if recipe is None or (recipe.shrink is not None and recipe.shrink.method is not None):
        return _shrink(options, recipe, overrides)
    if options.state_file is not None:
        raise ValueError("--state_file has no effect: this recipe does not search; leave it out")
    names = ("model", "out", "data", "num_sequences", "sequence_length", "batch_size", "device", "trust_remote_code")
    given = {name: getattr(options, name) for name in names}
    if recipe.condition is not None and not recipe.condition.is_trained:
        _adapter("instruction.tasks", "lightning-prune oneshot", "hf").run_tasks(recipe, **given)
    else:
        adapter = _adapter("folders.hf_oneshot", "lightning-prune oneshot", "hf")
        adapter.run_oneshot(options.config, overrides=overrides, **given)
    return 0


def _shrink(options: argparse.Namespace, recipe: Any, overrides: Sequence[str]) -> int:
    """Make a model smaller by the method of a recipe, or without one by a stored plan."""
    adapter = _adapter("folders.hf_shrink", "lightning-prune oneshot", "hf")
    text = _adapter("text.calibration_text", "lightning-prune oneshot", "hf").Text(
        data=options.data,
        num_sequences=options.num_sequences,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        seed=0 if recipe is None else recipe.seed,
    )
    common = {name: getattr(options, name) for name in ("model", "out", "device", "trust_remote_code")} | {"text": text}
    if recipe is not None:
        adapter.run_shrink(recipe, state_file=options.state_file, **common)
        return 0
    if overrides or options.state_file is not None:
        given = f"--{overrides[0]}" if overrides else "--state_file"
        raise ValueError(f"{given} has no effect with --plan, which holds what stays; leave it out")
    adapter.replay_plan(options.plan, **common)
    return 0


def _inspect(options: argparse.Namespace, rest: list[str]) -> int:
    if options.config is not None:
        recipe = _load(options.config, split(rest)[0])
        tables, sentence = _adapter("folders.hf_inspect", "lightning-prune inspect", "hf").inspect_targets(
            recipe, options.model, total_steps=options.total_steps, trust_remote_code=options.trust_remote_code
        )
        for table in tables:
            _print_table(table)
            print()
        print(sentence)
        return 0
    refuse(rest)
    if options.total_steps is not None:
        raise ValueError("--total_steps has no effect without --recipe; leave it out")
    rows, refused = _adapter("folders.hf_shrink", "lightning-prune inspect", "hf").inspect_model(
        options.model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    _print_table(rows)
    if refused:
        print("\nnot to be cut:")
        for sentence in refused:
            print(f"  {sentence}")
    return 0


def _exec(options: argparse.Namespace, rest: list[str]) -> int:
    overrides, _ = split(rest)
    if options.print_config:
        return _print_recipe(options.config, overrides)
    adapter = _adapter("programs.exec_inject", "lightning-prune exec", "hf")
    code: int
    if not overrides:
        code = adapter.run_exec(options.config, options.program)
        return code
    recipe = _load(options.config, overrides)
    with tempfile.TemporaryDirectory(prefix="lightning_prune_") as folder:
        path = Path(folder, f"{Path(recipe.name).name}.yaml")
        path.write_text(recipe.dump(), encoding="utf-8")
        code = adapter.run_exec(str(path), options.program)
    return code


def _quickstart(options: argparse.Namespace, rest: list[str]) -> int:
    overrides, _ = split(rest, own=(*OWN_SECTIONS, *RUN_SECTIONS))
    if options.print_config:
        return _print_recipe(options.config, overrides)
    adapter = _adapter("demo.quickstart", "lightning-prune quickstart", "all")
    code: int = adapter.run_quickstart(options.config, model=options.model, out=options.out, overrides=overrides)
    return code


def _select(options: argparse.Namespace, rest: list[str]) -> int:
    refuse(rest)
    adapter = _adapter("instruction.selected", "lightning-prune select", "hf")
    print(
        adapter.export_selected(
            options.model,
            options.out,
            instruction=options.instruction,
            task=options.task,
            texts=options.texts,
            keep=options.keep,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    )
    return 0


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    refuse(rest)
    out = options.out and importlib.import_module("lightning_prune.export.folder").check_file(options.out)
    loading = _adapter("instruction.folder", "lightning-prune eval", "hf")
    harness = _adapter("evaluation.lm_eval_harness", "lightning-prune eval", "eval")
    is_trusted = options.trust_remote_code
    model, tokenizer = loading.open_any(options.model, device=options.device, trust_remote_code=is_trusted)
    results = harness.evaluate_model(
        model,
        tokenizer,
        tasks=[task for group in options.tasks for task in group.split(",") if task],
        include_path=options.include_path,
        limit=options.limit,
        batch_size=options.batch_size,
        num_fewshot=options.num_fewshot,
        mask_from=options.mask_from,
        instruction=options.instruction,
    )
    rows = [(task, name, f"{value:.4f}") for task, values in results.items() for name, value in values.items()]
    _print_table([("task", "metric", "value"), *rows])
    if out:
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    refuse(rest)
    adapter = _adapter("folders.hf_oneshot", "lightning-prune export", "hf")
    form, is_trusted = options.format, options.trust_remote_code
    print(adapter.export_model(options.model, options.out, form=form, trust_remote_code=is_trusted))
    return 0


def _methods(options: argparse.Namespace, rest: list[str]) -> int:
    refuse(rest)
    for room in registry.rooms():
        print(f"{room}:")
        width = max(14, *(len(entry.cls.__name__) + 2 for entry in registry.entries(room)))
        for entry in registry.entries(room):
            print(f"  {entry.cls.__name__:<{width}}{entry.summary}")
            if entry.source:
                print(
                    textwrap.fill(f"Source: {entry.source}", 118, initial_indent=" " * 16, subsequent_indent=" " * 16)
                )
        print()
    print("recipes:")
    for name, path in importlib.import_module("lightning_prune.recipe.recipe").packaged_recipes().items():
        with path.open(encoding="utf-8") as file:
            print(f"  {name:<28}{file.readline().removeprefix('#').strip()}")
    return 0


def _load(config: str, overrides: Sequence[str]) -> Any:
    recipe = importlib.import_module("lightning_prune.recipe.recipe").Recipe.load(config, overrides=overrides)
    if recipe.recover and (lora := recipe.recover.lora) is not None and lora.config:
        _adapter("lora.peft_lora", "recover.lora", "peft").check_config(lora.form, lora.config)  # PEFT knows its fields
    return recipe


def _print_recipe(config: str, overrides: Sequence[str]) -> int:
    print(_load(config, overrides).dump(), end="")
    return 0


def _adapter(module: str, command: str, extra: str) -> ModuleType:
    """Import an adapter; if what it adapts is not installed, say which extra brings it."""
    try:
        return importlib.import_module(f"lightning_prune.integrations.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lightning_prune"):
            raise
        hint = f'{command} needs {error.name}: pip install "lightning_prune[{extra}]"'
        raise ModuleNotFoundError(hint, name=error.name) from error


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show what the library logs while a command runs."""
    library = logging.getLogger("lightning_prune")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _version() -> str:
    try:
        return f"lightning_prune {importlib.metadata.version('lightning_prune')}"
    except importlib.metadata.PackageNotFoundError:
        return "lightning_prune, from a checkout that is not installed"
