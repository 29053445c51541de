"""The mask predictor: instruction -> vector -> scores -> one mask per group, all registered in one module.

It lives inside the model it masks, so that one wrapper (DDP, FSDP2) reduces its gradients and one checkpoint holds it.

Source: Hou et al., Instruction-Following Pruning, arXiv 2501.02086, sections 3.1 and 3.2.

Shapes: B instructions, T tokens, U units of a group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.predictors.encoder import InstructionEncoder
from lightning_prune.predictors.head import ScoreHead
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.predictors.unit_masks import UnitMasks
from lightning_prune.structured.groups import Group

__all__ = ["MaskPredictor"]


class MaskPredictor(nn.Module):
    """Predicts which units of a model compute for an instruction.

    Its buffers `num_steps` and `ramp_steps` say how far training has come, so that a resumed training goes on there.

    Args:
        model: what is masked.
        groups: whose units are masked.
        keep: how many of each group stay.
        encoder: reads the instruction.
        hidden: width inside the head.
        spread: of the scores at the start, see `ScoreHead`.
        choice: turns scores into masks.
    """

    num_steps: Tensor
    ramp_steps: Tensor
    condition: Any = None  # what puts its masks in force in the model

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        keep: Sequence[int],
        encoder: InstructionEncoder,
        hidden: int,
        spread: float,
        choice: SoftTopK,
    ) -> None:
        super().__init__()
        self.encoder, self.choice = encoder, choice
        self.head = ScoreHead(encoder.width, [group.num_units for group in groups], hidden=hidden, spread=spread)
        self.units = UnitMasks(model, groups)
        self.keep = tuple(keep)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ramp_steps", torch.zeros((), dtype=torch.int64))

    @property
    def is_trained(self) -> bool:
        """Return whether it was trained, or started from importance; before, it chooses by chance."""
        return bool(self.num_steps) or bool(self.head.outer.bias.any())

    def scores(self, ids_BT: Tensor, attention_BT: Tensor) -> list[Tensor]:
        """Return the scores of each group, (B, U), float32."""
        scores: list[Tensor] = self.head(self.encoder(ids_BT, attention_BT))
        return scores

    def masks(self, scores: Sequence[Tensor], keep: Sequence[int] | None = None) -> list[Tensor]:
        """Return the mask of each group, (B, U), exactly `keep` entries of a row not zero."""
        return [self.choice(one, k) for one, k in zip(scores, self.keep if keep is None else keep, strict=True)]

    def forward(self, ids_BT: Tensor, attention_BT: Tensor, keep: Sequence[int] | None = None) -> list[Tensor]:
        """Return the masks that the model is to run under; blended with the whole model while training ramps them in.

        In evaluation, and once the ramp is over, they are the masks themselves.
        """
        masks = self.masks(self.scores(ids_BT, attention_BT), keep)
        if not self.training:
            return masks
        share = (self.num_steps / self.ramp_steps.clamp(min=1)).clamp(max=1).float()
        share = torch.where(self.ramp_steps == 0, torch.ones_like(share), share)
        return [1 - share + share * mask for mask in masks]
