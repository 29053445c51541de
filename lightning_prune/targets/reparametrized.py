"""Weights that are computed from other parameters: which of these is pruned, and what the scores see.

Under a weight norm, of either kind, the direction is pruned by the weight that comes out; its gain is no target, and
follows the norm of what is kept, so that kept weights stay what they are. Under a spectral norm the one parameter there
is is pruned; kept weights grow then, as the norm demands. Every other reparametrization is refused by name: zeros in
what it reads are no zeros in what it gives.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["Source", "sources"]


@dataclass(frozen=True)
class Source:
    """What a parameter is to the layer that computes its weight from it.

    Args:
        layer: the module whose weight is computed.
        tensor: the name of that weight in the layer.
        kind: `direction` is pruned, `gain` is left alone, `foreign` cannot be pruned.
        compute: returns the weight that comes out, without side effects.
        refresh: brings the layer's own copy up to date, where it keeps one between forward passes.
        reason: of `foreign`, what it is, and what to do.
        gain: of a direction under a weight norm, what its norms are scaled to.
        dim: along which dimension that has norms of its own; -1 for one norm of all.
    """

    layer: nn.Module
    tensor: str
    kind: str
    compute: Callable[[], Tensor] | None = None
    refresh: Callable[[], None] | None = None
    reason: str = ""
    gain: Tensor | None = None
    dim: int = 0

    def norms(self, direction: Tensor) -> Tensor | None:
        """Return the norms that a weight norm divides its direction by, shaped to broadcast; None of any other."""
        return None if self.gain is None else torch.norm_except_dim(direction, 2, self.dim)

    def spare(self, direction: Tensor, mask: Tensor) -> Tensor:
        """Return a mask that keeps the largest weight under every norm of which it would keep none."""
        norms = self.norms(direction * mask)
        if norms is None or bool(norms.all()):
            return mask
        others = [dim for dim in range(direction.ndim) if dim != self.dim]
        largest = direction.abs() == direction.abs().amax(others, keepdim=True)
        return mask | (largest & (norms == 0))

    def follow(self, direction: Tensor, before: Tensor | None) -> None:
        """Scale the gain as the norms have changed since, and bring a copy of the weight up to date."""
        after = self.norms(direction)
        if self.gain is not None and before is not None and after is not None:
            ratio = torch.where(before == 0, 1, after / before)
            self.gain.detach().mul_(ratio.reshape(self.gain.shape))
        if self.refresh is not None:
            self.refresh()


def sources(model: nn.Module) -> Iterator[tuple[Tensor, Source]]:
    """Yield every parameter that a weight of the model is computed from, with what it is to it."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for tensor, chain in module.parametrizations.items():
                assert isinstance(chain, parametrize.ParametrizationList)
                yield from _parametrized(module, tensor, chain)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                yield from _hooked(module, hook)
            elif isinstance(hook, BasePruningMethod):
                name = f"{hook._tensor_name}_orig"
                reason = "masked by torch.nn.utils.prune; make its zeros permanent with torch.nn.utils.prune.remove"
                yield getattr(module, name), Source(module, hook._tensor_name, "foreign", reason=reason)


def _parametrized(
    layer: nn.Module, tensor: str, chain: parametrize.ParametrizationList
) -> Iterator[tuple[Tensor, Source]]:
    first = chain[0]
    originals = [parameter for name, parameter in chain.named_parameters(recurse=False) if name.startswith("original")]
    if len(chain) == 1 and isinstance(first, parametrizations._WeightNorm) and len(originals) == 2:
        gain, direction = originals
        yield gain, Source(layer, tensor, "gain")
        yield (
            direction,
            Source(layer, tensor, "direction", compute=lambda: first(gain, direction), gain=gain, dim=first.dim),
        )
        return
    if len(chain) == 1 and isinstance(first, parametrizations._SpectralNorm):
        yield originals[0], Source(layer, tensor, "direction", compute=lambda: _at_rest(first, originals[0]))
        return
    names = " and ".join(type(step).__name__.removeprefix("_") for step in chain)
    reason = (
        f"computed by {names}, which need not keep zeros; remove it with "
        "torch.nn.utils.parametrize.remove_parametrizations"
    )
    for original in originals:
        yield original, Source(layer, tensor, "foreign", reason=reason)


def _at_rest(step: nn.Module, original: Tensor) -> Tensor:
    """Return what a parametrization gives in evaluation mode, in which a spectral norm iterates nothing."""
    mode = step.training
    step.training = False
    try:
        result: Tensor = step(original)
    finally:
        step.training = mode
    return result


def _hooked(layer: nn.Module, hook: WeightNorm | SpectralNorm) -> Iterator[tuple[Tensor, Source]]:
    gain, dim = None, 0
    if isinstance(hook, WeightNorm):

        def compute() -> Tensor:
            weight: Tensor = hook.compute_weight(layer)
            return weight

        gain, dim = getattr(layer, f"{hook.name}_g"), hook.dim
        yield gain, Source(layer, hook.name, "gain")
        direction = getattr(layer, f"{hook.name}_v")
    else:

        def compute() -> Tensor:
            weight: Tensor = hook.compute_weight(layer, do_power_iteration=False)
            return weight

        direction = getattr(layer, f"{hook.name}_orig")

    def refresh() -> None:
        with torch.no_grad():
            setattr(layer, hook.name, compute())

    yield direction, Source(layer, hook.name, "direction", compute, refresh, gain=gain, dim=dim)
