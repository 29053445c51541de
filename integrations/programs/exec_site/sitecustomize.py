"""Let every Python process below `lightning-prune exec` offer its Trainers to `exec_inject`.

Python imports `sitecustomize` by itself at start. This one leaves `sys.path` as it would have been, waits for a trainer
module to be imported, and runs the `sitecustomize` that it hides. Every process pays for what is imported up here, so
that is next to nothing.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class TrainerImportFinder:
    """Meta-path finder that takes no import over, but wraps `Trainer.__init__` once a trainer module was executed."""

    def __init__(self, modules: Sequence[str], home: str) -> None:
        self.modules = frozenset(modules)
        self.home = home

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec the other finders give for a trainer module, with its execution extended; else None."""
        if fullname not in self.modules:
            return None
        finders = (finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for find in finders if (spec := find(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader, fullname)
        return spec

    def _extend(self, loader: Any, fullname: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == fullname:  # one loader may serve several modules, for example those of a zip file
                self._wrap(module)

        loader.exec_module = exec_module

    def _wrap(self, module: Any) -> None:
        from functools import wraps

        construct = module.Trainer.__init__

        @wraps(construct)
        def init(trainer: object, *args: Any, **kwargs: Any) -> None:
            add_callback = self._import_add_callback()
            args, kwargs = add_callback(module.__name__, construct, trainer, args, kwargs)
            construct(trainer, *args, **kwargs)

        module.Trainer.__init__ = init

    def _import_add_callback(self) -> Any:
        from importlib.util import find_spec

        if find_spec("lightning_prune") is None:
            sys.path.append(self.home)
        from lightning_prune.integrations.programs.exec_inject import add_callback

        return add_callback


def _run_hidden_sitecustomize() -> None:
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_here = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _here]
if "LIGHTNING_PRUNE_EXEC_RECIPE" in os.environ:
    _modules = os.environ["LIGHTNING_PRUNE_EXEC_MODULES"].split(os.pathsep)
    sys.meta_path.insert(0, TrainerImportFinder(_modules, os.environ["LIGHTNING_PRUNE_EXEC_HOME"]))
_run_hidden_sitecustomize()
