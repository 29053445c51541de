"""The nouns every room shares, and the contract of each room; no behaviour.

Shapes: O rows of a weight (output features), I columns (input features), R x C the same after pooling into units,
T tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

__all__ = [
    "Allocation",
    "Granularity",
    "Ranking",
    "Report",
    "Schedule",
    "Scope",
    "Scorer",
    "Stats",
    "Target",
    "TargetReport",
]

Scope = Literal["row", "tensor", "global"]


@dataclass(frozen=True)
class Target:
    """One weight chosen for pruning, as the formulas see it: a matrix with one row per output feature.

    `weight_OI` holds the rows of this process. They are rows `row_start` to `row_start + O` of `num_rows`; in one
    process, under DDP, and where rows cannot stay apart, they are all rows. Of a convolution the columns run over the
    input channels at one position of the kernel, then at the next. Under a weight norm it is the weight that comes out.
    """

    name: str
    weight_OI: Tensor
    row_start: int
    num_rows: int


@dataclass(frozen=True)
class Stats:
    """What was observed for one target, by the name of the statistic, and the place of this decision in the run."""

    values: Mapping[str, Tensor]
    step: int
    seed: int

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


class Ranking(Protocol):
    """Unit scores of all targets, computed when asked for, so that only one target's scores exist at a time."""

    @property
    def names(self) -> Sequence[str]:
        """Return the targets in order."""
        ...

    def unit(self, name: str) -> Tensor:
        """Return unit_RC, float32: this process's unit scores of one target."""
        ...

    def sum(self, name: str, values: Tensor) -> Tensor:
        """Sum a tensor over the processes that share the rows of this target."""
        ...

    def num_units(self, name: str) -> int:
        """Count the units of the whole target."""
        ...

    def num_weights(self, name: str) -> int:
        """Count the weights of the whole target."""
        ...

    def shape(self, name: str) -> tuple[int, int]:
        """Return (O, I) of the whole target."""
        ...

    def global_kept(self, num_keep: int, names: Sequence[str]) -> dict[str, int]:
        """Rank the units of several targets together; return how many of the best `num_keep` each one holds."""
        ...


class Scorer(ABC):
    """Rates the weights of one target; higher means keep.

    `needs` names the statistics to collect and their options. `dense_grad` asks for the gradients of pruned weights
    too; only then may a pruned weight come back.
    """

    dense_grad: ClassVar[bool] = False
    scope: Scope

    @property
    @abstractmethod
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect, by name, and their options."""

    @abstractmethod
    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32; higher means keep."""


class Allocation(ABC):
    """Splits one sparsity over all targets into one sparsity per target."""

    uses_scores: ClassVar[bool] = False

    @abstractmethod
    def split(self, sparsity: float, ranking: Ranking) -> dict[str, float]:
        """Return one sparsity per target; their mean over the weights is the one asked for."""


class Granularity(ABC):
    """The shape of a hole: pools scores into units and expands unit masks back.

    `has_direction` tells whether rows and columns of a weight play different parts in it.
    """

    has_direction: ClassVar[bool] = True

    @property
    @abstractmethod
    def rows_per_unit(self) -> int:
        """Return how many rows of the weight one unit spans."""

    @abstractmethod
    def check(self, name: str, shape_OI: tuple[int, int], *, num_taps: int = 1, num_groups: int = 1) -> None:
        """Raise ValueError if units do not tile the weight.

        Args:
            name: the target, for the message.
            shape_OI: its rows and columns.
            num_taps: how often the input channels repeat along the columns: the positions of a convolution's kernel.
            num_groups: into how many parts the rows fall that read channels of their own.
        """

    @abstractmethod
    def pool(self, score_OI: Tensor) -> Tensor:
        """Return unit_RC, one number per unit."""

    @abstractmethod
    def expand(self, keep_RC: Tensor, shape_OI: tuple[int, int]) -> Tensor:
        """Return mask_OI from one flag per unit."""

    @abstractmethod
    def scope(self, preferred: Scope) -> Scope:
        """Return the units ranked together, given the scorer's wish."""

    @abstractmethod
    def num_keep(self, sparsity: float, num_units: int) -> int:
        """Return how many of the units ranked together stay."""

    @abstractmethod
    def check_sparsity(self, sparsity: float) -> None:
        """Raise ValueError if the final sparsity contradicts the pattern."""


class Schedule(ABC):
    """When masks change, and what sparsity holds then; pure functions of the optimizer step."""

    sparsity: float

    @abstractmethod
    def resolve(self, total_steps: int) -> tuple[int, int, int]:
        """Return (start, end, interval) in optimizer steps; raise ValueError if they do not fit the training."""

    @abstractmethod
    def sparsity_at(self, step: int, total_steps: int) -> float:
        """Return the sparsity that holds after `step` optimizer steps."""

    @abstractmethod
    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether masks change after `step` optimizer steps."""


@dataclass(frozen=True)
class TargetReport:
    """What is left of one target."""

    name: str
    shape: tuple[int, ...]
    num_weights: int
    num_zeros: int

    @property
    def sparsity(self) -> float:
        """Zeros over weights, in [0, 1]."""
        return self.num_zeros / self.num_weights if self.num_weights else 0.0


@dataclass(frozen=True)
class Report:
    """What was pruned: counts over the targets and over the model.

    Bytes are those of the dense form; `num_bytes_nonzero` counts the bytes of the non-zero values alone. FLOPs per
    token count a multiplication and an addition for each weight of a matrix product, attention scores excluded.
    """

    step: int
    targets: tuple[TargetReport, ...]
    num_parameters: int
    num_nonzeros: int
    num_bytes: int
    num_bytes_nonzero: int
    flops_per_token: int
    flops_per_token_nonzero: int
    notes: tuple[str, ...] = ()

    @property
    def num_target_zeros(self) -> int:
        """Zeros of the targets."""
        return sum(target.num_zeros for target in self.targets)

    @property
    def sparsity(self) -> float:
        """Zeros over weights of the targets, in [0, 1]."""
        total = sum(target.num_weights for target in self.targets)
        return self.num_target_zeros / total if total else 0.0

    @property
    def model_sparsity(self) -> float:
        """Zeros over all parameters of the model, in [0, 1]."""
        return 1 - self.num_nonzeros / self.num_parameters if self.num_parameters else 0.0

    def as_dict(self) -> dict[str, object]:
        """Return plain numbers, strings and lists, ready for JSON."""
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "num_parameters": self.num_parameters,
            "num_nonzeros": self.num_nonzeros,
            "num_bytes": self.num_bytes,
            "num_bytes_nonzero": self.num_bytes_nonzero,
            "flops_per_token": self.flops_per_token,
            "flops_per_token_nonzero": self.flops_per_token_nonzero,
            "notes": list(self.notes),
            "targets": [
                {
                    "name": target.name,
                    "shape": list(target.shape),
                    "num_weights": target.num_weights,
                    "num_zeros": target.num_zeros,
                    "sparsity": target.sparsity,
                }
                for target in self.targets
            ],
        }

    def metrics(self) -> dict[str, float]:
        """Return what a trainer's logger should show, under `prune/`."""
        values = {
            "prune/sparsity": self.sparsity,
            "prune/model_sparsity": self.model_sparsity,
            "prune/num_parameters": float(self.num_parameters),
            "prune/num_nonzeros": float(self.num_nonzeros),
            "prune/num_bytes_nonzero": float(self.num_bytes_nonzero),
            "prune/flops_per_token_nonzero": float(self.flops_per_token_nonzero),
        }
        return values | {f"prune/sparsity/{target.name}": target.sparsity for target in self.targets}
