"""Methods that choose blocks and sub-blocks to remove: each a set of options with one function that makes a plan.

ShortGPT rates blocks once; SLEB, BlockPruner, FinerCut and Mamba-Shedder search greedily; RemoveTail takes the last.

Source: ShortGPT, arXiv 2403.03853; SLEB, arXiv 2402.09025 (jiwonsong-dev/SLEB); BlockPruner, arXiv 2406.10594
    (MrGGLS/BlockPruner); FinerCut, arXiv 2405.18218; Mamba-Shedder, arXiv 2501.17088; RemoveTail: Reassessing Layer
    Pruning in LLMs, arXiv 2411.15558. Differences: the loss is per token by default, and stops by parameters and by
    the ratio to the intact model are ours.
Cost: ShortGPT one pass; a greedy search one pass per candidate and removal; RemoveTail nothing.
Limits: SLEB's text loss flatters the text it was calibrated on; a plan with single sub-blocks needs per-layer shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_prune.base.bounds import at_least
from lightning_prune.structured.depth.bypass import Part, SubBlock
from lightning_prune.structured.depth.candidates import block_candidates, choose_parts, is_state_space, part_candidates
from lightning_prune.structured.depth.criteria import Criterion, JensenShannon, NextTokenLoss, SequencePerplexity
from lightning_prune.structured.depth.influence import block_influence, run_distance
from lightning_prune.structured.depth.planning import (
    check_no_state_file,
    check_number,
    make_plan,
    removable,
    run_search,
    unprotected,
)
from lightning_prune.structured.depth.search import Removal, Stop
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.method import Batch, StateFile, StructuredMethod
from lightning_prune.structured.structure import Structure
from lightning_prune.targets.targets import find_blocks

__all__ = ["SLEB", "BlockPruner", "FinerCut", "MambaShedder", "RemoveTail", "ShortGPT"]

BOTH: tuple[Part, ...] = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class ShortGPT(StructuredMethod):
    """Remove the blocks with the lowest block influence, all at once.

    Source: ShortGPT, arXiv 2403.03853; one run of blocks: The Unreasonable Ineffectiveness of the Deeper Layers,
        arXiv 2403.17887.

    Args:
        num_blocks: how many; about a quarter in the paper.
        contiguous: whether to remove one run instead, that of the smallest angular distance (arXiv 2403.17887).
        last_token_only: whether the distance of a run is taken at the last token of each sequence alone.
    """

    num_blocks: int
    contiguous: bool = False
    last_token_only: bool = False

    def __post_init__(self) -> None:
        at_least(1, num_blocks=self.num_blocks)
        if self.last_token_only and not self.contiguous:
            raise ValueError("last_token_only has no effect without contiguous; set both or neither")

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose blocks from one pass over the batches."""
        check_no_state_file(self, state_file)
        check_number(model, self.num_blocks)
        if self.contiguous:
            values = run_distance(model, batches, self.num_blocks, last_token_only=self.last_token_only)
            start = min(range(len(values)), key=values.__getitem__)
            order = list(range(start, start + self.num_blocks))
        else:
            values = block_influence(model, batches)
            order = sorted(removable(structure, range(len(values))), key=values.__getitem__)[: self.num_blocks]
        return make_plan(self, model, structure, batches, layers=order, found={"order": order, "influence": values})


@dataclass(frozen=True, kw_only=True)
class RemoveTail(StructuredMethod):
    """Remove the last blocks; meant to be followed by tuning the head and the last three blocks that stay.

    Source: Reassessing Layer Pruning in LLMs, arXiv 2411.15558.

    Args:
        num_blocks: how many; a quarter in the paper.
    """

    num_blocks: int

    def __post_init__(self) -> None:
        at_least(1, num_blocks=self.num_blocks)

    @property
    def needs_batches(self) -> bool:
        """Return False: the weights are not looked at either."""
        return False

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch] = (),
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose the last blocks; nothing but the model is needed."""
        check_no_state_file(self, state_file)
        check_number(model, self.num_blocks)
        total = len(find_blocks(model))
        order = list(range(total - 1, total - 1 - self.num_blocks, -1))
        return make_plan(self, model, structure, batches, layers=order, found={"order": order})


@dataclass(frozen=True, kw_only=True)
class SLEB(StructuredMethod):
    """Remove blocks greedily by the loss of the calibration text.

    Source: SLEB, arXiv 2402.09025 (jiwonsong-dev/SLEB). Difference: the loss is per token.

    Args:
        stop: when to end.
        criterion: what is kept low.
        protect_first: how many of the first blocks stay; 1 in the paper's code.
        protect_last: how many of the last blocks stay; 1 in the paper's code.
    """

    stop: Stop
    criterion: Criterion = field(default_factory=NextTokenLoss)
    protect_first: int = 1
    protect_last: int = 1

    def __post_init__(self) -> None:
        at_least(0, protect_first=self.protect_first, protect_last=self.protect_last)

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose blocks by a greedy search."""
        layers = unprotected(model, self.protect_first, self.protect_last)
        return _search_blocks(self, self.criterion, self.stop, layers, model, structure, batches, state_file, progress)


def _search_blocks(
    method: StructuredMethod,
    criterion: Criterion,
    stop: Stop,
    layers: Sequence[int],
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Batch],
    state_file: StateFile,
    progress: bool,
) -> Plan:
    layers = removable(structure, layers)
    candidates = block_candidates(model, layers)
    removal = run_search(criterion, model, batches, candidates, stop, state_file=state_file, progress=progress)
    layer_of = {candidate.label: layer for candidate, layer in zip(candidates, layers, strict=True)}
    gone = [layer_of[label] for label in removal.labels]
    return make_plan(method, model, structure, batches, layers=gone, found=removal.as_dict())


@dataclass(frozen=True, kw_only=True)
class MambaShedder(StructuredMethod):
    """Remove whole state-space blocks greedily by perplexity.

    Source: Mamba-Shedder, arXiv 2501.17088.

    Args:
        stop: when to end.
        criterion: what is kept low.
        protect_first: how many of the first blocks stay.
        protect_last: how many of the last blocks stay.
    """

    stop: Stop
    criterion: Criterion = field(default_factory=SequencePerplexity)
    protect_first: int = 0
    protect_last: int = 0

    def __post_init__(self) -> None:
        at_least(0, protect_first=self.protect_first, protect_last=self.protect_last)

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose state-space blocks by a greedy search; other blocks of a hybrid stay."""
        blocks = find_blocks(model)
        free = unprotected(model, self.protect_first, self.protect_last)
        layers = [layer for layer in free if is_state_space(blocks[layer])]
        if not layers:
            raise ValueError("no unprotected block of the model has a state-space layer; use SLEB or BlockPruner")
        return _search_blocks(self, self.criterion, self.stop, layers, model, structure, batches, state_file, progress)


@dataclass(frozen=True, kw_only=True)
class BlockPruner(StructuredMethod):
    """Remove attention and feed-forward parts greedily.

    Source: BlockPruner, arXiv 2406.10594 (MrGGLS/BlockPruner). Difference: the loss is per token by default.

    Args:
        stop: when to end; up to a third of the sub-blocks in the paper.
        criterion: what is kept low; SequencePerplexity for the paper's own.
        parts: which parts may go.
        protect_first: in how many of the first blocks nothing goes.
        protect_last: in how many of the last blocks nothing goes.
    """

    stop: Stop
    criterion: Criterion = field(default_factory=NextTokenLoss)
    parts: tuple[Part, ...] = BOTH
    protect_first: int = 0
    protect_last: int = 0

    def __post_init__(self) -> None:
        at_least(0, protect_first=self.protect_first, protect_last=self.protect_last)
        _check_parts(self.parts)

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose sub-blocks by a greedy search."""
        free = unprotected(model, self.protect_first, self.protect_last)
        groups = list(structure.groups.values())
        parts = choose_parts(model, groups, self.parts, free)
        candidates = part_candidates(model, groups, parts)
        removal = run_search(
            self.criterion, model, batches, candidates, self.stop, state_file=state_file, progress=progress
        )
        gone = _parts_of(removal, parts)
        return make_plan(self, model, structure, batches, parts=gone, found=removal.as_dict())


def _parts_of(removal: Removal, parts: Sequence[SubBlock]) -> list[SubBlock]:
    named = {str(part): part for part in parts}
    return [named[label] for label in removal.labels]


@dataclass(frozen=True, kw_only=True)
class FinerCut(StructuredMethod):
    """Remove attention and feed-forward parts greedily by the change of the output distribution; needs no labels.

    Source: FinerCut, arXiv 2405.18218.

    Args:
        stop: when to end; max_ratio does not apply to a divergence.
        criterion: JensenShannon in the paper; KullbackLeibler, LogitAngle or LogitDistance.
        exclude_first: share of the blocks, from the first, that are left alone until this share of their number
            plus one has been removed; 0.4 in the paper's code.
        parts: which parts may go.
    """

    stop: Stop
    criterion: Criterion = field(default_factory=JensenShannon)
    exclude_first: float = 0.4
    parts: tuple[Part, ...] = BOTH

    def __post_init__(self) -> None:
        _check_parts(self.parts)
        if not 0 <= self.exclude_first < 1:
            raise ValueError(f"exclude_first must be in [0, 1), got {self.exclude_first}; it is a share of the blocks")

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose sub-blocks by a greedy search."""
        if not 0 <= self.exclude_first < 1:
            raise ValueError(f"exclude_first must be in [0, 1), got {self.exclude_first}")
        total = len(find_blocks(model))
        late = int(self.exclude_first * total)
        groups = list(structure.groups.values())
        parts = choose_parts(model, groups, self.parts, range(total))
        candidates = part_candidates(model, groups, parts, late=late, not_before=late + 1)
        removal = run_search(
            self.criterion, model, batches, candidates, self.stop, state_file=state_file, progress=progress
        )
        gone = _parts_of(removal, parts)
        return make_plan(self, model, structure, batches, parts=gone, found=removal.as_dict())


def _check_parts(parts: Sequence[Part]) -> None:
    if not parts:
        raise ValueError(f"parts is empty, so nothing could go; name some of {', '.join(BOTH)}")
