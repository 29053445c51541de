"""Which parts of a model repeat: its blocks, found by what its lists hold, whatever they are called."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from lightning_prune.targets import layers

__all__ = ["Blocks", "are_beside", "find_blocks", "repeated_parts"]

_PLAIN = (nn.Sequential, nn.ModuleList)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Blocks:
    """The repeated parts of a model, in order.

    `are_whole` tells blocks of several layers, between which a model may hold heads and stems, from a chain of bare
    layers, which may begin and end with them. Without repetition `parts` is empty.
    """

    parts: tuple[nn.Module, ...]
    are_whole: bool


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model in order: the children of its outermost lists of two and more.

    Lists of blocks that hold several layers come first; only a model without any offers its lists of bare layers. A
    list counts if at least two of its modules hold weights: a dropout before a linear layer is no repetition.
    """
    for accept in (lambda module: _has_several(module) and _repeats_blocks(module), _has_several):
        lists = list(_outermost(model, accept))
        if lists:
            return [block for found in lists for block in found.children() if any(True for _ in block.parameters())]
    return []


def repeated_parts(model: nn.Module, aside: Collection[int] = ()) -> Blocks:
    """Return the parts of a model that repeat, a single block in a `ModuleList` and relatives elsewhere included.

    Args:
        model: any.
        aside: identities of modules that are no part of the network.
    """
    lists = [found for found in _outermost(model, _repeats_blocks, aside) if not _is_row_of_heads(found)]
    if lists:
        parts = [block for found in lists for block in _blocks_of(found)]
        relatives = [part for part in _relatives(model, parts) if id(part) not in aside]
        return Blocks((*parts, *relatives), are_whole=True)
    chains = list(_outermost(model, _repeats_layers, aside))
    return Blocks(tuple(part for chain in chains for part in chain.children() if _has_weights(part)), are_whole=False)


def _outermost(
    module: nn.Module, accept: Callable[[nn.Module], bool], aside: Collection[int] = ()
) -> Iterator[nn.Module]:
    """Yield the outermost modules that are accepted, in order, none from what lies aside."""
    if id(module) in aside:
        return
    if accept(module):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, accept, aside)


def _has_weights(module: nn.Module) -> bool:
    """Return whether a module holds anything of two dimensions and more besides embeddings."""
    return any(
        parameter.ndim >= 2
        for part in module.modules()
        if not isinstance(part, _EMBEDDINGS)
        for parameter in part.parameters(recurse=False)
    )


def _holds_layers(module: nn.Module) -> bool:
    """Return whether a module holds a layer, or a stack of weights of its own such as experts."""
    return any(
        layers.is_layer(part) or any(parameter.ndim > 2 for parameter in part.parameters(recurse=False))
        for part in module.modules()
    )


def _has_several(module: nn.Module) -> bool:
    return isinstance(module, _PLAIN) and sum(_has_weights(child) for child in module.children()) > 1


def _is_block(module: nn.Module) -> bool:
    """Return whether a module is made of layers: neither a layer itself nor a mere chain of them."""
    if layers.is_layer(module) or not _holds_layers(module):
        return False
    if type(module) in _PLAIN:
        return any(_is_block(child) for child in module.children())
    return True


def _repeats_blocks(module: nn.Module) -> bool:
    """Return whether a module is a list of blocks: a `ModuleList` of any, or two of one type in another list."""
    if not isinstance(module, _LISTS):
        return False
    kinds = Counter(type(child) for child in module.children() if _is_block(child))
    if isinstance(module, nn.ModuleList):
        return bool(kinds) or _repeats_chains(module)
    if isinstance(module, nn.ModuleDict) and any(
        _repeats_blocks(part) for part in module.modules() if part is not module
    ):
        return False  # towers beside each other, which have blocks of their own
    return max(kinds.values(), default=0) > 1 or (not kinds and _repeats_chains(module))


def _repeats_chains(module: nn.Module) -> bool:
    """Return whether a list holds two and more chains of layers of the same kinds, each read by the next."""
    chains = [child for child in module.children() if _has_weights(child)]
    if len(chains) < 2 or not all(type(chain) is nn.Sequential for chain in chains):
        return False
    kinds = [tuple(type(part) for part in chain.children() if layers.is_layer(part)) for chain in chains]
    widths = [ends(chain) for chain in chains]
    joined = all(out == into for (_, out), (into, _) in itertools.pairwise(widths))
    return joined and len(set(kinds)) == 1 and all(0 not in width for width in widths)


def _repeats_layers(module: nn.Module) -> bool:
    """Return whether a list holds two bare layers of one kind and shape, of which one can read the other."""
    if not isinstance(module, _LISTS):
        return False
    widths = [(type(child), layers.widths(child)) for child in module.children() if layers.is_layer(child)]
    same = Counter((kind, width) for kind, width in widths if width[0] == width[1] > 0)
    return max(same.values(), default=0) > 1


def _blocks_of(found: nn.Module) -> list[nn.Module]:
    """Return the blocks of a list: of a `ModuleList` all but bare layers at its ends, else of a type that repeats."""
    children = [child for child in found.children() if _has_weights(child)]
    if isinstance(found, nn.ModuleList):
        return _without_ends(children)
    blocks = [child for child in children if _is_block(child)] or children
    kinds = Counter(type(block) for block in blocks)
    return [block for block in blocks if kinds[type(block)] > 1]


def _without_ends(children: list[nn.Module]) -> list[nn.Module]:
    """Leave out bare layers before the first block and behind the last, unless such lie between blocks as well."""
    places = [place for place, child in enumerate(children) if _is_block(child)]
    if not places:
        return children
    first, last = places[0], places[-1]
    between = {type(child) for child in children[first : last + 1]}
    return [child for place, child in enumerate(children) if first <= place <= last or type(child) in between]


def ends(part: nn.Module) -> tuple[int, int]:
    """Return how many features the first layer of a part reads and the last one writes; 0 if a layer does not tell."""
    found = [module for module in part.modules() if layers.is_layer(module)]
    return (layers.widths(found[0])[0], layers.widths(found[-1])[1]) if found else (0, 0)


def _is_row_of_heads(found: nn.Module) -> bool:
    """Return whether the modules of a list lie beside each other: one or two linear layers each, none read by another.

    Such are the heads of a model with several tasks.
    """
    parts = [child for child in found.children() if _has_weights(child)]
    inner = [[module for module in part.modules() if layers.is_layer(module)] for part in parts]
    if not all(0 < len(part) < 3 and all(layers.is_linear(layer) for layer in part) for part in inner):
        return False
    if any(parameter.ndim > 2 for part in parts for parameter in part.parameters()):
        return False
    return are_beside(parts)


def are_beside(parts: Iterable[nn.Module]) -> bool:
    """Return whether parts lie beside each other: they read the same width, and none writes it."""
    widths = [ends(part) for part in parts]
    return len({into for into, _ in widths}) == 1 and all(0 < into != out for into, out in widths)


def _relatives(model: nn.Module, parts: list[nn.Module]) -> Iterator[nn.Module]:
    """Yield modules elsewhere of a type that the blocks repeat, such as the middle of a U-Net; not the last of all."""
    kinds = Counter(type(part) for part in parts)
    inside = {id(module) for part in parts for module in part.modules()}
    last = [module for module in model.modules() if layers.is_layer(module)][-1:]
    for module in model.modules():
        is_known = kinds[type(module)] > 1 and type(module) not in _LISTS and _is_block(module)
        if is_known and id(module) not in inside and not any(part is last[0] for part in module.modules() if last):
            yield module
