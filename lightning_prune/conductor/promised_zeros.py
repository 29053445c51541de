"""Compare any copy of a pruned model, or a saved state of one, with the masks it was promised."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.base import distributed
from lightning_prune.targets.targets import Binding, clean_name

__all__ = ["aliases_of", "averages_in", "differences", "mask_for", "pairs", "weights_of"]


def aliases_of(model: nn.Module, bindings: Sequence[Binding]) -> dict[str, tuple[str, ...]]:
    """Return all clean names of every target; a tied weight has several, of which a file may hold any one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    return {binding.name: tuple(names.get(id(binding.parameter), [binding.name])) for binding in bindings}


def averages_in(model: nn.Module) -> list[nn.Module]:
    """Return the averages of weights that are parts of a model."""
    return [module for module in model.modules() if isinstance(module, AveragedModel)]


def weights_of(model: nn.Module | Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors of a model or of a saved state by clean name, tied ones under each of theirs."""
    if isinstance(model, nn.Module):
        distributed.reshard(model)
        return {clean_name(name): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return {clean_name(name): tensor.detach() for name, tensor in model.items() if isinstance(tensor, Tensor)}


def differences(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    bindings: Sequence[Binding],
    aliases: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """Yield a sentence for each way in which weights are not those that the masks promise.

    Names may begin elsewhere than those of the targets, as in a part of the trained model or in something around it.
    Collective when the targets are sharded.

    Args:
        weights: tensors by clean name, whole or sharded as the targets are.
        masks: bool, True = keep, by target name, this process's rows.
        bindings: the targets.
        aliases: all names of each target.
    """
    missing, reshaped, filled = [], [], []
    num_pruned = num_filled = 0
    for binding, weight in pairs(weights, [b for b in bindings if b.name in masks], aliases):
        mask = masks[binding.name]
        num_pruned += int(distributed.all_reduce_sum((~mask).sum(), binding.parameter))
        if weight is None:
            missing.append(binding.name)
            continue
        part, keep = distributed.local(weight), mask_for(weight, mask, binding)
        if part.shape != keep.shape:
            reshaped.append(binding.name)
            continue
        count = int(distributed.all_reduce_sum((part[~keep] != 0).sum(), weight))
        num_filled += count
        filled += [binding.name] if count else []
    if filled:
        yield f"{num_filled} of {num_pruned} pruned weights are not zero, in {len(filled)} targets, first {filled[0]}"
    if missing:
        yield f"{len(missing)} pruned targets are not in the model, first {missing[0]}"
    if reshaped:
        yield f"{len(reshaped)} pruned targets have another shape in the model, first {reshaped[0]}"


def pairs(
    weights: Mapping[str, Tensor], bindings: Sequence[Binding], aliases: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Binding, Tensor | None]]:
    """Yield every target with the tensor that stands for it among others, or None."""
    renamed = _renaming(weights, [name for binding in bindings for name in aliases[binding.name]])
    for binding in bindings:
        found = [weights[new] for name in aliases[binding.name] if (new := renamed(name)) in weights]
        yield binding, found[0] if found else None


def mask_for(weight: Tensor, mask: Tensor, binding: Binding) -> Tensor:
    """Return a target's mask as a tensor that stands for it needs it: whole, or this process's rows, on its device."""
    keep = mask if distributed.is_sharded(weight) else distributed.gather(mask, binding.parameter)
    return keep.to(weight.device)


def _renaming(names: Mapping[str, object], wanted: Sequence[str]) -> Callable[[str], str]:
    """Return what turns wanted names into those that are there: by leaving out a prefix, or by adding one."""
    depths = range(max((name.count(".") for name in wanted), default=0) + 1)
    around = {name.removesuffix(wanted[0]) for name in names if wanted and name.endswith(f".{wanted[0]}")}
    ways: list[Callable[[str], str]] = [lambda name, k=depth: name.split(".", k)[-1] for depth in depths]  # type: ignore[misc]
    ways += [lambda name, start=prefix: start + name for prefix in sorted(around)]  # type: ignore[misc]
    return max(ways, key=lambda way: sum(way(name) in names for name in wanted))
