"""Which parameters are pruned: include / exclude patterns over clean names, or the weights of the repeated blocks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.targets import layers
from lightning_prune.targets.binding import Binding
from lightning_prune.targets.blocks import find_blocks
from lightning_prune.targets.choice import Candidate, Fits, choose
from lightning_prune.targets.layers import is_linear
from lightning_prune.targets.layouts import Layout, Stored, Transposed
from lightning_prune.targets.reparametrized import Source, sources
from lightning_prune.targets.stacks import Stacks

__all__ = ["Binding", "LeftOut", "Selection", "Targets", "clean_name", "find_blocks", "is_linear"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")


def clean_name(name: str) -> str:
    """Remove what wrappers (DDP, compile, activation checkpoints, PEFT) add to a parameter's name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[:1] == ["module"] and len(parts) > 1:
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


@dataclass(frozen=True)
class LeftOut:
    """A parameter of two dimensions and more that is not pruned, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Selection:
    """The targets of a model, and what is left out, each in the order of the model."""

    targets: tuple[Binding, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Patterns over parameter names; `*` matches any text, dots included.

    Without `include`, targets are the weights of linear, convolution, recurrent, attention and stacked-expert layers
    inside the repeated blocks of the model. Recurrent layers count as blocks of their own; in a model without
    repetition, such as a plain chain of layers, all layers do; in a convolutional network all convolutions count. Left
    alone are embeddings; output heads, which are the output embeddings of any part, the layer that produces the
    output, and a classifier of linear layers behind others; routers and gates; norms and biases; the gains of a
    weight norm; and what is frozen and covered by no adapter, unless all blocks are frozen, as in a model loaded for
    inference. Beside other layers, convolutions that the method cannot treat are left out too.

    An `include` pattern chooses exactly what it matches among parameters of two dimensions and more.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def resolve(self, model: nn.Module) -> list[Binding]:
        """Find the targets of a model, each tied weight once.

        Raises:
            ValueError: if a pattern matches nothing, nothing is left, or a target cannot be pruned.
        """
        return list(self.select(model).targets)

    def select(self, model: nn.Module, *, fits: Fits = lambda candidate: None) -> Selection:
        """Find the targets of a model, each tied weight once, and tell why the rest is left out.

        Args:
            model: wrapped or not.
            fits: why the method cannot treat a convolution, None if it can.

        Raises:
            ValueError: if a pattern matches nothing, nothing is left, or a target cannot be pruned.
        """
        distributed.reshard(model)
        candidates = list(_candidates(model))
        names = [name for candidate in candidates for name in candidate.names]
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"target pattern {pattern!r} matches no weight; names look like {', '.join(map(repr, names[:3]))}"
                )
        reasons = self._reasons(model, candidates, fits)
        stacks = Stacks(model)
        chosen = [candidate for idx, candidate in enumerate(candidates) if idx not in reasons]
        left_out = [
            LeftOut(candidate.names[0], tuple(candidate.parameter.shape), reasons[idx])
            for idx, candidate in enumerate(candidates)
            if idx in reasons
        ]
        _check_names(chosen, candidates)
        _check_memory(chosen, candidates)
        targets = tuple(_bind(candidate, stacks) for candidate in chosen)
        if not targets:
            raise ValueError(_nothing_left(left_out))
        return Selection(targets, tuple(left_out))

    def _reasons(self, model: nn.Module, candidates: Sequence[Candidate], fits: Fits) -> dict[int, str]:
        """Return why candidates are not pruned, by their place."""
        reasons = {}
        if not self.include:
            reasons = choose(model, candidates, fits)
        for idx, candidate in enumerate(candidates):
            is_gain = candidate.source is not None and candidate.source.kind == "gain"
            if self.include and (is_gain or not any(_matches(name, self.include) for name in candidate.names)):
                reasons[idx] = "gain of a weight norm" if is_gain else "not included"
            elif idx not in reasons and any(_matches(name, self.exclude) for name in candidate.names):
                reasons[idx] = "excluded"
        return reasons


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _candidates(model: nn.Module) -> Iterator[Candidate]:
    """Yield every parameter of two dimensions and more, what is tied or lies in the same memory once."""
    computed = {id(parameter): source for parameter, source in sources(model)}
    found: dict[object, Candidate] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False):
            if parameter.ndim < 2 or _is_adapter(name, prefix):
                continue
            source = computed.get(id(parameter))
            layer = module if source is None else source.layer
            tensor = name.rpartition(".")[2] if source is None else source.tensor
            new = Candidate([], parameter, [], tensor, source, [])
            candidate = found.setdefault(_memory(parameter), new)
            candidate.names.append(clean_name(name))
            if all(owner is not layer for owner in candidate.modules):
                candidate.modules.append(layer)
            if all(parameter is not known for known in (candidate.parameter, *candidate.copies)):
                candidate.copies.append(parameter)
    yield from found.values()


def _memory(parameter: Tensor) -> object:
    """Return what two parameters have in common that are one weight: themselves, or their memory, read alike."""
    plain = distributed.local(parameter.detach())
    if plain.is_meta or plain.numel() == 0 or type(plain) not in (Tensor, nn.Parameter):
        return id(parameter)
    return (plain.device, plain.data_ptr(), plain.shape, plain.stride(), plain.dtype)


def _is_adapter(name: str, prefix: str) -> bool:
    """Return whether a parameter belongs to a PEFT adapter, which trains beside the masked weight."""
    return "lora_" in name or ".modules_to_save." in f".{prefix}."


def _check_names(chosen: Sequence[Candidate], candidates: Sequence[Candidate]) -> None:
    """Refuse targets that another weight shares its name with, once what wrappers add is taken away."""
    owner: dict[str, Candidate] = {}
    for candidate in candidates:
        for name in candidate.names:
            other = owner.setdefault(name, candidate)
            if other is not candidate and any(one is candidate or one is other for one in chosen):
                raise ValueError(
                    f"two weights are called {name} once what wrappers add to names (module, _orig_mod, base_layer) "
                    "is taken away, so that masks could be mistaken; rename one of the two modules, or exclude them"
                )


def _check_memory(chosen: Sequence[Candidate], candidates: Sequence[Candidate]) -> None:
    """Refuse targets that share a part of their memory, or read it in another order."""
    spans = []
    for candidate in candidates:
        plain = distributed.local(candidate.parameter.detach())
        if not plain.is_meta and plain.numel() and type(plain) in (Tensor, nn.Parameter):
            last = sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True))
            start = plain.data_ptr()
            spans.append((str(plain.device), start, start + (last + 1) * plain.element_size(), candidate))
    spans.sort(key=lambda span: span[:3])
    for (device, _, end, first), (other, start, _, second) in itertools.pairwise(spans):
        if device == other and start < end and any(one is first or one is second for one in chosen):
            raise ValueError(
                f"{first.names[0]} and {second.names[0]} share memory, but are not the same weight read alike, so "
                "that a zero of one is a weight of the other; give each its own memory, or exclude one of them "
                f"(exclude: {first.names[0]!r})"
            )


def _nothing_left(left_out: Sequence[LeftOut]) -> str:
    """Return the message of a model in which nothing is to be pruned."""
    names = [one.name for one in left_out]
    why = "; ".join(f"{one.name} is left out: {one.reason}" for one in left_out[:3] if one.reason != "excluded")
    return (
        "no weight is left to prune; name targets with include patterns, for example "
        f"{', '.join(map(repr, names[:3]))}" + (f" ({why})" if why else "")
    )


def _bind(candidate: Candidate, stacks: Stacks) -> Binding:
    name, parameter = candidate.names[0], candidate.parameter
    plain = distributed.local(parameter.detach())
    if plain.is_meta:
        raise ValueError(f"target {name} is on the meta device and has no values; load the weights before attaching")
    if not plain.is_floating_point() or plain.element_size() < 2 or type(plain) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"target {name} is already quantized ({type(plain).__name__}, {plain.dtype}); prune before quantizing, "
            "or exclude it from the targets"
        )
    _check_source(name, parameter, candidate.source)
    layout = _layout(candidate, stacks)
    return Binding(name, parameter, tuple(candidate.modules), layout, candidate.source, tuple(candidate.copies))


def _check_source(name: str, parameter: Tensor, source: Source | None) -> None:
    if source is not None and source.kind == "foreign":
        raise ValueError(f"target {name} is {source.reason}, or exclude it from the targets (exclude: {name!r})")
    if source is not None and distributed.is_sharded(parameter):
        raise ValueError(
            f"target {name} is the direction of a weight norm or spectral norm and sharded, so that the weight it "
            "makes is on no process; train it without sharding, or exclude it from the targets"
        )


def _layout(candidate: Candidate, stacks: Stacks) -> Layout:
    """Return how a candidate is stored; a stack of unknown order is read as outputs before inputs."""
    module, ndim = candidate.modules[0], candidate.parameter.ndim
    known = layers.layout_of(module, ndim)
    if known is not None:
        return known
    is_transposed = stacks.is_transposed(module, candidate.parameter)
    return Transposed(is_stack=True) if is_transposed else Stored(is_certain=is_transposed is not None)
