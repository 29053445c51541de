"""Which weights are pruned unless the recipe says otherwise, and why each of the others is not.

Told from what a layer is and where it lies: never from a name, except for routers that nothing else gives away.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.targets import layers
from lightning_prune.targets.blocks import Blocks, are_beside, repeated_parts
from lightning_prune.targets.reparametrized import Source

__all__ = ["Candidate", "Fits", "adapted", "choose"]

_ROUTERS = ("*router*", "*.gate.weight", "*.gate.wg.weight")

AVERAGE = "average of other weights, which takes their masks"
EMBEDDING = "embedding"
FOREIGN = "no layer's weight"
FROZEN = "frozen, and no adapter covers it"
GAIN = "gain of a weight norm"
HEAD = "output head"
METRIC = "part of a metric"
OUTSIDE = "outside the repeated blocks"
ROUTER = "router or gate"


@dataclass
class Candidate:
    """A parameter of two dimensions and more, with all its clean names and all layers that use it as a weight.

    `tensor` is what the first layer calls it; `source` tells how a reparametrized layer computes its weight from it;
    `copies` are further parameters over the same memory.
    """

    names: list[str]
    parameter: Tensor
    modules: list[nn.Module]
    tensor: str
    source: Source | None
    copies: list[Tensor]

    @property
    def is_stack(self) -> bool:
        """Return whether it is a stack of matrices of a module that is no layer itself, such as experts."""
        is_bare = not layers.is_layer(self.modules[0]) and not isinstance(self.modules[0], nn.Bilinear)
        return is_bare and self.parameter.ndim == 3 and min(self.parameter.shape) > 1

    @property
    def is_weight(self) -> bool:
        """Return whether a layer multiplies its inputs by it."""
        return self.is_stack or layers.weighs(self.modules[0], self.tensor)

    @property
    def is_convolution(self) -> bool:
        """Return whether it is the kernel of a convolution."""
        return layers.is_convolution(self.modules[0])


Fits = Callable[[Candidate], str | None]


def choose(model: nn.Module, candidates: Sequence[Candidate], fits: Fits = lambda candidate: None) -> dict[int, str]:
    """Decide which candidates are left alone.

    Args:
        model: what holds them.
        candidates: in the order in which the model registers them.
        fits: why the method cannot treat a convolution, None if it can; such are left alone beside other layers.

    Returns:
        the reason for each candidate that is not pruned, by its place.
    """
    covered = adapted(model)
    trains = [_is_trained(candidate, covered) for candidate in candidates]
    reasons = _beside_others(model, candidates, _bystanders(model))
    if any(trains):
        frozen = _frozen_networks(model, covered)
        without = _beside_others(model, candidates, frozen | _bystanders(model))
        own = [idx for idx, does in enumerate(trains) if does and idx not in without]
        if len(own) > 1 or any(_has_own_head(model, candidates, idx, frozen) for idx in own):
            reasons = without
    chosen = [idx for idx in range(len(candidates)) if idx not in reasons]
    trained = [idx for idx in chosen if trains[idx]]
    if trained:
        reasons |= {idx: FROZEN for idx in chosen if idx not in trained}
        chosen = trained
    why_not = ((idx, fits(candidates[idx])) for idx in chosen if candidates[idx].is_convolution)
    misfits = {idx: reason for idx, reason in why_not if reason is not None}
    return reasons | misfits if len(misfits) < len(chosen) else reasons


def _beside_others(model: nn.Module, candidates: Sequence[Candidate], aside: Mapping[int, str]) -> dict[int, str]:
    """Return why candidates are left alone, where some modules are no part of the network, for the reasons given."""
    reasons, own = {}, []
    for idx, candidate in enumerate(candidates):
        reason = next((aside[id(module)] for module in candidate.modules if id(module) in aside), None)
        if reason is None:
            own.append(idx)
        else:
            reasons[idx] = reason
    inner = _Layout(model, [candidates[idx] for idx in own], repeated_parts(model, aside)).reasons()
    return reasons | {own[place]: reason for place, reason in inner.items()}


def _has_own_head(model: nn.Module, candidates: Sequence[Candidate], idx: int, frozen: Mapping[int, str]) -> bool:
    """Return whether a weight lies in a network of its own: with others in a module that holds no frozen network."""
    others = {id(one.modules[0]) for place, one in enumerate(candidates) if place != idx and one.is_weight}
    networks = [module for module in model.modules() if not any(id(part) in frozen for part in module.modules())]
    own = candidates[idx].modules[0]
    inner = [{id(part) for part in network.modules()} for network in networks]
    return any(id(own) in parts and not others.isdisjoint(parts) for parts in inner)


def _bystanders(model: nn.Module) -> dict[int, str]:
    """Return the modules inside metrics, such as the networks that compare images, and inside averages of weights."""
    kind = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    metrics = [module for module in model.modules() if kind is not None and isinstance(module, kind)]
    averages = [module for module in model.modules() if isinstance(module, AveragedModel)]
    measuring = {id(part): METRIC for metric in metrics for part in metric.modules()}
    return measuring | {id(part): AVERAGE for average in averages for part in average.modules()}


def _frozen_networks(model: nn.Module, covered: set[int]) -> dict[int, str]:
    """Return the modules of networks that are frozen as a whole, such as a teacher; a frozen block is none.

    One layer that trains beside such a network is its head, and the blocks may be unfrozen later.
    """
    blocks = {id(module) for part in repeated_parts(model).parts for module in part.modules()}
    found: dict[int, str] = {}
    for module in model.modules():
        flags = [parameter.requires_grad for parameter in module.parameters()]
        is_apart = id(module) not in blocks and not any(id(part) in covered for part in module.modules())
        if flags and not any(flags) and is_apart and not layers.is_layer(module):
            found |= {id(part): FROZEN for part in module.modules()}
    return found


def _is_trained(candidate: Candidate, covered: set[int]) -> bool:
    """Return whether a weight trains, by itself or through an adapter over it."""
    return candidate.parameter.requires_grad or any(id(module) in covered for module in candidate.modules)


def adapted(model: nn.Module) -> set[int]:
    """Return the layers over which matrices train: in the layer itself, or in a wrapper that calls it its base."""
    found = set()
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        beside = [one for name, one in own if one.ndim >= 2 and not layers.weighs(module, name)]
        if layers.is_layer(module) and any(parameter.requires_grad for parameter in beside):
            found.add(id(module))
        base = module._modules.get("base_layer")
        if base is not None:
            inner = {id(parameter) for parameter in base.parameters()}
            if any(parameter.requires_grad and id(parameter) not in inner for parameter in module.parameters()):
                found.add(id(base))
    return found


class _Layout:
    """Where the candidates lie in a model."""

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], blocks: Blocks) -> None:
        self.model, self.candidates, self.blocks = model, candidates, blocks
        self.inside = {id(module) for part in self.blocks.parts for module in part.modules()}
        self.order = [idx for idx, candidate in enumerate(candidates) if candidate.is_weight]
        self.heads = _known_heads(model)
        self.other_kinds = {id(candidates[idx].modules[0]) for idx in self.order if not self._is_linear(idx)}
        self.parents = {id(child): module for module in model.modules() for child in module.children()}

    def reasons(self) -> dict[int, str]:
        """Return why candidates are left alone, by their place; of those that are pruned nothing."""
        reasons = {idx: reason for idx, one in enumerate(self.candidates) if (reason := self._by_kind(one))}
        body = [idx for idx in self.order if idx not in reasons]
        heads = self._heads_by_place(body)
        reasons |= dict.fromkeys(heads, HEAD)
        reasons |= {idx: OUTSIDE for idx in body if idx not in heads and not self._is_within(idx)}
        return reasons

    def _by_kind(self, candidate: Candidate) -> str | None:
        """Return what a candidate is, if that alone leaves it alone."""
        if candidate.source is not None and candidate.source.kind == "gain":
            return GAIN
        if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in candidate.modules):
            return EMBEDDING
        if any(id(module) in self.heads for module in candidate.modules):
            return HEAD
        if self._routes(candidate):
            return ROUTER
        return None if candidate.is_weight else FOREIGN

    def _routes(self, candidate: Candidate) -> bool:
        """Return whether a layer chooses among experts or opens and closes: one output for each, or a single one."""
        module = candidate.modules[0]
        parent, (num_in, num_out) = self.parents.get(id(module)), layers.widths(module)
        if any(fnmatchcase(name, pattern) for name in candidate.names for pattern in _ROUTERS):
            neighbours = () if parent is None else parent.children()
            is_gate_of_mlp = num_out > num_in and any(layers.widths(one) == (num_out, num_in) for one in neighbours)
            return not is_gate_of_mlp
        if not layers.is_linear(module) or num_out == 0 or id(module) not in self.inside:
            return False
        return (num_out == 1 and self.blocks.are_whole) or num_out in _num_experts(parent)

    def _is_within(self, idx: int) -> bool:
        """Return whether a layer belongs to what repeats, or to the body of a model in which nothing does."""
        candidate = self.candidates[idx]
        if not self.blocks.parts or any(
            id(module) in self.inside or layers.is_recurrent(module) for module in candidate.modules
        ):
            return True
        return candidate.is_convolution and self._is_convolutional

    def _is_inside(self, idx: int) -> bool:
        return any(id(module) in self.inside for module in self.candidates[idx].modules)

    @property
    def _is_convolutional(self) -> bool:
        """Return whether most weights of the blocks are those of convolutions."""
        sizes = [
            (self.candidates[idx].parameter.numel(), self.candidates[idx].is_convolution)
            for idx in self.order
            if self._is_inside(idx)
        ]
        return 2 * sum(size for size, is_kernel in sizes if is_kernel) > sum(size for size, _ in sizes)

    def _heads_by_place(self, body: Sequence[int]) -> set[int]:
        """Return the layers that produce the output: the last one, with its neighbours in one classifier."""
        if not self.order or (self.blocks.are_whole and self._is_inside(self.order[-1])):
            return set()
        last = self.order[-1]
        if last not in body or len(self.candidates) == 1 or not _is_output(self.candidates[last].modules[0]):
            return set()
        first = self._classifier(self.candidates[last].modules[0])
        inner = {id(module) for part in (first, *self._beside(first)) for module in part.modules()}
        return {
            idx
            for idx in body
            if any(id(module) in inner for module in self.candidates[idx].modules)
            and not (self.blocks.are_whole and self._is_inside(idx))
        }

    def _classifier(self, layer: nn.Module) -> nn.Module:
        """Return the largest module around the last layer that holds linear layers alone, if others hold other kinds.

        Without other kinds it is the layer itself.
        """
        module = layer
        while (parent := self.parents.get(id(module))) is not None:
            if self._holds_other_kinds(parent):
                return module
            module = parent
        return layer

    def _beside(self, head: nn.Module) -> list[nn.Module]:
        """Return the heads beside one: of modules that read what it reads, all of a classifier, else the last layer."""
        module = head
        while (parent := self.parents.get(id(module))) is not None:
            children = [child for child in parent.children() if any(map(layers.is_layer, child.modules()))]
            before = children[: next(place for place, child in enumerate(children) if child is module)]
            found = []
            for part in reversed(before):
                if not are_beside((part, module)):
                    break
                is_classifier = module is head and not self._holds_other_kinds(part)
                last = [one for one in part.modules() if layers.is_layer(one)][-1]
                found += [part if is_classifier else last] if _is_output(last) else []
            if found:
                return found
            module = parent
        return []

    def _holds_other_kinds(self, module: nn.Module) -> bool:
        """Return whether a module holds weights of layers that are not linear."""
        return any(id(part) in self.other_kinds for part in module.modules())

    def _is_linear(self, idx: int) -> bool:
        return isinstance(self.candidates[idx].modules[0], layers.linear_types())


def _known_heads(model: nn.Module) -> set[int]:
    """Return the modules inside the output embeddings that any part of a model names."""
    heads: set[int] = set()
    for part in model.modules():
        getter = getattr(type(part), "get_output_embeddings", None)
        head = getter(part) if callable(getter) else None
        if isinstance(head, nn.Module):
            heads |= {id(module) for module in head.modules()}
    return heads


def _num_experts(parent: nn.Module | None) -> Iterator[int]:
    """Yield how many experts a module holds, stacked or in a list."""
    for child in () if parent is None else (parent, *parent.children()):
        if isinstance(child, nn.ModuleList) and child is not parent and len(child) > 1:
            yield len(child)
        if not layers.is_layer(child):
            yield from {parameter.shape[0] for parameter in child.parameters(recurse=False) if parameter.ndim == 3}


def _is_output(layer: nn.Module) -> bool:
    """Return whether a last layer is an output and no block: it changes the width, pointwise or to a quarter."""
    into, out = layers.widths(layer)
    if layers.is_convolution(layer):
        weight = getattr(layer, "weight", None)
        is_pointwise = isinstance(weight, Tensor) and weight.shape[2:].numel() == 1
        return into != out and (is_pointwise or 4 * out <= into)
    return isinstance(layer, layers.linear_types()) and into != out
