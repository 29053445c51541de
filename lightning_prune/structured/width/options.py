"""The options of width pruning, which contradictions they may hold, and the fingerprint of calibration tokens."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed, registry
from lightning_prune.base.types import Scorer
from lightning_prune.calibration.walk import Batch
from lightning_prune.solvers.greedy_output import GreedyOutput, OutputChooser
from lightning_prune.structured.groups import Group, Kind, Member
from lightning_prune.structured.width.unit_scores import Reduction, scored_members
from lightning_prune.targets.targets import Binding, Targets

__all__ = ["SUB_BLOCKS", "Chooser", "Compensate", "WidthOptions", "bind", "each_once", "fingerprint", "selected"]

Chooser = Scorer | OutputChooser
Compensate = Literal["none", "bias", "least_squares"]
SUB_BLOCKS: tuple[Kind, ...] = ("heads", "kv_groups", "ffn", "experts", "channels")  # in the order of a block


def fingerprint(batches: Sequence[Batch]) -> str:
    """Return a hash of the tokens of calibration batches, or of all their tensors where there are no tokens."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in ("input_ids",) if "input_ids" in batch else sorted(batch):
            if isinstance(batch[key], Tensor):
                digest.update(f"{key}{tuple(batch[key].shape)}".encode())
                digest.update(batch[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class WidthOptions:
    """What `width.prune_width` was asked for; see there."""

    scorer: Chooser
    sparsity: Mapping[Kind, float]
    compensate: Compensate
    multiple_of: int
    budget: Literal["uniform", "global"] | Mapping[str, float]
    own_reduction: Reduction | None
    damping: float | None
    seed: int

    def __post_init__(self) -> None:
        if self.compensate not in get_args(Compensate):
            raise ValueError(f"compensate must be none, bias or least_squares, got {self.compensate!r}")
        if isinstance(self.budget, str) and self.budget not in ("uniform", "global"):
            raise ValueError(f"budget must be uniform, global or a sparsity per group, got {self.budget!r}")
        if not isinstance(self.scorer, Scorer) and self.own_reduction is not None:
            raise ValueError(f"{type(self.scorer).__name__} rates units as they are; leave out the reduction")
        if isinstance(self.scorer, GreedyOutput) and self.budget == "global":
            raise ValueError("GreedyOutput rates no units, so budget='global' cannot rank them; use OutputEnergy")
        if "experts" in self.sparsity and not isinstance(self.scorer, Scorer):
            raise ValueError(
                f"{type(self.scorer).__name__} rates the columns of output projections, and nothing reads experts; cut "
                "them with Wanda (by the tokens that are sent to each), Magnitude, Random or Taylor"
            )

    def sources(self) -> set[str]:
        """Return what feeds the scorer: `input`, `step` or nothing."""
        if not isinstance(self.scorer, Scorer):
            return {"input"}
        return {registry.statistic(name).source for name in self.scorer.needs}

    @property
    def repairs(self) -> bool:
        """Return whether what stays is changed; whole experts have nothing that reads them and could make up."""
        return self.compensate != "none" and any(kind != "experts" for kind in self.sparsity)

    @property
    def counts_experts(self) -> bool:
        """Return whether experts are among what is cut and rated by tokens."""
        return "experts" in self.sparsity and isinstance(self.scorer, Scorer) and "input" in self.sources()

    def counts_tokens(self, group: Group) -> bool:
        """Return whether a group is rated by the tokens that are sent to its units: experts, by inputs."""
        return group.kind == "experts" and self.counts_experts

    def scored(self, group: Group) -> tuple[Member, ...]:
        """Return the members of a group whose weights are scored.

        Raises:
            ValueError: if the group has none.
        """
        if self.counts_tokens(group):
            return ()
        return scored_members(group, "all" if group.kind == "experts" else self.reduction.members)

    def reduction_of(self, group: Group) -> Reduction:
        """Return how scores are reduced in a group; experts are read by nothing, so all they hold counts."""
        return dataclasses.replace(self.reduction, members="all") if group.kind == "experts" else self.reduction

    @property
    def reduction(self) -> Reduction:
        """Return how scores are reduced."""
        return self.own_reduction or Reduction(members="readers" if "input" in self.sources() else "all")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the plan."""
        is_scorer = isinstance(self.scorer, Scorer)
        return {
            "name": "width",
            "scorer": type(self.scorer).__name__,
            "scorer_options": dataclasses.asdict(self.scorer),  # type: ignore[call-overload]
            "sparsity": dict(self.sparsity),
            "compensate": self.compensate,
            "multiple_of": self.multiple_of,
            "budget": self.budget if isinstance(self.budget, str) else dict(self.budget),
            "reduction": dataclasses.asdict(self.reduction) if is_scorer else None,
            "damping": self.damping,
            "seed": self.seed,
            **({"experts": "tokens sent to each"} if self.counts_experts else {}),
        }


def selected(groups: Sequence[Group], options: WidthOptions) -> list[Group]:
    """Return the groups to cut, in the order of the blocks and of the sub-blocks in them.

    Raises:
        ValueError: if a kind or a group that is named is not there, or two groups would cut the same columns.
    """
    for kind in options.sparsity:
        if kind not in SUB_BLOCKS:
            raise ValueError(f"width pruning cuts {', '.join(SUB_BLOCKS)}, not {kind}")
        if not any(group.kind == kind for group in groups):
            known = ", ".join(sorted({group.kind for group in groups})) or "none"
            raise ValueError(f"the model has no groups of kind {kind!r}; it has {known}")
    found = [group for group in groups if group.kind in options.sparsity]
    if not found:
        raise ValueError("sparsity names no kind of group; give for example {'ffn': 0.25}")
    for key in () if isinstance(options.budget, str) else options.budget:
        if all(key != group.key for group in found):
            raise ValueError(registry.unknown("group", key, [group.key for group in found]))
    taken: dict[tuple[str, int | None, int], str] = {}
    for group in found:
        for member in group.readers:
            for position in member.positions(range(group.num_units)).tolist():
                other = taken.setdefault((member.name, member.expert, position), group.key)
                if other != group.key:
                    raise ValueError(f"{other} and {group.key} cut the same columns of {member.name}; choose one kind")
    return sorted(found, key=lambda group: (group.layer is None, group.layer or 0, SUB_BLOCKS.index(group.kind)))


def each_once(model: nn.Module, groups: Sequence[Group], options: WidthOptions) -> list[Group]:
    """Return groups that name every tensor once, also where it has several names: in a block that places share.

    Raises:
        ValueError: if such a group is to be rated or repaired by its inputs, which would be those of one place.
    """
    tensors, result = model.state_dict(keep_vars=True), []
    for group in groups:
        own = {(id(tensors[member.name]), member.dim, member.expert): member for member in reversed(group.members)}
        if len(own) < len(group.members) and (options.repairs or "input" in options.sources()):
            raise ValueError(
                f"{group.key} is used in several places, which see different inputs; use Magnitude, Random or Taylor "
                "with compensate='none'"
            )
        result.append(dataclasses.replace(group, members=tuple(reversed(own.values()))))
    return result


def bind(model: nn.Module, groups: Sequence[Group], options: WidthOptions) -> dict[str, Binding]:
    """Return the weights that are scored or repaired, by the names of their members.

    Raises:
        ValueError: if one is not a weight of the model, or is sharded.
    """
    rating = [member for group in groups for member in (*group.readers, *options.scored(group))]
    names = tuple(dict.fromkeys(member.name for member in rating))
    bindings = {binding.name: binding for binding in Targets(include=names).resolve(model)} if names else {}
    for name in names:
        if name not in bindings:
            raise ValueError(f"{name} is not a weight of its own in the model (tied, or renamed by a wrapper)")
        if distributed.is_sharded(bindings[name].parameter):
            raise ValueError(f"{name} is sharded; prune before fully_shard, then shard")
    return bindings
