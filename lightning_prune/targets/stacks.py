"""In which order a module that is no layer stores its stacks of matrices, such as experts: (E, O, I) or (E, I, O).

A module says so itself (`is_transposed`), or by the widths it names, or by its shapes: what one stack writes another
reads, whole or gated by half. Where neither tells, other modules of the same type may.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_prune.targets import layers

__all__ = ["Stacks"]

_WIDTHS = (("in_features", "out_features"), ("input_size", "output_size"), ("input_dim", "output_dim"))


class Stacks:
    """What the modules of a model give away about their stacks."""

    def __init__(self, model: nn.Module) -> None:
        self._by_type: dict[type[nn.Module], bool | None] = {}
        for module in model.modules():
            evidence = None if layers.is_layer(module) else _evidence(module)
            if evidence is not None:
                known = self._by_type.setdefault(type(module), evidence)
                self._by_type[type(module)] = evidence if known == evidence else None

    def is_transposed(self, module: nn.Module, parameter: Tensor) -> bool | None:
        """Return whether a stack of this module has inputs before outputs; None if nothing tells."""
        own = _evidence(module)
        return self._by_type.get(type(module)) if own is None else own


def _evidence(module: nn.Module) -> bool | None:
    """Return whether a module alone tells that its stacks have inputs before outputs; None if it does not."""
    flag = getattr(module, "is_transposed", None)
    if isinstance(flag, bool):
        return flag
    shapes = [tuple(one.shape) for one in module.parameters(recurse=False) if one.ndim == 3 and min(one.shape) > 1]
    found = set(_by_widths(module, shapes)) | set(_by_chain(shapes))
    return found.pop() if len(found) == 1 else None


def _by_widths(module: nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[bool]:
    for names in _WIDTHS:
        into, out = (getattr(module, name, None) for name in names)
        if isinstance(into, int) and isinstance(out, int) and into != out:
            yield from (shape[1:] == (into, out) for shape in shapes if set(shape[1:]) == {into, out})


def _by_chain(shapes: list[tuple[int, ...]]) -> Iterator[bool]:
    """Yield what each pair of stacks tells: the second reads what the first writes and writes what it reads."""
    for place, (num_up, *up) in enumerate(shapes):
        for num_down, *down in shapes[place + 1 :]:
            is_stored = down[0] == up[1] and up[0] in (down[1], 2 * down[1])
            is_transposed = up[0] == down[1] and up[1] in (down[0], 2 * down[0])
            if num_up == num_down and is_stored != is_transposed:
                yield is_transposed
