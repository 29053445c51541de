"""The quickstart's result: one row per model, as a table to read and a file to compute with."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lightning_prune.base.whole_file import written_aside

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Row", "format_table", "write_results"]

_HEADER = ("model", "parameters", "non-zeros", "sparsity", "val perplexity", "next-line accuracy", "bits per byte")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model; perplexity is per token, accuracy in [0, 1], sparsity over the targets."""

    model: str
    num_parameters: int
    num_nonzeros: int
    sparsity: float
    val_ppl: float
    accuracy: float
    bits_per_byte: float

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        return (
            self.model,
            f"{self.num_parameters:,}",
            f"{self.num_nonzeros:,}",
            f"{self.sparsity:.1%}",
            f"{self.val_ppl:.2f}",
            f"{self.accuracy:.3f}",
            f"{self.bits_per_byte:.3f}",
        )


def format_table(rows: Sequence[Row]) -> str:
    """Return an aligned table; names to the left, numbers to the right."""
    table = [_HEADER, *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(_HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def write_results(
    path: Path,
    rows: Sequence[Row],
    *,
    seconds: Mapping[str, float],
    num_questions: int,
    recipe: Mapping[str, object],
) -> None:
    """Write rows, times, memory and recipe as JSON, aside first and then under the name.

    Args:
        path: the file.
        rows: the table.
        seconds: how long each part took.
        num_questions: next-line questions behind an accuracy.
        recipe: the recipe as plain values.
    """
    content = {
        "rows": [asdict(row) for row in rows],
        "num_questions": num_questions,
        "seconds": dict(seconds),
        "peak_memory_bytes": _peak_memory(),
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "recipe": dict(recipe),
    }
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _peak_memory() -> int | None:
    """Return the most main memory this process held, where the system tells."""
    if resource is None:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
