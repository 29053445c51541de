"""Cut a model to what a plan keeps, and prove on a few tokens that the result computes what was promised.

The promise: the smaller model gives what the model gives whose removed units are zero and whose removed blocks pass
their input on.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from lightning_prune.structured.build import build_smaller, check_no_shares, check_whole
from lightning_prune.structured.cutting import without_orphans
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.expert_mask import routed_around
from lightning_prune.structured.discovery.probe import difference, outputs, probe_inputs, skipping, tolerance
from lightning_prune.structured.discovery.stack import blocks_of
from lightning_prune.structured.groups import Plan, zeroed
from lightning_prune.structured.structure import Structure

__all__ = ["masked", "shrink"]


@contextmanager
def masked(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[None]:
    """Simulate a plan on a model: removed units are zero and removed blocks are passed over, until the block ends."""
    check_no_shares(plan)
    with ExitStack() as changes:
        cuts = tuple(without_orphans(structure.groups, plan.cuts).values())
        changes.enter_context(zeroed(model, structure.groups, cuts))
        changes.enter_context(routed_around(model, structure.groups, cuts))
        if plan.layers is not None and structure.stack is not None:
            structure.stack.check_layers(plan.layers)
            removed = sorted(set(range(structure.stack.num_layers)) - set(plan.layers))
            blocks = [block for layer in removed for block in blocks_of(model, structure.stack, layer)]
            changes.enter_context(skipping(blocks))
        yield


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
            more memory than the parent and its largest tensor. The parent is of no use afterwards, and nothing is
            left to compare with: that the cut is exact rests on what `discover` has proven.

    Raises:
        ValueError: if the plan does not fit the model, or its class cannot have these shapes; nothing was changed.
        RuntimeError: if the smaller model computes something else than the masked one.
    """
    check_whole(model)
    inputs = probe_inputs(model) if inputs is None else inputs
    structure = discover(model, inputs) if structure is None else structure
    if consume:
        return build_smaller(model, structure, plan, consume=True)
    with masked(model, structure, plan):
        expected = outputs(model, inputs)
    small = build_smaller(model, structure, plan)
    gap = difference(outputs(small, inputs), expected)
    if not gap <= tolerance(expected):
        raise RuntimeError(
            f"the smaller {type(model).__name__} differs from the masked one by {gap:.2g} of the largest output, more "
            f"than {tolerance(expected):g}; the cut is not exact, use fewer kinds of units at once"
        )
    return small
