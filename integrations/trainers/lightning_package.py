"""Lightning under either of its two names: `lightning.pytorch` and `pytorch_lightning` hold the same classes twice."""

import importlib
import sys
from typing import Any

__all__ = ["base_class", "loaded_classes"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def base_class(name: str, *, inside: str = "callbacks") -> Any:
    """Return a class to derive from, so that the Trainers of all packages that are loaded accept what is derived.

    Args:
        name: of a class, such as `Callback`.
        inside: the part of the package that has it.

    Raises:
        ImportError: if neither package is installed.
    """
    classes = loaded_classes(name, inside=inside) or (_first_installed(name, inside),)
    return classes[0] if len(classes) == 1 else type(name, classes, {})


def loaded_classes(name: str, *, inside: str = "callbacks") -> tuple[type, ...]:
    """Return the classes of a name in the packages that are loaded; none of a version that lacks it."""
    modules = [importlib.import_module(f"{package}.{inside}") for package in _PACKAGES if package in sys.modules]
    return tuple(getattr(module, name) for module in modules if hasattr(module, name))


def _first_installed(name: str, inside: str) -> type:
    for package in _PACKAGES[:-1]:
        try:
            found: type = getattr(importlib.import_module(f"{package}.{inside}"), name)
        except ModuleNotFoundError:
            continue
        return found
    last: type = getattr(importlib.import_module(f"{_PACKAGES[-1]}.{inside}"), name)
    return last
