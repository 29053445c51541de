"""What `lightning_prune.json` says beside a smaller model: the plan, and the model before and after."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prune.export.folder import PLAN_NAME
from lightning_prune.structured.groups import Plan

__all__ = ["num_parameters", "plan_note", "read_plan"]

_FORMAT = 1


def num_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def plan_note(
    plan: Plan,
    *,
    parent: nn.Module,
    repaired: bool,
    metrics: Mapping[str, Mapping[str, float | None]],
    recipe: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Return the content of `lightning_prune.json`.

    Args:
        plan: what stayed, with method, options and the fingerprint of the calibration text.
        parent: the model that was cut; its class and the folder or hub id it came from are named.
        repaired: whether weights that stay were changed too, which the plan alone does not bring back.
        metrics: name -> {"before": number, "after": number}; None where it was not measured.
        recipe: the recipe as plain values.
    """
    config: Any = getattr(parent, "config", None)
    return {
        "format": _FORMAT,
        "form": "stock",
        "plan": plan.as_dict(),
        "repaired": repaired,
        "parent": {"name": getattr(config, "name_or_path", ""), "class": type(parent).__name__},
        "metrics": {name: dict(values) for name, values in metrics.items()},
        "recipe": None if recipe is None else dict(recipe),
    }


def read_plan(path: str | PathLike[str]) -> tuple[Plan, dict[str, Any]]:
    """Read a plan that was stored: `lightning_prune.json`, the folder it lies in, or a plan alone.

    Returns:
        The plan, and the whole content of the file.

    Raises:
        ValueError: if there is no such file, or it holds no plan.
    """
    file = Path(path).expanduser()
    file = file / PLAN_NAME if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"there is no plan {file}; name a {PLAN_NAME}, or the folder of a model that was made smaller")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        values = content.get("plan", content)
        return Plan.from_dict(values), dict(content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no plan ({type(error).__name__}: {error}); name a {PLAN_NAME}") from error
