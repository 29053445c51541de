"""Remove blocks one by one, each fused into its neighbours by a short local training.

The block whose absence changes the final hidden state least goes. Its linear layers are added to those of the same
role in the blocks around it, with low-rank coefficients and a low-rank update that are trained so that the group gives
the hidden states it gave before. The sums are merged into plain weights: the result is the stock class with fewer
blocks.

Source: FuseGPT, arXiv 2411.14507 (JarvisPei/FuseGPT). Differences: the mean squared error of hidden states instead of
    a divergence over the batch; the block is rated on the model as fused so far.
Cost: per block one pass per candidate over the first batches, one pass over all of them, and `epochs` forward and
    backward passes of the group. Held meanwhile: two hidden states per token on the CPU, in the dtype of the model,
    and what `fusing` says; and copies in main memory of the weights before they were fused.
Limits: blocks of one kind with linear layers of equal shapes; stacked experts, hybrids and tied blocks are refused.
    ReplaceMe reaches much of the gain without training: measure against it.

Shapes: N tokens that are not padding, D width of the residual stream.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.build import check_whole
from lightning_prune.structured.depth.alike import check_alike, rank_limits
from lightning_prune.structured.depth.bypass import bypassed, first_tensor
from lightning_prune.structured.depth.criteria import model_logits
from lightning_prune.structured.depth.fusing import FusedBlock, HiddenLoss, HiddenSquaredError
from lightning_prune.structured.depth.group_replay import Recording, Run, check_replay, record, replay
from lightning_prune.structured.depth.influence import influence
from lightning_prune.structured.depth.planning import check_no_state_file, check_number, make_plan, removable
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.method import Batch, StateFile, StructuredMethod
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.undo import Undo, undone_on_error
from lightning_prune.targets.targets import find_blocks

__all__ = ["FuseGPT", "FuseTraining", "macro_influence", "neighbours"]


@dataclass(frozen=True, kw_only=True)
class FuseTraining:
    """How the factors of one fusion are trained; the defaults are those of the released code.

    Args:
        rank: of the low-rank update and of the coefficients.
        epochs: passes over the calibration data per fusion.
        batch_size: sequences per step.
        learning_rate: of the low-rank update and the norms; decays to zero by a cosine, as the other does.
        coefficient_learning_rate: of the coefficients.
        loss: what is kept low.
    """

    rank: int = 128
    epochs: int = 20
    batch_size: int = 8
    learning_rate: float = 9.65e-6
    coefficient_learning_rate: float = 1e-3
    loss: HiddenLoss = field(default_factory=HiddenSquaredError)

    def __post_init__(self) -> None:
        at_least(1, rank=self.rank, epochs=self.epochs, batch_size=self.batch_size)
        at_least(0, learning_rate=self.learning_rate, coefficient_learning_rate=self.coefficient_learning_rate)


def macro_influence(
    model: nn.Module, batches: Sequence[Batch], candidates: Sequence[int], removed: Sequence[int] = ()
) -> list[float]:
    """Return, per candidate, the mean over tokens of 1 - cos(final hidden state, the same without the block).

    Args:
        model: called 1 + candidates times per batch, in evaluation mode.
        batches: `attention_mask` leaves out padding. Under several processes each brings its own.
        candidates: indices of blocks.
        removed: blocks that are bypassed in any case.
    """
    totals: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            whole_ND = _final_states(model, batch, removed)
            sums = [
                influence(whole_ND, _final_states(model, batch, [*removed, layer])).double().sum()
                for layer in candidates
            ]
            totals.append(torch.stack([*sums, torch.tensor(float(len(whole_ND))).to(sums[0])]))
    if not totals:
        raise ValueError("got no calibration batches; give a list with at least one")
    summed = distributed.sum_everywhere(torch.stack(totals).sum(0))
    return [float(value) for value in summed[:-1] / summed[-1]]


def _final_states(model: nn.Module, batch: Batch, removed: Sequence[int]) -> Tensor:
    """Return what leaves the last block, for the tokens that are not padding."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(bypassed(model, (), layers=removed))
        last = find_blocks(model)[-1]  # its hook comes after the one that bypasses it
        stack.callback(last.register_forward_hook(lambda m, a, output: seen.append(first_tensor(output))).remove)
        _, moved = model_logits(model, batch)
    mask_BT = moved.get("attention_mask", torch.ones_like(moved["input_ids"])).bool()
    return seen[0][mask_BT]


def neighbours(layers: Sequence[int], layer: int, size: int) -> list[int]:
    """Return `size` blocks around one of them, itself included; fewer at the ends of the model."""
    position = list(layers).index(layer)
    start = position - size // 2
    return list(layers[max(start, 0) : max(start + size, 0)])


def _check_rank(model: nn.Module, rank: int) -> None:
    limits = rank_limits(model)
    name = min(limits, key=limits.__getitem__)
    if rank > limits[name]:
        raise ValueError(
            f"rank {rank} is larger than the smaller dimension of {name}; give a rank of at most {limits[name]}"
        )


@dataclass(frozen=True, kw_only=True)
class FuseGPT(StructuredMethod):
    """Remove blocks, each fused into its neighbours by a short local training; see the module text.

    Args:
        num_blocks: how many blocks go; give this or `share`.
        share: of the blocks that go; 0.25 in the paper.
        group_size: blocks in a group, the one that goes included.
        num_score_batches: of how many batches macro influence is the mean; 4 in the released code.
        training: of the factors.
        seed: of their first values and of the order of the batches.
    """

    num_blocks: int | None = None
    share: float | None = None
    group_size: int = 8
    num_score_batches: int = 4
    training: FuseTraining = field(default_factory=FuseTraining)
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, num_blocks=self.num_blocks, num_score_batches=self.num_score_batches)
        at_least(0, seed=self.seed)
        if (self.num_blocks is None) == (self.share is None):
            raise ValueError(f"give num_blocks or share, got num_blocks={self.num_blocks} and share={self.share}")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}")
        if self.group_size < 3:
            raise ValueError(f"group_size must be >= 3, so that every block has a neighbour, got {self.group_size}")

    @property
    def repairs(self) -> bool:
        """Return True: the neighbours change."""
        return True

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Fuse blocks into their neighbours in place, and return the plan that removes them.

        Args:
            model: as it was after an error or an interruption.
            structure: which blocks may go.
            batches: calibration data; `attention_mask` leaves out padding. Under several processes each brings equally
                many sequences of its own, and gradients are averaged.
            state_file: must be None.
            progress: whether to show a bar per fusion.

        Raises:
            ValueError: if the options or the model do not fit.
        """
        number = self._check(model, state_file)
        with undone_on_error(model) as undo:
            return self._plan(model, structure, batches, number, undo, progress=progress)

    def _plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        number: int,
        undo: Undo,
        *,
        progress: bool,
    ) -> Plan:
        """Fuse so many blocks."""
        parts = _split(batches, self.training.batch_size, next(model.parameters()).device)
        found: dict[str, list[object]] = {"order": [], "influence": [], "groups": [], "losses": []}
        removed: list[int] = []
        with evaluating(model):
            for _ in range(number):
                live = [layer for layer in range(len(find_blocks(model))) if layer not in removed]
                candidates = removable(structure, live)
                values = macro_influence(model, batches[: self.num_score_batches], candidates, removed)
                layer = candidates[min(range(len(values)), key=values.__getitem__)]
                group = neighbours(live, layer, self.group_size)
                with bypassed(model, (), layers=removed):
                    losses = self._fuse(model, layer, group, parts, undo, fusion=len(removed), progress=progress)
                removed.append(layer)
                for key, value in zip(found, (layer, values, group, losses), strict=True):
                    found[key].append(value)
        return make_plan(self, model, structure, batches, layers=removed, found=found)

    def _check(self, model: nn.Module, state_file: StateFile) -> int:
        """Return how many blocks go."""
        check_no_state_file(self, state_file)
        total = len(find_blocks(model))
        number = max(1, round(self.share * total)) if self.share is not None else (self.num_blocks or 0)
        check_number(model, number)
        check_whole(model)
        check_alike(model)
        _check_rank(model, self.training.rank)
        return number

    def _fuse(
        self,
        model: nn.Module,
        layer: int,
        group: list[int],
        parts: Sequence[Batch],
        undo: Undo,
        *,
        fusion: int,
        progress: bool,
    ) -> list[float]:
        """Fuse one block into its group, and return the mean loss of every epoch."""
        blocks = find_blocks(model)
        members, position = [blocks[index] for index in group], group.index(layer)
        check_replay(model, members, (position, layer), parts[0])
        recordings = [record(model, members, part) for part in parts]
        runs = {
            place: FusedBlock(block, blocks[layer], self.training.rank, seed=f"{self.seed}/{fusion}/{group[place]}")
            for place, block in enumerate(members)
            if place != position
        }
        losses = self._train(runs, recordings, title=f"fusing block {layer}", fusion=fusion, progress=progress)
        for run in runs.values():
            for parameter in run.written:
                undo.keep(parameter)
            run.merge_()
        return losses

    def _train(
        self,
        runs: dict[int, FusedBlock],
        recordings: Sequence[Recording],
        *,
        title: str,
        fusion: int,
        progress: bool,
    ) -> list[float]:
        options = self.training
        slow, fast = [p for run in runs.values() for p in run.slow], [p for run in runs.values() for p in run.fast]
        rates = (options.learning_rate, options.coefficient_learning_rate)
        optimizer = torch.optim.Adam(
            [{"params": slow, "lr": rates[0]}, {"params": fast, "lr": rates[1]}], betas=(0.9, 0.95)
        )
        generator = torch.Generator().manual_seed(self.seed + fusion)
        steps, done, losses = options.epochs * len(recordings), 0, []
        bar = tqdm(total=steps, desc=title, disable=not (progress and distributed.is_first_rank()))
        with bar:
            for _ in range(options.epochs):
                total = 0.0
                for index in torch.randperm(len(recordings), generator=generator).tolist():
                    for param_group, rate in zip(optimizer.param_groups, rates, strict=True):
                        param_group["lr"] = rate * (1 + math.cos(math.pi * done / steps)) / 2
                    total += _step(optimizer, runs, recordings[index], options.loss, [*slow, *fast])
                    done += 1
                    bar.update()
                losses.append(total / len(recordings))
                bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
        return losses


def _step(
    optimizer: torch.optim.Optimizer,
    runs: dict[int, FusedBlock],
    recording: Recording,
    loss: HiddenLoss,
    parameters: list[nn.Parameter],
) -> float:
    """Take one optimizer step; gradients and loss are means over all processes."""
    device = parameters[0].device
    calls: dict[int, Run] = dict(runs)
    with torch.enable_grad():
        fused_BTD = replay(recording, calls, device)
        value = loss.loss(fused_BTD[recording.mask_BT.to(device)], recording.output_BTD[recording.mask_BT].to(device))
        grads = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
    number = distributed.sum_everywhere(torch.ones((), device=device))
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = distributed.sum_everywhere(grad) / number
    optimizer.step()
    return float(distributed.sum_everywhere(value.detach()) / number)


def _split(batches: Sequence[Batch], size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Cut batches into such of at most `size` sequences.

    Raises:
        ValueError: if there are none, or processes hold different numbers of them.
    """
    parts: list[dict[str, Tensor]] = []
    for batch in batches:
        pieces = {name: value.split(size) for name, value in batch.items()}
        parts += [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]
    if not parts:
        raise ValueError("got no calibration batches; give a list with at least one")
    counts = distributed.sum_everywhere(torch.tensor([1.0, len(parts), len(parts) ** 2], device=device))
    if counts[0] * counts[2] != counts[1] ** 2:
        raise ValueError(f"this process has {len(parts)} batches and others have not as many; give each equally many")
    return parts
