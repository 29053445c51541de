"""Score weights at random: the floor every other method must beat.

Source: Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv 2202.02643.
Default scope: tensor.
Cost: draws one number per weight.
Limits: none; the same seed, step and target name give the same scores on every rank and after a restart.

Shapes: O output features, I input features.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Random", "random_score"]


def random_score(name: str, num_rows: int, num_inputs: int, *, seed: int, step: int) -> Tensor:
    """Draw score_OI in (0, 1], float32 on the CPU, from a generator seeded by (seed, step, name)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}/{name}".encode()))
    return 1 - torch.rand(num_rows, num_inputs, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Random(Scorer):
    """Keep weights at random; see the module text."""

    scope: Scope = "tensor"

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect: none."""
        return {}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32."""
        weight_OI = target.weight_OI
        score = random_score(target.name, target.num_rows, weight_OI.shape[1], seed=stats.seed, step=stats.step)
        return score[target.row_start : target.row_start + weight_OI.shape[0]].to(weight_OI.device)
