"""Reduce the scores of single weights to one score per unit of a group.

A unit covers slices of several parameters. Scores are added up over each slice to one number per index of the units'
dimension, reduced over the indices of a unit (a head has many), and combined over the members.

Source: the reductions over members are those of LLM-Pruner, arXiv 2305.11627, section 3.2; `transact` is the head
    score of TransAct, arXiv 2407.05690; `standardize` is the step before FLAP's global ranking, arXiv 2312.11983,
    section 3.3.
Cost: reads each score once.

Shapes: U units, S indices per unit and run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_prune.structured.groups import Group, Member

__all__ = ["Across", "Members", "Reduction", "Within", "scored_members", "standardize", "unit_scores"]

Members = Literal["readers", "all"]
Within = Literal["sum", "mean", "max", "l2", "transact"]
Across = Literal["sum", "mean", "max", "prod"]


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How scores of weights become scores of units.

    Args:
        members: `readers` takes the output projections alone, `all` everything that reads or
            produces the units, without biases and norms.
        within: reduces the indices of one unit in one member; `transact` is their mean plus ten maxima divided by
            their number.
        across: combines the members.
    """

    members: Members = "all"
    within: Within = "sum"
    across: Across = "sum"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("members", self.members, get_args(Members)),
            ("within", self.within, get_args(Within)),
            ("across", self.across, get_args(Across)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def scored_members(group: Group, members: Members) -> tuple[Member, ...]:
    """Return the members whose weights are scored: matrices alone, so neither biases nor norms.

    Raises:
        ValueError: if the group has none.
    """
    wanted = ("in",) if members == "readers" else ("in", "out")
    found = tuple(member for member in group.members if member.role in wanted)
    if not found:
        raise ValueError(
            f"{group.key} has no member to score with members={members!r}; it has "
            f"{', '.join(f'{member.name} ({member.role})' for member in group.members)}"
        )
    return found


def unit_scores(group: Group, scores: Mapping[str, Tensor], reduction: Reduction) -> Tensor:
    """Return score_U, float32: one number per unit; higher means keep.

    Args:
        group: its members that read or produce units are looked up in `scores`.
        scores: name of a parameter -> scores of its weights, shaped like the parameter.
        reduction: how they are reduced.

    Raises:
        ValueError: if a member has no scores.
    """
    rows = []
    for member in scored_members(group, reduction.members):
        if member.name not in scores:
            raise ValueError(f"no scores for {member.name} of {group.key}; got {', '.join(sorted(scores)) or 'none'}")
        rows.append(_within(_by_unit(member, scores[member.name], group.num_units), reduction.within))
    return _across(torch.stack(rows), reduction.across).float()


def standardize(score_U: Tensor) -> Tensor:
    """Return the scores with mean 0 and standard deviation 1, so that layers can be ranked together; zeros if equal."""
    centred = score_U - score_U.mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else torch.zeros_like(score_U)


def _by_unit(member: Member, score: Tensor, num_units: int) -> Tensor:
    """Return score_US, float64: a sum over everything but the units' dimension; runs lie side by side."""
    score, dim = (score, member.dim) if member.expert is None else (score[member.expert], member.dim - 1)
    index_sums = score.movedim(dim, 0).flatten(1).sum(1, dtype=torch.float64)
    runs = [index_sums[offset : offset + num_units * size].reshape(num_units, size) for offset, size in member.runs]
    return torch.cat(runs, 1)


def _within(score_US: Tensor, how: Within) -> Tensor:
    if how == "sum":
        return score_US.sum(1)
    if how == "mean":
        return score_US.mean(1)
    if how == "max":
        return score_US.amax(1)
    if how == "l2":
        return score_US.square().sum(1).sqrt()
    return score_US.mean(1) + 10 / score_US.shape[1] * score_US.amax(1)


def _across(score_MU: Tensor, how: Across) -> Tensor:
    if how == "sum":
        return score_MU.sum(0)
    if how == "mean":
        return score_MU.mean(0)
    return score_MU.amax(0) if how == "max" else score_MU.prod(0)
