"""The options that each command of `lightning-prune` takes."""

import argparse
from collections.abc import Callable

__all__ = [
    "OVERRIDES",
    "add_eval",
    "add_exec",
    "add_export",
    "add_inspect",
    "add_oneshot",
    "add_quickstart",
    "add_run",
    "add_select",
]

OVERRIDES = """
Every value of the recipe can be overridden: --prune.schedule.sparsity=0.7, --prune.scorer=Magnitude,
--evaluate=null, --seed=1. --print_config shows the whole recipe and does nothing.
"""


def _at_least(low: int) -> Callable[[str], int]:
    """Return a reader of whole numbers that are not below a bound."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, got {text}")
        return value

    return read


def _add_config(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    parser.add_argument("--config", required=default is None, default=default, help="a packaged recipe or a YAML file")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    _add_config(parser)
    parser.add_argument("--ckpt_path", help="a Lightning checkpoint to resume from")
    parser.epilog = (
        f"{OVERRIDES} Options of the trainer, model and data sections are LightningCLI's: --trainer.max_steps=100, "
        "--model my_package.MyModule, --data my_package.MyData; --model PATH_OR_HUB_ID opens a causal language model."
    )


def add_oneshot(parser: argparse.ArgumentParser) -> None:
    """Add the options of `oneshot`."""
    parser.add_argument("--config", help="a packaged recipe or a YAML file")
    parser.add_argument("--plan", help="in place of a recipe: a lightning_prune.json whose cut is repeated on --model")
    parser.add_argument("--model", help="a model folder or a hub id")
    parser.add_argument("--out", help="a new folder for the pruned model")
    parser.add_argument(
        "--data",
        help="calibration text: a file, a folder, python (sources of its standard library), a data set of the hub "
        "NAME[:CONFIG[:SPLIT]], or self, text that the model writes (default); texts, or chats in the field messages; "
        "with instruction/tasks a folder with a file or a folder of texts for each task, named like it",
    )
    parser.add_argument(
        "--num_sequences", type=_at_least(1), default=128, help="calibration sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence_length", type=_at_least(1), help="tokens per sequence (default: the model's, 2048 at most)"
    )
    parser.add_argument("--batch_size", type=_at_least(1), default=8, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--state_file", help="where a search by shrink.method keeps its scores, to go on after a break")
    _add_loading(parser)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    parser.add_argument("--model", required=True, help="a model folder or a hub id")
    parser.add_argument(
        "--recipe", "--config", dest="config", help="list what this recipe would prune, in place of what can be cut"
    )
    parser.add_argument("--total_steps", type=int, help="of the training, to show when the recipe prunes")
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser, *, has_device: bool = True) -> None:
    if has_device:
        parser.add_argument("--device", default="auto", help="a torch device (default: an accelerator if there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the modelling file that lies in --model")


def add_exec(parser: argparse.ArgumentParser) -> None:
    """Add the options of `exec`."""
    parser.add_argument("--recipe", "--config", dest="config", required=True, help="a packaged recipe or a YAML file")
    parser.usage = "lightning-prune exec --recipe RECIPE [--section.key=value ...] -- SCRIPT_OR_-m_MODULE ARGS"


def add_quickstart(parser: argparse.ArgumentParser) -> None:
    """Add the options of `quickstart`."""
    _add_config(parser, default="train/quickstart")
    parser.add_argument("--model", help="a model folder or a hub id to start from, in place of a new model")
    parser.add_argument("--out", default="quickstart_out", help="a new folder (default: %(default)s)")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Add the options of `eval`."""
    parser.add_argument("--model", required=True, help="a model folder or a hub id")
    parser.add_argument("--tasks", required=True, nargs="+", help="lm-eval tasks")
    parser.add_argument("--include_path", help="a folder with task files")
    parser.add_argument("--limit", type=_at_least(1), help="documents per task")
    parser.add_argument("--batch_size", type=_at_least(1), default=8, help="documents at a time (default: %(default)s)")
    parser.add_argument("--num_fewshot", type=_at_least(0), help="examples in the prompt")
    parser.add_argument(
        "--mask_from",
        choices=("request", "task"),
        default="request",
        help="for a model that chooses its sub-network: by each request's context, or by the task's description "
        "(default: %(default)s)",
    )
    parser.add_argument("--instruction", help="with --mask_from task: text in place of the descriptions")
    _add_loading(parser)
    parser.add_argument("--out", help="also write the results to this JSON file")


def add_select(parser: argparse.ArgumentParser) -> None:
    """Add the options of `select`."""
    parser.add_argument("--model", required=True, help="a folder with a model and its predictor")
    parser.add_argument("--instruction", help="the text that chooses the small model")
    parser.add_argument("--task", help="in place of it: the name of a task that is stored in the folder")
    parser.add_argument(
        "--texts", help="or, for a model without a predictor: a file or folder of calibration texts of the task"
    )
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--keep", type=float, help="share of the units; with --texts, or for models of a range")
    _add_loading(parser)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    parser.add_argument("--model", required=True, help="a model folder or a hub id")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--format", choices=("dense", "huggingface"), default="dense", help="default: %(default)s")
    _add_loading(parser, has_device=False)
