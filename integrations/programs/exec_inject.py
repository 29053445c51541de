"""Run an unmodified training program with the pruning callback in every Trainer it constructs.

The program runs in a process of its own. Its environment names the recipe and puts `exec_site/` in front of PYTHONPATH;
the `sitecustomize.py` in there hands the arguments of every Trainer construction to `add_callback`. Because the
environment alone carries this, it reaches all Python processes the program starts: the workers of torchrun and
accelerate, the ranks that Lightning starts.

Not reached: interpreters started with -E, -I or -S, and programs that clear PYTHONPATH. `run_exec` sees it and says so.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.integrations.programs.exec_process import run_process
from lightning_prune.recipe.recipe import Recipe

__all__ = ["EXIT_NOT_AS_PROMISED", "EXIT_NOT_PRUNED", "add_callback", "run_exec"]

EXIT_NOT_PRUNED = 3
EXIT_NOT_AS_PROMISED = 4

_RECIPE = "LIGHTNING_PRUNE_EXEC_RECIPE"  # packaged name or absolute path
_MARKER = "LIGHTNING_PRUNE_EXEC_MARKER"  # file to which every process appends what happened
_MODULES = "LIGHTNING_PRUNE_EXEC_MODULES"  # modules whose class Trainer gets the callback
_HOME = "LIGHTNING_PRUNE_EXEC_HOME"  # folder to import this library from where the program's own path lacks it

_CONSTRUCTED, _TRAINED = "constructed", "trained"  # by a Trainer
_STARTED, _ENDED, _INTERRUPTED, _BROKEN = "started", "ended", "interrupted", "broken"  # by a pruning run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Adapter:
    """Where the callback for one Trainer class lives, and its method for the start of a training."""

    module: str
    begin: str


_ADAPTERS: Mapping[str, _Adapter] = {
    "transformers.trainer": _Adapter("lightning_prune.integrations.hf_trainer", "on_train_begin"),
    "lightning.pytorch.trainer.trainer": _Adapter("lightning_prune.integrations.lightning_trainer", "on_fit_start"),
    "pytorch_lightning.trainer.trainer": _Adapter("lightning_prune.integrations.lightning_trainer", "on_fit_start"),
}


def run_exec(recipe: str, command: Sequence[str]) -> int:
    """Run a training program with the recipe's callback added to its Trainers.

    Args:
        recipe: path of a recipe or name of a packaged one; read before the program starts.
        command: `script.py args`, `-m module args`, or an executable with arguments (`torchrun ...`, `trl sft ...`).

    Returns:
        The program's exit code, 128 + n if signal n ended it. `EXIT_NOT_PRUNED` if it succeeded but no Trainer with a
        pruning callback trained, `EXIT_NOT_AS_PROMISED` if one did, and a model or a file is not what the recipe says.

    Raises:
        ValueError: if the recipe is wrong, the command is empty or its executable cannot be found.
    """
    argv = _argv(command)
    Recipe.load(recipe)
    with tempfile.TemporaryDirectory(prefix="lightning_prune_exec_") as folder:
        marker = Path(folder, "marker")
        code = run_process(argv, _environment(recipe, marker))
        if code != 0:
            return code
        marks = _marks(marker)
    events = [event for event, _ in marks]
    if _TRAINED not in events:
        explanation = _explanation(shlex.join(command), was_constructed=_CONSTRUCTED in events)
        logger.error("nothing was pruned: %s", explanation)
        return EXIT_NOT_PRUNED
    broken = list(dict.fromkeys(sentence for event, sentence in marks if event == _BROKEN))
    ends = [event for event in events if event in (_ENDED, _INTERRUPTED)]
    if _STARTED in events and not ends:
        broken.append("a training began and its end was not seen")
    if ends and ends[-1] == _INTERRUPTED:
        broken.append("the last training was interrupted")
    if broken:
        logger.error("the program ended well, but pruning did not end as promised: %s", "; ".join(broken))
        return EXIT_NOT_AS_PROMISED
    return 0


def _marks(marker: Path) -> list[tuple[str, str]]:
    """Return (event, sentence) in the order in which the processes wrote them."""
    lines = marker.read_text(encoding="ascii").splitlines() if marker.exists() else []
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def add_callback(
    module_name: str, construct: Callable[..., None], trainer: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add the pruning callback to the arguments of a Trainer under construction, unless one is among them.

    Args:
        module_name: module that defines the Trainer class.
        construct: its unchanged `__init__`.
        trainer: the instance under construction.
        args: positional arguments, without the instance.
        kwargs: keyword arguments.

    Returns:
        Positional and keyword arguments to construct with.
    """
    try:
        bound = inspect.signature(construct).bind(trainer, *args, **kwargs)
    except TypeError:
        return args, kwargs  # the Trainer itself says best what is wrong with its arguments
    callback_class = _callback_class(_ADAPTERS[module_name])
    given = bound.arguments.get("callbacks")
    callbacks = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if not any(isinstance(callback, callback_class) for callback in callbacks):
        callbacks.append(callback_class(os.environ[_RECIPE]))
    bound.arguments["callbacks"] = callbacks
    _mark(_CONSTRUCTED)
    return bound.args[1:], bound.kwargs


@functools.cache
def _callback_class(adapter: _Adapter) -> type:
    """Import a callback class and let its instances, the program's own among them, mark that a training begins."""
    callback_class: type = importlib.import_module(adapter.module).PruningCallback
    begin = getattr(callback_class, adapter.begin)

    @functools.wraps(begin)
    def begin_and_mark(*args: Any, **kwargs: Any) -> object:
        result = begin(*args, **kwargs)
        _mark(_TRAINED)
        return result

    setattr(callback_class, adapter.begin, begin_and_mark)
    _watch_runs()
    return callback_class


@functools.cache
def _watch_runs() -> None:
    """Let pruning runs mark how they end; a training that resumes where it had ended never starts one."""
    run_class: Any = importlib.import_module("lightning_prune.integrations.runs.pruning_run").PruningRun
    start, finish, abort, check = run_class.start, run_class.finish, run_class.abort, run_class.check_again

    @functools.wraps(start)
    def start_and_mark(run: Any, *args: Any, **kwargs: Any) -> None:
        _mark(_STARTED)
        start(run, *args, **kwargs)

    @functools.wraps(finish)
    def finish_and_mark(run: Any) -> None:
        finish(run)
        for sentence in run.broken:
            _mark(_BROKEN, sentence)
        _mark(_ENDED)

    @functools.wraps(check)
    def check_and_mark(run: Any, model: Any) -> None:
        num_known = len(run.broken)
        check(run, model)
        for sentence in run.broken[num_known:]:
            _mark(_BROKEN, sentence)

    @functools.wraps(abort)
    def abort_and_mark(run: Any) -> bool:
        was_training: bool = abort(run)
        if was_training:
            _mark(_INTERRUPTED)
        return was_training

    run_class.start, run_class.finish, run_class.abort = start_and_mark, finish_and_mark, abort_and_mark
    run_class.check_again = check_and_mark


def _mark(event: str, sentence: str = "") -> None:
    line = f"{event} {' '.join(sentence.split())}".strip().encode("ascii", "backslashreplace").decode()
    # The folder is gone when `run_exec` returned before this process ended: nobody is left to read the mark.
    with contextlib.suppress(FileNotFoundError), open(os.environ[_MARKER], "a", encoding="ascii") as marker:
        marker.write(line + "\n")


def _argv(command: Sequence[str]) -> list[str]:
    if not command:
        raise ValueError("exec needs a command after --: SCRIPT.py ARGS, -m MODULE ARGS, or an executable")
    program = command[0]
    if program == "-m":
        _check_module(command[1:])
    elif program.endswith(".py") and not os.path.isfile(program):
        raise ValueError(f"there is no script {program}; name the file from the current folder, {os.getcwd()}")
    if program.startswith("-") or program.endswith(".py"):
        return [sys.executable, *command]
    if shutil.which(program) is None:
        raise ValueError(
            f"no executable {program!r} can be found; give SCRIPT.py ARGS, -m MODULE ARGS, or an executable on PATH "
            "such as torchrun, accelerate or trl"
        )
    return list(command)


def _check_module(arguments: Sequence[str]) -> None:
    """Refuse a module that Python does not find; what lies in a package only the package knows."""
    if not arguments:
        raise ValueError("exec needs a module after -m, as in -m package.train ARGS")
    package = arguments[0].partition(".")[0]
    with contextlib.suppress(ValueError):  # of a module that is loaded already and tells nothing of where it lies
        here = importlib.machinery.PathFinder.find_spec(package, [os.getcwd()])
        if here is None and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"there is no module {package!r} for -m {arguments[0]}; install it, or start exec in the folder that "
                "holds it",
                name=package,
            )


def _environment(recipe: str, marker: Path) -> dict[str, str]:
    path = [str(Path(__file__).resolve().parent / "exec_site")]
    if os.environ.get("PYTHONPATH"):  # an empty entry would mean the current folder
        path.append(os.environ["PYTHONPATH"])
    return os.environ | {
        _RECIPE: os.path.abspath(recipe) if os.path.exists(recipe) else recipe,
        _MARKER: str(marker),
        _MODULES: os.pathsep.join(_ADAPTERS),
        _HOME: str(Path(inspect.getfile(Recipe)).resolve().parents[2]),
        "PYTHONPATH": os.pathsep.join(path),
    }


def _explanation(program: str, *, was_constructed: bool) -> str:
    if was_constructed:
        return (
            f"{program!r} ended well and constructed a Trainer with a pruning callback, but did not train it; does it "
            "need an option such as --do_train?"
        )
    return (
        f"{program!r} ended well, but no Trainer of transformers or Lightning was seen in it. Either it trains "
        "without one (then attach lightning_prune.Sparsifier in its loop), or its interpreter was started with -E, -I "
        "or -S, or something cleared PYTHONPATH, or its Trainer lives on another machine (then run exec there)"
    )
