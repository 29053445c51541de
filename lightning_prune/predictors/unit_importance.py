"""How much each unit matters to each sequence, and the predictor's start from it.

A unit's importance to a sequence is Wanda's: the norm of what its readers read of it, over the tokens of the sequence,
times the norm of the weights that read it. Sequences of one task (or, where nobody says, of one cluster of
instructions) share the mean of theirs; a short fit of the head to these means comes before joint training.

Source: Sun et al., Wanda, arXiv 2306.11695, per unit instead of per weight. The fit is our own: without it the
    conditioned model loses to one fixed mask.

Shapes: B sequences, T tokens, U units, C clusters, D features, I inputs of a reader.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.predictors.head import ScoreHead, standardised
from lightning_prune.predictors.unit_masks import columns_of_units, reader_of
from lightning_prune.structured.groups import Group, Member

__all__ = ["UnitImportance", "clusters", "fit_head"]


class UnitImportance:
    """Collects, sequence by sequence, how much each unit matters; made collectively where weights are sharded.

    Args:
        model: what is measured.
        groups: of units.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, tuple(groups)
        self._squares: list[Tensor | None] = [None] * len(self.groups)
        self._counted: Tensor | None = None
        self._norms = {
            (number, idx): _column_norms(reader_of(model, member)[1], member)
            for number, group in enumerate(self.groups)
            for idx, member in enumerate(group.readers)
        }

    @contextmanager
    def counting(self, attention_BT: Tensor) -> Iterator[None]:
        """Measure the call inside, of whose tokens those count that the attention mask names."""
        self._counted, self._squares = attention_BT, [None] * len(self.groups)
        handles = []
        for number, group in enumerate(self.groups):
            for idx, member in enumerate(group.readers):
                reader, _ = reader_of(self.model, member)
                handles.append(reader.register_forward_pre_hook(self._reading(number, idx)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def importance(self) -> list[Tensor]:
        """Return the importance of each group's units to each sequence of the last call, (B, U), float32."""
        return [square.sqrt() for square in self._squares if square is not None]

    def _reading(self, number: int, idx: int) -> Any:
        group, norms_I = self.groups[number], self._norms[number, idx]
        unit_I = columns_of_units(group, len(norms_I))[idx].to(norms_I.device)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            counted_BT = self._counted
            assert counted_BT is not None
            inputs_BTI = args[0].detach().reshape(*counted_BT.shape, -1).float()
            square_BI = (inputs_BTI.square() * counted_BT.unsqueeze(-1)).sum(1) * norms_I
            square_BU = square_BI.new_zeros(len(square_BI), group.num_units + 1).index_add_(1, unit_I, square_BI)
            before = self._squares[number]
            self._squares[number] = square_BU[:, :-1] if before is None else before + square_BU[:, :-1]

        return hook


def _column_norms(weight: Tensor, member: Member) -> Tensor:
    """Return the squared norm of what reads each input, (I,), also of a sharded weight; collective then."""
    whole = distributed.gather(distributed.local(weight.detach()), weight)
    return whole.float().square().sum(dim=1 - member.dim)


def clusters(features_BD: Tensor, num_clusters: int, *, num_iterations: int = 25) -> Tensor:
    """Return the cluster of each instruction, (B,), by k-means over standardised features.

    The first centre is the instruction farthest from the mean, each further one is farthest from those before: rare
    tasks get one too, and the order of the instructions does not matter.
    """
    scaled_BD = (features_BD - features_BD.mean(0)) / features_BD.std(0).clamp(min=1e-6)
    centres = scaled_BD[scaled_BD.norm(dim=-1).argmax()][None]
    while len(centres) < min(num_clusters, len(scaled_BD)):
        distance_B = torch.cdist(scaled_BD, centres).amin(-1)
        centres = torch.cat((centres, scaled_BD[distance_B.argmax()][None]))
    for _ in range(num_iterations):
        cluster_B = torch.cdist(scaled_BD, centres).argmin(-1)
        for number in range(len(centres)):
            if bool((cluster_B == number).any()):
                centres[number] = scaled_BD[cluster_B == number].mean(0)
    return torch.cdist(scaled_BD, centres).argmin(-1)


def fit_head(
    head: ScoreHead, features_BD: Tensor, importance: Sequence[Tensor], cluster_B: Tensor, *, num_steps: int
) -> float:
    """Start a head from importance, then fit it to what matters to each cluster, with Adam at 1e-3; collective.

    Args:
        head: changed; sharded or not.
        features_BD: of the instructions of all processes, without gradient.
        importance: of each group, (B, U).
        cluster_B: to which task or cluster each instruction belongs.
        num_steps: of the fit, over all instructions each.

    Returns:
        the mean squared error of the standardised scores at the end.
    """
    names, row_B = torch.unique(cluster_B, return_inverse=True)
    means = [torch.stack([one[row_B == row].mean(0) for row in range(len(names))]) for one in importance]
    fitted = head.whole()
    fitted.start_from([one.mean(0) for one in means], features_BD)
    wanted_BN = torch.cat([standardised(one) for one in means], dim=-1)[row_B]
    optimizer = torch.optim.Adam(fitted.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(num_steps):
            optimizer.zero_grad()
            (torch.cat(fitted(features_BD), dim=-1) - wanted_BN).square().mean().backward()
            optimizer.step()
    distributed.load_whole(head, fitted.state_dict())
    with torch.no_grad():
        return float((torch.cat(fitted(features_BD), dim=-1) - wanted_BN).square().mean())
