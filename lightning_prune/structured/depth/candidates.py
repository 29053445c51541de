"""What a greedy search may remove: blocks, sub-blocks, and runs of units of one group.

Source: MultiPruner, arXiv 2501.09949, for the runs of units and their order by weight magnitude (L1); its released code
    permutes the units, here they stay where they are and the plan names those that are kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.structured.depth.bypass import Part, SubBlock, bypassed, num_parameters, sub_blocks
from lightning_prune.structured.depth.search import Candidate
from lightning_prune.structured.groups import Cut, Group, zeroed
from lightning_prune.targets.targets import find_blocks

__all__ = [
    "block_candidates",
    "choose_parts",
    "is_state_space",
    "part_candidates",
    "part_parameters",
    "unit_candidates",
    "unit_magnitudes",
    "unit_parameters",
    "unit_runs",
]


def block_candidates(model: nn.Module, layers: Sequence[int]) -> list[Candidate]:
    """Return one candidate per block, labelled `block 3`."""
    blocks = find_blocks(model)
    return [
        Candidate(
            label=f"block {layer}",
            switch=lambda layer=layer: bypassed(model, (), layers=[layer]),  # type: ignore[misc]
            num_parameters=num_parameters([blocks[layer]]),
        )
        for layer in layers
    ]


def choose_parts(
    model: nn.Module, groups: Sequence[Group], parts: Sequence[Part], layers: Sequence[int]
) -> list[SubBlock]:
    """Return the sub-blocks of these kinds in these blocks.

    Raises:
        ValueError: if no group tells where any sub-block of one of the kinds is.
    """
    known = sub_blocks(model, groups)
    for part in parts:
        if not any(key.part == part for key in known):
            raise ValueError(
                f"no group describes the {part} parts of the model, so they cannot be removed; leave {part!r} out of "
                "parts where that is an option, or add a group with the members of these parts"
            )
    return [key for key in known if key.part in parts and key.layer in layers]


def part_candidates(
    model: nn.Module, groups: Sequence[Group], parts: Sequence[SubBlock], *, late: int = 0, not_before: int = 0
) -> list[Candidate]:
    """Return one candidate per sub-block, labelled `attention 3`.

    Args:
        model: the model.
        groups: its groups.
        parts: the sub-blocks.
        late: sub-blocks of the first `late` blocks wait for `not_before` removals.
        not_before: number of removals they wait for.
    """
    return [
        Candidate(
            label=str(part),
            switch=lambda part=part: bypassed(model, groups, parts=[part]),  # type: ignore[misc]
            num_parameters=part_parameters(model, groups, part),
            not_before=not_before if part.layer < late else 0,
        )
        for part in parts
    ]


def part_parameters(model: nn.Module, groups: Sequence[Group], part: SubBlock) -> int:
    """Count the parameters that go with a sub-block; the norm before it is not counted."""
    module_names = dict(model.named_modules(remove_duplicate=False))
    blocks = {id(block) for block in find_blocks(model)}
    found = list(sub_blocks(model, groups)[part])
    kinds = ("heads", "kv_groups") if part.part == "attention" else ("ffn", "experts")
    for group in groups:
        if group.layer == part.layer and group.kind in kinds:
            owners = [module_names[member.name.rpartition(".")[0]] for member in group.members]
            found += [owner for owner in owners if id(owner) not in blocks]
    return num_parameters(found)


def unit_runs(order: Sequence[int], step: int) -> list[tuple[int, ...]]:
    """Split units, most important first, into runs of `step` to be removed one after the other; one run stays.

    Raises:
        ValueError: if `step` is below one.
    """
    if step < 1:
        raise ValueError(f"the number of units removed at once must be >= 1, got {step}")
    number = (len(order) - 1) // step
    return [tuple(order[len(order) - (k + 1) * step : len(order) - k * step]) for k in range(number)]


def unit_candidates(model: nn.Module, group: Group, runs: Sequence[Sequence[int]]) -> list[Candidate]:
    """Return one candidate per run of units, labelled `<key of the group> 0`, each waiting for the one before it."""
    size = unit_parameters(model, group)
    return [
        Candidate(
            label=f"{group.key} {index}",
            switch=lambda run=run: zeroed(model, {group.key: group}, [_cut_without(group, run)]),  # type: ignore[misc]
            num_parameters=size * len(run),
            after=f"{group.key} {index - 1}" if index else None,
        )
        for index, run in enumerate(runs)
    ]


def _cut_without(group: Group, units: Sequence[int]) -> Cut:
    return Cut(group.key, tuple(unit for unit in range(group.num_units) if unit not in set(units)))


def unit_parameters(model: nn.Module, group: Group) -> int:
    """Count the numbers that one unit covers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = 0
    for member in group.members:
        shape = parameters[member.name].shape
        others = shape.numel() // shape[member.dim] // (shape[0] if member.expert is not None else 1)
        total += len(member.positions([0])) * others
    return total


def unit_magnitudes(model: nn.Module, group: Group) -> Tensor:
    """Return per unit the sum of the magnitudes of its output weights (gate and up; q, k and v).

    A member with fewer rows per unit than another (k and v of grouped queries) counts as if its rows were repeated.

    Raises:
        ValueError: if the group has no member whose outputs are the units.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    outs = [member for member in group.members if member.role == "out" and parameters[member.name].ndim > 1]
    if not outs:
        raise ValueError(f"{group.key} has no weight whose outputs are its units; give the order of its units")
    largest = max(len(member.positions([0])) // len(member.runs) for member in outs)
    total_U = torch.zeros(group.num_units)
    for member in outs:
        data = parameters[member.name].detach()
        data = data if member.expert is None else data[member.expert]
        rows = data.movedim(member.dim - (member.expert is not None), 0).flatten(1).float().abs().sum(1).cpu()
        size = len(member.positions([0])) // len(member.runs)
        for unit in range(group.num_units):
            total_U[unit] += rows[member.positions([unit])].sum() * (largest / size)
    return total_U


def is_state_space(block: nn.Module) -> bool:
    """Return whether a block holds a selective state-space layer: it has the log of a diagonal state matrix."""
    return any(name.rpartition(".")[2] == "A_log" for name, _ in block.named_parameters())
