"""What can be cut from a model, and what cannot and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as made_of

from lightning_prune.structured.groups import Group, Plan

__all__ = ["Stack", "Structure"]


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of a model: the lists that hold something per block, and what counts them.

    Args:
        containers: names of the module lists, for example `model.layers`.
        field: dotted name of the configuration field that counts the blocks.
        lists: dotted names of the configuration fields with one entry per block.
        num_layers: how many blocks there are.
        counters: block index -> configuration fields that count blocks of its kind and fall by one with it.
        kept_always: blocks that cannot be removed -> the reason.
    """

    containers: tuple[str, ...]
    field: str
    lists: tuple[str, ...]
    num_layers: int
    counters: Mapping[int, tuple[str, ...]] = made_of(default_factory=dict)
    kept_always: Mapping[int, str] = made_of(default_factory=dict)

    @property
    def removable(self) -> tuple[int, ...]:
        """Return the indices of the blocks that may be removed."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.kept_always)

    def parent_name(self, name: str, layers: Sequence[int]) -> str:
        """Return what a tensor or module of the model with these blocks is called in the parent."""
        layer = self.layer_of(name)
        return name if layer is None else self.renamed(name, layers[layer])

    def renamed(self, name: str, layer: int) -> str:
        """Return the name of the same thing in another block."""
        for container in self.containers:
            if name.startswith(f"{container}."):
                _, dot, rest = name[len(container) + 1 :].partition(".")
                return f"{container}.{layer}{dot}{rest}"
        return name

    def layer_of(self, name: str) -> int | None:
        """Return the index of the block a tensor or module lies in; None outside of the blocks."""
        for container in self.containers:
            if name.startswith(f"{container}."):
                return int(name[len(container) + 1 :].partition(".")[0])
        return None

    def check_layers(self, layers: Sequence[int]) -> None:
        """Check that these blocks may be what stays.

        Raises:
            ValueError: if they are not ascending block numbers, or one is removed that cannot be.
        """
        is_ascending = list(layers) == sorted(set(layers)) and all(0 <= layer < self.num_layers for layer in layers)
        if not layers or not is_ascending:
            raise ValueError(
                f"the layers that stay must be ascending numbers from 0 to {self.num_layers - 1}, at least one of "
                f"them, got {list(layers)}"
            )
        for layer, reason in self.kept_always.items():
            if layer not in layers:
                raise ValueError(f"layer {layer} cannot be removed: {reason}; removable are {list(self.removable)}")


@dataclass(frozen=True)
class Structure:
    """The groups of a model and its blocks.

    Args:
        groups: by key.
        stack: the repeated blocks; None if the model has none that can be counted.
        refused: what cannot be cut (a kind of unit, `layers`, or a configuration field) -> the reason.
    """

    groups: Mapping[str, Group]
    stack: Stack | None = None
    refused: Mapping[str, str] = made_of(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of units that can be cut."""
        found = {group.kind: None for group in self.groups.values()}
        return (*found, "layers") if self.stack is not None and self.stack.removable else tuple(found)

    def of_kind(self, kind: str) -> list[Group]:
        """Return the groups of one kind, in the order of the model.

        Raises:
            ValueError: if there are none, with the reason and what can be cut instead.
        """
        found = [group for group in self.groups.values() if group.kind == kind]
        if not found:
            reason = self.refused.get(kind, "the model has none")
            raise ValueError(f"{kind} cannot be cut: {reason}; what can be cut: {', '.join(self.kinds) or 'nothing'}")
        return found

    def check_effect(self, plan: Plan) -> None:
        """Check that a plan changes something.

        Raises:
            ValueError: if all that it names stays.
        """
        cuts = [cut for cut in plan.cuts if cut.group in self.groups]
        is_cut = any(len(set(cut.keep)) < self.groups[cut.group].num_units for cut in cuts)
        total = 0 if self.stack is None else self.stack.num_layers
        is_shorter = plan.layers is not None and list(plan.layers) != list(range(total))
        if len(cuts) == len(plan.cuts) and not (is_cut or is_shorter or plan.skip or plan.share):
            kept = f"all units of the {len(cuts)} groups that it names stay" if cuts else "it cuts no units"
            raise ValueError(
                f"the plan removes nothing: {kept}, no block goes and no part of one; ask the method for more, or use "
                "the model as it is"
            )
