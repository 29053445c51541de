"""Which linear layers of a block read the same input, and which come before which: found by watching one run.

Layers that read the same tensor (query, key and value) belong together, and so do the same layers of all experts in a
list; what comes later in its own parent module (the output projection) belongs to a later stage.

Source: our own rule.
Cost: one run of the block; the inputs of its layers in one batch are held while it lasts.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

__all__ = ["Stage", "reading_order"]

Stage = list[list[str]]  # groups of layers; those of one group read the same input


def reading_order(block: nn.Module, paths: Mapping[str, nn.Module], run: Callable[[], None]) -> list[Stage]:
    """Return the stages of a block in the order of its forward pass.

    Args:
        block: what is run.
        paths: the layers by their path in the block.
        run: runs the block on all batches.

    Returns:
        Stages of groups of paths; a layer that was never called is in none of them.
    """
    inputs = _first_inputs(paths, run)
    modules = dict(block.named_modules())
    seen: dict[str, list[tuple[object, ...]]] = {}
    stages: dict[tuple[object, ...], dict[tuple[object, ...], list[str]]] = {}
    for path, tensor in inputs.items():
        parent = path.rpartition(".")[0]
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        of_parent = seen.setdefault(parent, [])
        if identity not in of_parent:
            of_parent.append(identity)
        stage = (_without_list_places(modules, parent), of_parent.index(identity))
        stages.setdefault(stage, {}).setdefault(identity, []).append(path)
    place = {path: number for number, path in enumerate(paths)}  # the same on every rank, unlike the order of experts
    return [sorted(groups.values(), key=lambda group: place[group[0]]) for groups in stages.values()]


def _first_inputs(paths: Mapping[str, nn.Module], run: Callable[[], None]) -> dict[str, Tensor]:
    """Return path -> the input of its first call, in the order of these calls."""
    inputs: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            if isinstance(args[0], Tensor):
                inputs.setdefault(path, args[0].detach())

        return hook

    handles = [module.register_forward_pre_hook(watch(path)) for path, module in paths.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _without_list_places(modules: Mapping[str, nn.Module], path: str) -> tuple[str, ...]:
    """Return the parts of a path, without the places in lists of modules, so that all experts share one."""
    parts = path.split(".")
    owners = [modules[".".join(parts[:length])] for length in range(len(parts))]
    return tuple(part for part, owner in zip(parts, owners, strict=True) if not isinstance(owner, nn.ModuleList))
