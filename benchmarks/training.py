"""The training variants that step_overhead, mask_memory and their GPU form compare: same model, same batches.

Lightning's ModelPruning is driven through its own methods (`setup`, `apply_pruning`) in the same bare loop, so that
what is compared is the masking and not the trainer around it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelPruning
from measure import block_weights, random_llama
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from lightning_prune.base.types import Scorer
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.schedules import Linear, Once
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.taylor import Taylor

SPARSITY = 0.5
INTERVAL = 10
_TOTAL_STEPS = 100_000


@dataclass
class Variant:
    """One training under way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Sequence[Mapping[str, Tensor]]
    extras: list[object] = field(default_factory=list)
    num_steps: int = 0

    def step(self) -> None:
        """Run forward, backward and the optimizer once."""
        batch = self.batches[self.num_steps % len(self.batches)]
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and where it trains."""

    width: int
    ffn: int
    num_layers: int
    num_heads: int
    vocab: int
    device: torch.device
    dtype: torch.dtype
    is_fused: bool = False

    def plain(self, batches: Sequence[Mapping[str, Tensor]], seed: int) -> Variant:
        """Return a training without pruning."""
        model = random_llama(
            width=self.width,
            ffn=self.ffn,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            vocab=self.vocab,
            seed=seed,
        )
        model.to(device=self.device, dtype=self.dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.is_fused)
        return Variant(model, optimizer, batches)


def held(variant: Variant) -> None:
    """Prune half by magnitude at once and hold the masks."""
    _attach(variant, Sparsifier(schedule=Once(sparsity=SPARSITY)))


def ramp(variant: Variant, scorer: Scorer | None = None) -> None:
    """Prune by magnitude, masks changing every ten steps; 30 % from the first step on."""
    schedule = Linear(sparsity=SPARSITY, initial=0.3, start=1, end=_TOTAL_STEPS, interval=INTERVAL)
    _attach(variant, Sparsifier(schedule=schedule, scorer=scorer or Magnitude()))


def ramp_taylor(variant: Variant) -> None:
    """Prune by |weight x gradient|, averaged at every step, masks changing every ten steps."""
    ramp(variant, Taylor())


def _attach(variant: Variant, sparsifier: Sparsifier) -> None:
    sparsifier.attach(variant.model, [variant.optimizer], total_steps=_TOTAL_STEPS)
    variant.extras.append(sparsifier)


def torch_masks(variant: Variant) -> None:
    """Prune half of every target with torch.nn.utils.prune."""
    for module in block_weights(variant.model).values():
        torch_prune.l1_unstructured(module, "weight", amount=SPARSITY)


class _Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def lightning_masks(variant: Variant) -> None:
    """Prune half of all targets with Lightning's ModelPruning, its defaults otherwise."""
    pairs = [(module, "weight") for module in block_weights(variant.model).values()]
    callback = ModelPruning("l1_unstructured", parameters_to_prune=pairs, amount=SPARSITY, use_global_unstructured=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = _Module(variant.model)
        callback.setup(None, module, "fit")  # type: ignore[arg-type]
        callback.apply_pruning(SPARSITY)
    variant.extras += [callback, module]


VARIANTS: dict[str, Callable[[Variant], None] | None] = {
    "plain": None,
    "plain again": None,
    "masks held": held,
    "masks change every 10 steps": ramp,
    "same, by Taylor": ramp_taylor,
    "torch.nn.utils.prune": torch_masks,
    "Lightning ModelPruning": lightning_masks,
}
