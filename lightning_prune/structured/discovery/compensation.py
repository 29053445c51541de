"""How the tensors around an RMS norm make up for the norm seeing fewer entries.

A norm over k of n entries, the others zero, divides by a root mean square that is too large by (n / k) ** 0.5. Either
its own weight takes the factor up, exactly but for the constant under the root, which grows by n / k; or what feeds
the norm shrinks and what reads it grows, which leaves the constant as it is.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from lightning_prune.structured.discovery.roles import Roles
from lightning_prune.structured.groups import Group, Member

__all__ = ["compensations", "stream_compensations"]


def compensations(groups: Sequence[Group], roles: Roles) -> Iterator[list[Group]]:
    """Yield the ways to make up for norms over units inside of modules, the same way in all, cheapest first."""
    ways = [list(_ways(group, roles)) for group in groups]
    for index in range(max(len(own) for own in ways)):
        if all(len(own) == 1 or index < len(own) for own in ways):
            yield [own[0] if len(own) == 1 else own[index] for own in ways]


def _ways(group: Group, roles: Roles) -> Iterator[Group]:
    norms = [member for member in group.members if member.role == "norm"]
    if not norms:
        yield group
        return
    yield _with_powers(group, roles, {norm.name: -1 for norm in norms})
    writers = list(dict.fromkeys(member.name for member in group.members if member.role == "out"))
    for fed in itertools.islice(itertools.combinations(writers, len(norms)), 8):
        biases = {f"{name.removesuffix('weight')}bias" for name in fed}
        powers = {member.name: 1 for member in group.members if member.name in {*fed, *biases}}
        yield _with_powers(group, roles, powers | {norm.name: -1 for norm in norms})


def stream_compensations(
    group: Group,
    roles: Roles,
    *,
    epsilons: tuple[str, ...] | None,
    embedding: str | None,
    head: str | None,
    last_norm: str | None,
) -> Iterator[Group]:
    """Yield the ways to make up for norms over the residual stream, cheapest first.

    Args:
        group: the residual channels.
        roles: of the model.
        epsilons: configuration fields of these norms' constants; None if no field changes these alone.
        embedding: the tensor that embeds tokens; some classes multiply it by the root of the width.
        head: the tensor that gives the logits, if it is not the embedding itself.
        last_norm: the weight of the norm before it.
    """
    norms = [member.name for member in group.members if member.role == "norm"]
    if epsilons is not None:
        yield dataclasses.replace(_with_powers(group, roles, dict.fromkeys(norms, -1)), epsilons=epsilons)
    reading = {member.name: -1 for member in group.members if member.role == "in"}
    writing = {member.name: 1 for member in group.members if member.role == "out" or _is_bias(member, roles)}
    for power in (1, 0):
        powers = reading | writing
        if embedding is not None:
            powers[embedding] = power
        if head is None and last_norm is not None:
            powers[last_norm] = -1 - power
        yield _with_powers(group, roles, powers)


def _is_bias(member: Member, roles: Roles) -> bool:
    return member.role == "vector" and member.name.endswith("bias")


def _with_powers(group: Group, roles: Roles, powers: dict[str, int]) -> Group:
    members: Sequence[Member] = [
        dataclasses.replace(
            member,
            power=powers.get(member.name, 0),
            offset=roles.norm(member.name)[1] if member.role == "norm" else 0.0,
        )
        for member in group.members
    ]
    return dataclasses.replace(group, members=tuple(members))
