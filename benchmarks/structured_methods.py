"""Every structured method with the options it is compared with, as one function from a model to a smaller one.

Width methods take the same shape everywhere: one third of the query heads of each key/value group, and so many
feed-forward units, in eights, that the share of the block parameters is reached. Depth methods take whole blocks,
the nearest number; methods for sub-blocks stop at the removal that reaches the share.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch_pruning_peer import peer_missing, pruned_by_peer

from lightning_prune.scorers.activation import Activation
from lightning_prune.scorers.fluctuation import Fluctuation
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.random import Random
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import GreedyOutput
from lightning_prune.structured.depth.bypass import SubBlock, bypassed
from lightning_prune.structured.depth.candidates import part_parameters, unit_parameters
from lightning_prune.structured.depth.criteria import JensenShannon
from lightning_prune.structured.depth.fuse import FuseGPT, FuseTraining
from lightning_prune.structured.depth.methods import SLEB, BlockPruner, FinerCut, RemoveTail, ShortGPT
from lightning_prune.structured.depth.multipruner import MultiPruner
from lightning_prune.structured.depth.replace import ReplaceMe
from lightning_prune.structured.depth.search import Stop
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.method import StructuredMethod
from lightning_prune.structured.shrink import masked, shrink
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.width.method import Width
from lightning_prune.structured.width.rotate import rotate_and_slice
from lightning_prune.structured.width.subclone import apply_subclone, subclone
from lightning_prune.structured.width.unit_scores import Reduction
from lightning_prune.targets.targets import find_blocks

MULTIPLE = 8
NUM_SEARCH = 4  # calibration sequences of the greedy searches, which read them up to a hundred times
HEAD_SHARE = 1 / 3


@dataclass(frozen=True)
class Task:
    """What one row asks for.

    Args:
        model: a copy of the dense model that may be changed.
        structure: what can be cut from it.
        batches: calibration.
        share: of the parameters of all blocks that is to go.
        seed: of random scores.
        scratch: where searches and the peer keep files; one folder per seed.
    """

    model: nn.Module
    structure: Structure
    batches: Sequence[Mapping[str, Tensor]]
    share: float
    seed: int
    scratch: Path

    def state_file(self, method: StructuredMethod) -> Path:
        """Return where a search keeps its scores; smaller shares find those of larger ones."""
        own = f"_{self.share}" if isinstance(method, MultiPruner) else ""
        return self.scratch / f"{type(method).__name__}{own}.json"

    @property
    def search_batches(self) -> list[dict[str, Tensor]]:
        """Return the first calibration sequences, one batch."""
        first = self.batches[0]
        return [{key: value[:NUM_SEARCH] for key, value in first.items()}]


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Args:
        model: the smaller model, or the dense one where only a mask can hold the plan.
        plan: None where the method gives none.
        structure: set if `plan` must be held as a mask.
    """

    model: nn.Module
    plan: Plan | None = None
    structure: Structure | None = None

    @property
    def is_mask(self) -> bool:
        """Return whether the shapes are those of the dense model."""
        return self.structure is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the mask, if there is one, until the block ends."""
        with ExitStack() as stack:
            if self.structure is not None and self.plan is not None:
                groups = list(self.structure.groups.values())
                parts = [SubBlock(layer, part) for layer, part in self.plan.skip]  # type: ignore[arg-type]
                stack.enter_context(masked(self.model, self.structure, self.plan))
                stack.enter_context(bypassed(self.model, groups, parts=parts))
            yield

    def removed(self, dense: nn.Module) -> tuple[float, float]:
        """Return the removed shares of the block parameters and of all parameters."""
        before, before_all = _count(find_blocks(dense)), _count([dense])
        if self.structure is None or self.plan is None:
            return 1 - _count(find_blocks(self.model)) / before, 1 - _count([self.model]) / before_all
        gone = _masked_parameters(self.model, self.structure, self.plan)
        return gone / before, gone / before_all


Method = Callable[[Task], Pruned]


def _count(modules: Sequence[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _masked_parameters(model: nn.Module, structure: Structure, plan: Plan) -> int:
    """Count what a plan removes: blocks, sub-blocks with their norm, and units of what stays."""
    groups, blocks = list(structure.groups.values()), find_blocks(model)
    layers = set(range(len(blocks))) - set(range(len(blocks)) if plan.layers is None else plan.layers)
    gone = _count([blocks[layer] for layer in layers])
    for layer, part in plan.skip:
        gone += part_parameters(model, groups, SubBlock(layer, part))  # type: ignore[arg-type]
        gone += next(p.numel() for p in blocks[layer].parameters() if p.ndim == 1)
    skipped = {*plan.skip, *((layer, part) for layer in layers for part in ("attention", "mlp"))}
    for cut in plan.cuts:
        group = structure.groups[cut.group]
        if (group.layer, "mlp" if group.kind == "ffn" else "attention") not in skipped:
            gone += unit_parameters(model, group) * (group.num_units - len(cut.keep))
    return gone


def ffn_share(task: Task, *, heads: float) -> float:
    """Return the share of feed-forward units that reaches the share of block parameters."""
    total = _count(find_blocks(task.model))
    sizes = {
        kind: sum(unit_parameters(task.model, g) * g.num_units for g in task.structure.of_kind(kind))
        for kind in ("heads", "ffn")
    }
    return (task.share * total - heads * sizes["heads"]) / sizes["ffn"]


def width(
    scorer: Any, compensate: Any = "least_squares", reduction: Reduction | None = None, *, heads: float = HEAD_SHARE
) -> Method:
    """Return the method that cuts query heads and feed-forward units by a score."""

    def choose(task: Task) -> StructuredMethod:
        ffn = ffn_share(task, heads=heads)
        return Width(
            scorer=scorer,
            sparsity={"ffn": ffn, "heads": heads} if heads else {"ffn": ffn},
            compensate=compensate,
            multiple_of=MULTIPLE,
            reduction=reduction,
            seed=task.seed,
        )

    return planned(choose)


def planned(choose: Callable[[Task], StructuredMethod], *, is_search: bool = False) -> Method:
    """Return the function that makes a plan and cuts by it, or keeps it as a mask where no stock class can hold it."""

    def prune(task: Task) -> Pruned:
        method = choose(task)
        batches = task.search_batches if is_search else task.batches
        state = task.state_file(method) if is_search else None
        plan = method.plan(task.model, task.structure, batches, state_file=state, progress=False)
        is_stock = not plan.skip and not isinstance(method, MultiPruner)
        if is_stock:
            return Pruned(shrink(task.model, plan, structure=task.structure), plan)
        return Pruned(task.model, plan, task.structure)

    return prune


def blocks(make: Callable[[int], StructuredMethod], *, is_search: bool = False) -> Method:
    """Return the method that removes whole blocks; `make` takes their number."""
    return planned(
        lambda task: make(max(1, round(task.share * len(find_blocks(task.model))))),
        is_search=is_search,
    )


def parts(make: Callable[[float], StructuredMethod]) -> Method:
    """Return the method that removes sub-blocks; `make` takes the share of all parameters."""
    return planned(
        lambda task: make(task.share * _count(find_blocks(task.model)) / _count([task.model])),
        is_search=True,
    )


def _hidden(task: Task) -> int:
    """Return the width of the stream nearest to the share; the class wants a multiple of its heads."""
    width, step = task.structure.of_kind("hidden")[0].num_units, 2 * task.structure.of_kind("heads")[0].num_units
    return round(width * (1 - task.share) / step) * step


def rotated(task: Task) -> Pruned:
    """Rotate the residual stream to its principal directions and drop the weakest."""
    small, _ = rotate_and_slice(task.model, _hidden(task), task.batches, structure=task.structure, progress=False)
    return Pruned(small)


def subcloned(compensate: Any) -> Method:
    """Return the method that keeps the most active residual channels."""

    def prune(task: Task) -> Pruned:
        shape = {"hidden_size": _hidden(task)}
        plan = subclone(task.model, shape, task.batches, structure=task.structure, progress=False)
        small = apply_subclone(
            task.model,
            plan,
            task.batches,
            compensate=compensate,
            rescale=compensate == "none",
            structure=task.structure,
            progress=False,
        )
        return Pruned(small)

    return prune


def peer(importance: str) -> Method:
    """Return Torch-Pruning with one of its importances, on feed-forward units."""

    def prune(task: Task) -> Pruned:
        units = task.structure.of_kind("ffn")[0].num_units
        kept = round(units * (1 - ffn_share(task, heads=0.0)) / MULTIPLE) * MULTIPLE  # the peer would round down
        share = 1 - kept / units
        folder = task.scratch / f"{importance}_{task.share}"
        return Pruned(pruned_by_peer(copy.deepcopy(task.model), share, MULTIPLE, importance, task.batches, folder))

    return prune


ACTIVATION_L2 = Activation(aggregate="l2")
TRANSACT = Reduction(members="readers", within="transact")
LS, NONE = "least_squares", "none"
FUSE = FuseTraining(rank=16, epochs=10, learning_rate=1e-3, coefficient_learning_rate=1e-2)  # as in the recipe

METHODS: dict[str, Method] = {
    "random": width(Random()),
    "random, no repair": width(Random(), NONE),
    "magnitude": width(Magnitude()),
    "magnitude, no repair": width(Magnitude(), NONE),
    "Taylor": width(Taylor()),
    "Taylor, no repair (LLM-Pruner)": width(Taylor(), NONE),
    "Minitron activation": width(Activation()),
    "TransAct": width(ACTIVATION_L2, reduction=TRANSACT),
    "Wanda": width(Wanda()),
    "Wanda, no repair": width(Wanda(), NONE),
    "FLAP fluctuation": width(Fluctuation()),
    "greedy output": width(GreedyOutput()),
    "ShortGPT": blocks(lambda number: ShortGPT(num_blocks=number)),
    "SLEB": blocks(lambda number: SLEB(stop=Stop(count=number)), is_search=True),
    "RemoveTail": blocks(lambda number: RemoveTail(num_blocks=number)),
    "ReplaceMe": blocks(lambda number: ReplaceMe(num_blocks=number)),
    "FuseGPT": blocks(lambda number: FuseGPT(num_blocks=number, training=FUSE)),
    "BlockPruner": parts(lambda share: BlockPruner(stop=Stop(parameter_share=share))),
    "FinerCut": parts(
        lambda share: FinerCut(stop=Stop(parameter_share=share), criterion=JensenShannon(keep_logits=True))
    ),
    "MultiPruner": parts(lambda share: MultiPruner(parameter_share=share, ffn_step=64)),
    "rotate and slice": rotated,
    "subclone": subcloned(LS),
    "subclone, rescaled only": subcloned(NONE),
    "Taylor, FFN alone": width(Taylor(), heads=0.0),
    "Taylor, FFN alone, no repair": width(Taylor(), NONE, heads=0.0),
    "magnitude, FFN alone, no repair": width(Magnitude(), NONE, heads=0.0),
    "Torch-Pruning magnitude, FFN alone": peer("magnitude"),
    "Torch-Pruning Taylor, FFN alone": peer("taylor"),
}
PEERS = tuple(name for name in METHODS if name.startswith("Torch-Pruning"))


def skipped() -> dict[str, str]:
    """Return the methods that cannot run here, and why."""
    reason = peer_missing()
    return dict.fromkeys(PEERS, reason) if reason else {}
