"""Leave a model as it was when what is done to it fails or is interrupted.

When the block begins, it is noted what the model is made of: its modules with their settings, hooks and patched
methods, its configurations, which tensors lie where and which of them take gradients, and what the optimizers hold.
Values are noted by whoever is about to overwrite them (`Undo.keep`), slice by slice, so that a change of one block
costs a copy of what changes in that block and no more.

Cost: copies in main memory of what is overwritten, until the block ends. A width cut keeps the units that go and, with
    a repair, the weights that read them: about half of the feed-forward weights at a quarter of their units.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Undo", "undone_on_error"]


class Undo:
    """What a model was like, and how to make it so again.

    Args:
        model: its values may be changed afterwards, each after a `keep`; all else may change as it likes.
        optimizers: that step its weights.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        self._objects = [_Noted(module) for module in model.modules()]
        self._objects += [_Noted(config) for config in _configurations(model)]
        self._parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
        self._optimizers = [_NotedOptimizer(optimizer) for optimizer in optimizers]
        self._values: list[tuple[Tensor, int, Tensor | None, Tensor]] = []
        self._whole: set[tuple[int, int]] = set()

    @torch.no_grad()
    def keep(self, tensor: Tensor, dim: int = 0, positions: Tensor | None = None) -> None:
        """Note values before they are overwritten.

        Args:
            tensor: whole, or a part of one that shares its memory.
            dim: along which the positions lie.
            positions: of the slices that will change; None for all of the tensor.
        """
        data = tensor.detach()
        place = (data.data_ptr(), data.numel())
        if place in self._whole:
            return
        if positions is None:
            self._whole.add(place)
            self._values.append((data, dim, None, data.to("cpu", copy=True)))
        else:
            self._values.append((data, dim, positions, data.index_select(dim, positions.to(data.device)).cpu()))

    @torch.no_grad()
    def run(self) -> None:
        """Make the model what it was."""
        for noted in self._objects:
            noted.restore()
        for parameter, data, requires_grad, grad in self._parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for data, dim, positions, values in reversed(self._values):
            if positions is None:
                data.copy_(values)
            else:
                data.index_copy_(dim, positions.to(data.device), values.to(data.device))
        for optimizer in self._optimizers:
            optimizer.restore()


class _Noted:
    """The attributes of an object, and the entries of those that are tables: submodules, parameters, hooks."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.attributes = dict(vars(owner))
        self.tables = [(value, dict(value)) for value in self.attributes.values() if isinstance(value, dict)]

    def restore(self) -> None:
        own = vars(self.owner)
        own.clear()
        own.update(self.attributes)
        for table, entries in self.tables:  # the same objects: handles of hooks point to them
            table.clear()
            table.update(entries)


class _NotedOptimizer:
    """The parameters an optimizer steps, with its options, and what it remembers of them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
        self.state = {parameter: dict(values) for parameter, values in optimizer.state.items()}

    def restore(self) -> None:
        for group, options, parameters in self.groups:
            group.clear()
            group.update(options, params=parameters)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _configurations(model: nn.Module) -> list[Any]:
    """Return the configuration objects of a model and of its parts, each once."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if callable(getattr(config, "to_dict", None)) and id(config) not in found:
            found[id(config)] = config
            for inner in vars(config).values():
                add(inner)

    for module in model.modules():
        for name in ("config", "generation_config"):
            add(vars(module).get(name))
    return list(found.values())


@contextmanager
def undone_on_error(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> Iterator[Undo]:
    """Make a model what it was if the block ends with an error or an interruption, which goes on."""
    undo = Undo(model, optimizers)
    try:
        yield undo
    except BaseException:
        undo.run()
        raise
