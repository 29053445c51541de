"""From one vector per instruction to one score per unit of every group.

Two layers with a GELU between them, over a LayerNorm. They compute in float32 whatever the model does: a hundred
million outputs of nearly equal size would fall into ties in bfloat16.

Source: Hou et al., Instruction-Following Pruning, arXiv 2501.02086, section 3; the paper leaves the activation open.
    The start from importance is our own: scores that differ by chance cut the parent at random, which joint training
    does not make good again; see `start_from`.

Shapes: B instructions, D features, H hidden, U units of a group, N units of all groups.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base import distributed

__all__ = ["ScoreHead"]


class ScoreHead(nn.Module):
    """Scores the units of all groups.

    Args:
        width: features of the encoder, D.
        num_units: of each group.
        hidden: width between the two layers, H.
        spread: standard deviation of a score across instructions, at the start, in units of the spread of the scores
            across units; at most 0.1 keeps what importance says of the units.
    """

    def __init__(self, width: int, num_units: Sequence[int], *, hidden: int = 128, spread: float = 0.1) -> None:
        super().__init__()
        self.num_units, self.spread, self._sizes = tuple(num_units), spread, (width, hidden)
        self.norm = nn.LayerNorm(width, dtype=torch.float32)
        self.inner = nn.Linear(width, hidden, dtype=torch.float32)
        self.outer = nn.Linear(hidden, sum(self.num_units), dtype=torch.float32)
        # GELU of a standard normal has a mean square of 0.425; the bias takes up what all instructions share.
        nn.init.normal_(self.inner.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(self.inner.bias)
        nn.init.normal_(self.outer.weight, std=spread / math.sqrt(0.425 * hidden))
        nn.init.zeros_(self.outer.bias)

    def forward(self, features_BD: Tensor) -> list[Tensor]:
        """Return the scores of each group, (B, U), float32."""
        with torch.autocast(features_BD.device.type, enabled=False):
            scaled_BD = functional.layer_norm(
                features_BD.float(), self.norm.normalized_shape, self.norm.weight.float(), self.norm.bias.float()
            )
            hidden_BH = functional.gelu(
                functional.linear(scaled_BD, self.inner.weight.float(), self.inner.bias.float())
            )
            scores_BN = functional.linear(hidden_BH, self.outer.weight.float(), self.outer.bias.float())
        return list(scores_BN.split(self.num_units, dim=-1))

    def whole(self) -> "ScoreHead":
        """Return a copy with whole tensors, to be computed with outside of the model's own call; collective."""
        twin = ScoreHead(self._sizes[0], self.num_units, hidden=self._sizes[1], spread=self.spread)
        state = distributed.whole_state_dict(self)
        twin.load_state_dict(state)
        return twin.to(next(iter(state.values())).device)

    @torch.no_grad()
    def start_from(self, importance: Sequence[Tensor], features_BD: Tensor) -> None:
        """Start from how much each unit matters: as bias, and with scores that differ little between instructions.

        Args:
            importance: of each group, (U,), positive; its logarithm is standardised.
            features_BD: of some instructions; over them the scores get the spread asked for.
        """
        self.outer.bias.zero_()
        if len(features_BD) > 1:
            across = torch.cat(self(features_BD), dim=-1).std(dim=0).mean()
            if float(across) > 1e-6:  # else all instructions read alike
                self.outer.weight.mul_(self.spread / across)
            centre = torch.cat(self(features_BD), dim=-1).mean(dim=0)
        else:
            centre = torch.zeros_like(self.outer.bias)
        wanted = torch.cat([standardised(one.to(centre.device)) for one in importance])
        self.outer.bias.copy_(wanted - centre)


def standardised(importance_U: Tensor) -> Tensor:
    """Return the logarithm of importances with mean 0 and standard deviation 1 over the units of a group."""
    log_U = importance_U.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    deviation = log_U.std(dim=-1, keepdim=True).clamp(min=1e-6)
    return (log_U - log_U.mean(dim=-1, keepdim=True)) / deviation
