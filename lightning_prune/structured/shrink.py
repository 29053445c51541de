"""Cut a model to what a plan keeps, and prove on a few inputs that the result computes what was promised.

The promise: the smaller model gives what the model gives whose removed units are zero and whose removed blocks pass
their input on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_prune.structured.build import build_smaller, check_no_shares, check_whole
from lightning_prune.structured.cutting import without_orphans
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.expert_mask import routed_around
from lightning_prune.structured.discovery.precision import exact_buffers
from lightning_prune.structured.discovery.probe import difference, outputs, skipping, tolerance
from lightning_prune.structured.discovery.probe_inputs import probes
from lightning_prune.structured.discovery.stack import blocks_of
from lightning_prune.structured.groups import Cut, Plan, zeroed
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["check_same", "masked", "promised", "shrink"]


@contextmanager
def masked(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[None]:
    """Simulate a plan on a model: removed units are zero and removed blocks are passed over, until the block ends."""
    cuts = tuple(without_orphans(structure.groups, plan.cuts).values())
    with zeroed(model, structure.groups, cuts), _routed_and_skipped(model, structure, plan, cuts):
        yield


@contextmanager
def _routed_and_skipped(model: nn.Module, structure: Structure, plan: Plan, cuts: Sequence[Cut]) -> Iterator[None]:
    check_no_shares(plan)
    with ExitStack() as changes:
        changes.enter_context(routed_around(model, structure.groups, cuts))
        if plan.layers is not None and structure.stack is not None:
            structure.stack.check_layers(plan.layers)
            removed = sorted(set(range(structure.stack.num_layers)) - set(plan.layers))
            blocks = [block for layer in removed for block in blocks_of(model, structure.stack, layer)]
            changes.enter_context(skipping(blocks))
        yield


@contextmanager
def _zeroed_in_turn(model: nn.Module, structure: Structure, cuts: Sequence[Cut]) -> Iterator[None]:
    """Simulate cuts as `zeroed` does, but those in a block only while it runs, so that little is kept aside."""
    live: dict[nn.Module, ExitStack] = {}
    stack = structure.stack

    def start(module: nn.Module, *_: Any) -> None:
        live[module] = ExitStack()
        live[module].enter_context(zeroed(model, structure.groups, own[module]))

    def stop(module: nn.Module, *_: Any) -> None:
        live.pop(module).close()

    own: dict[nn.Module, list[Cut]] = {}
    whole: list[Cut] = []
    for cut in cuts:
        group = structure.groups[cut.group]
        block = None if group.layer is None else _block_of(model, stack, group.name)  # None also for a shared block
        (whole if block is None else own.setdefault(block, [])).append(cut)
    with ExitStack() as changes:
        changes.enter_context(zeroed(model, structure.groups, whole))
        for block in own:
            changes.callback(block.register_forward_pre_hook(start).remove)
            changes.callback(block.register_forward_hook(stop).remove)
        try:
            yield
        finally:
            for backup in live.values():
                backup.close()


def _block_of(model: nn.Module, stack: Stack | None, name: str) -> nn.Module | None:
    """Return the block that a module lies in, None if it lies in none."""
    if stack is None or stack.layer_of(name) is None:
        return None
    container = next(container for container in stack.containers if name.startswith(f"{container}."))
    return model.get_submodule(f"{container}.{stack.layer_of(name)}")


def promised(
    model: nn.Module, structure: Structure, plan: Plan, batches: Sequence[Mapping[str, Tensor]]
) -> list[Tensor]:
    """Return what the model gives on some batches with the plan simulated; of all blocks one at a time is masked."""
    cuts = tuple(without_orphans(structure.groups, plan.cuts).values())
    with (
        exact_buffers(model, Blueprint(model)),
        _zeroed_in_turn(model, structure, cuts),
        _routed_and_skipped(model, structure, plan, cuts),
    ):
        return [outputs(model, batch) for batch in batches]


def check_same(small: nn.Module, batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Tensor]) -> None:
    """Check that a smaller model gives what was promised.

    Raises:
        RuntimeError: if it gives something else.
    """
    for batch, tensor in zip(batches, expected, strict=True):
        gap = difference(outputs(small, batch), tensor)
        if not gap <= tolerance(tensor):
            length = batch["input_ids"].shape[-1] if "input_ids" in batch else 0
            raise RuntimeError(
                f"the smaller {type(small).__name__} differs from the masked one by {gap:.2g} of the largest output"
                f"{f' over {length} tokens' if length else ''}, more than {tolerance(tensor):g}; the cut is not exact, "
                "use fewer kinds of units at once, or none of this kind"
            )


def shrink(
    model: nn.Module,
    plan: Plan,
    *,
    structure: Structure | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    consume: bool = False,
) -> nn.Module:
    """Return a smaller model of the same class that holds what a plan keeps.

    Args:
        model: whole tensors on one device, unwrapped; unchanged unless it is to be consumed.
        plan: what stays.
        structure: what `discover` found in the model; found now if it is not given.
        inputs: a small batch of keyword arguments of its forward; made up for models that read tokens or pixels.
        consume: whether to empty the parent's tensors one by one as they are cut, so that the two models never need
            more memory than the parent and its largest tensor. What the masked parent computes is taken before; it is
            of no use afterwards, also not if the cut turns out to be wrong.

    Raises:
        ValueError: if the plan removes nothing or does not fit the model, or its class cannot have these shapes;
            nothing was changed.
        RuntimeError: if the smaller model computes something else than the masked one.
    """
    check_whole(model)
    structure = discover(model, inputs) if structure is None else structure
    structure.check_effect(plan)
    batches = probes(model, inputs)
    expected = promised(model, structure, plan, batches)
    small = build_smaller(model, structure, plan, consume=consume)
    check_same(small, batches, expected)
    return small
