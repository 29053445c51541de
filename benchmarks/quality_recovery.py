"""What each way of recovery wins back of a pruned story model, with equal tokens, from three kinds of pruning.

    LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/quality_recovery.py

Bases: 50 % of every row by Wanda, 2:4 by Wanda, and 30 % of the block parameters cut in width (Wanda, least squares).
Perplexity: the first 100,000 characters of tinystories_v1_valid.txt, in windows of 256 tokens, each read on its own
after the start token. BLiMP: the first pairs of each of 67 paradigms, not normalised by length.

Every way trains on the same sequences of tinystories_v1_train.txt in the same order; "gap closed" is what it takes off
the loss (nats per token) over what full fine-tuning takes off it, from the same base with the same seed.

Two processes share the work: --part 1 2 and --part 2 2, both with the same --output. Finished cells are kept in the
result file, and a second call goes on from there; --fresh starts again. --tune chooses the learning rates, on text that
is neither trained on nor evaluated, and writes them to a file of its own.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, data_folder, load_story_model, machine, print_table, versions
from quality_structured import PAIRS_PER_PARADIGM, Pair, blimp_accuracy, blimp_pairs
from quality_unstructured import NUM_CHARACTERS, REFERENCE, START, WINDOW, perplexity, windows
from recovery_methods import BASES, GRIDS, LORA, METHODS, SHARE, Base, Method, make_base
from torch import Tensor, nn

from lightning_prune.base.whole_file import written_aside
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.structure import Structure

NAME = "quality_recovery_stories3M"
MODEL = "stories3M"
NUM_CALIBRATION = 64
NUM_TUNING = 96
TRAIN_STEPS = 200
TRAIN_ROWS = 4
TRAIN_LENGTH = 128
TUNED_ON = BASES[0]
CONTROL = "full fine-tuning"
# Chosen with --tune; see SETTINGS.
RATES = {
    "full": 1e-4,
    "LoRA": 3e-3,
    "MaskLoRA": 3e-3,
    "ScaleLoRA": 1e-2,
    "norms": 3e-2,
    "head": 3e-4,
    "distillation": 3e-4,
    "KL + CE": 3e-4,
}
COMMAND = "LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/quality_recovery.py"
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Bench:
    """The dense model with its texts; sequences for tuning are none of those for training."""

    dense: nn.Module
    structure: Structure
    valid: Sequence[Tensor]
    tuning: Sequence[Tensor]
    pairs: Sequence[Pair]
    rows_NT: Tensor
    num_steps: int

    def batches(self, seed: int) -> tuple[list[Batch], list[Batch]]:
        """Return calibration and training batches of a seed, of different sequences."""
        order = list(range(len(self.rows_NT)))
        random.Random(seed).shuffle(order)
        calibration, rest = self.rows_NT[order[:NUM_CALIBRATION]], self.rows_NT[order[NUM_CALIBRATION:]]
        halves = torch.cat([rest[:, : TRAIN_LENGTH + 1], _second_half(rest)])
        shuffled = torch.randperm(len(halves), generator=torch.Generator().manual_seed(seed))
        training = halves[shuffled[: self.num_steps * TRAIN_ROWS]]
        assert len(training) == self.num_steps * TRAIN_ROWS, "the text is too short"
        return [{"input_ids": rows, "labels": rows} for rows in calibration.split(8)], [
            {"input_ids": rows, "labels": rows} for rows in training.split(TRAIN_ROWS)
        ]

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one bench per process
    def base(self, name: str, seed: int) -> Base:
        """Return the pruned model that a cell starts from."""
        return make_base(name, self.dense, self.batches(seed)[0], self.structure, seed)

    def row(self, name: str, base_name: str, seed: int) -> dict[str, Any]:
        """Measure one way from one base with one seed."""
        method, base = METHODS[name], self.base(base_name, seed)
        found = method.recover(base, self.batches(seed)[1], RATES.get(method.rate, 0.0), seed=seed)
        num_parameters = sum(p.numel() for p in base.model.parameters())
        is_beside = hasattr(found.model, "peft_config")
        return {
            "base": base_name,
            "method": name,
            "seed": seed,
            "perplexity": round(perplexity(found.model, self.valid), 4),
            "blimp": round(blimp_accuracy(found.model, self.pairs), 4),
            "num_trained": found.num_trained,
            "num_parameters": num_parameters,
            "trained_share": round(found.num_trained / num_parameters, 5),
            "learning_rate": RATES.get(method.rate),
            "tokens": self.num_steps * TRAIN_ROWS * TRAIN_LENGTH * (1 + method.corrects) if found.num_trained else 0,
            "seconds": round(found.seconds, 1),
            "adapters": "beside" if is_beside else "merged" if found.difference is not None else "none",
            "largest_change_of_logits_by_merging": found.difference,
            "zeros_filled": 0,  # check_zeros stops the run otherwise
            "kept_weights_at_zero": 0 if is_beside else base.check_zeros(found.model),
        }


def _second_half(rows_NT: Tensor) -> Tensor:
    """Return the start token and what follows the first TRAIN_LENGTH tokens."""
    return torch.cat([rows_NT[:, :1], rows_NT[:, TRAIN_LENGTH + 1 : 2 * TRAIN_LENGTH + 1]], dim=1)


def prepare(num_steps: int) -> Bench:
    """Load the model and the texts; stop if the dense figure is not the reference's."""
    folder = data_folder() / "text"
    model, encode = load_story_model(MODEL)
    valid = windows(encode, (folder / "tinystories_v1_valid.txt").read_text(encoding="utf-8")[:NUM_CHARACTERS])
    dense = perplexity(model, valid)
    if abs(dense - REFERENCE[MODEL]) > 0.01:
        raise SystemExit(f"dense perplexity is {dense:.4f}, the reference says {REFERENCE[MODEL]}")
    source = (folder / "tinystories_v1_train.txt").read_text(encoding="utf-8")
    rows = [window for window in windows(encode, source) if len(window) == WINDOW + 1]
    assert int(rows[0][0]) == START
    return Bench(
        dense=model,
        structure=discover(model),
        valid=valid,
        tuning=rows[-NUM_TUNING:],
        pairs=blimp_pairs(encode),
        rows_NT=torch.stack(rows[:-NUM_TUNING]),
        num_steps=num_steps,
    )


SETTINGS = {
    "bases": f"50 % of every row and 2:4 by Wanda; {SHARE:.0%} of the block parameters in width by Wanda, refitted by "
    "least squares; all linear layers in the blocks",
    "perplexity": f"first {NUM_CHARACTERS} characters of tinystories_v1_valid.txt, windows of {WINDOW} tokens",
    "blimp": f"first {PAIRS_PER_PARADIGM} pairs of each paradigm, log-likelihood, not normalised by length; standard "
    "error 0.027 per row",
    "calibration": f"{NUM_CALIBRATION} sequences of {WINDOW} tokens of tinystories_v1_train.txt, for pruning and "
    "reconstruction",
    "training": f"AdamW (0.9, 0.95), no weight decay, gradient norm clipped at 1, batches of {TRAIN_ROWS} x "
    f"{TRAIN_LENGTH} tokens, warm-up over a tenth, cosine to a tenth",
    "lora": f"rank {LORA['r']}, alpha {LORA['lora_alpha']}, all linear layers in the blocks; on the masked bases plain "
    "LoRA stays beside the weights, which it would fill; on the width base every LoRA is plain and merged",
    "distillation": "the dense parent teaches all logits, forward KL, temperature 1; KL + CE adds the cross-entropy of "
    "the text with weight 1",
    "reconstruction": "least squares on the kept weights, from the calibration sequences; the width base had its own",
    "head": "tied to the embeddings: one parameter of a quarter of the model",
    "learning_rate": f"per kind of training, chosen from a grid of four by the loss on {NUM_TUNING} sequences of "
    f"tinystories_v1_train.txt that are in no training batch, on {TUNED_ON}, seed 0; combinations take that of LoRA or "
    "of full fine-tuning; tuned rates stand in quality_recovery_tuning.json",
    "trained_share": "of all parameters of the base, zeros included",
    "seconds": "wall time of refitting, training and merging, two processes at a time",
    "seeds": "choose the calibration sequences and the training text",
}


def load(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a result file; none if there is no file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep the other processes that ask for it out of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def add(row: Mapping[str, Any], path: Path, key: Sequence[str], rest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add a row to a result file that another process writes too, and return all rows.

    Args:
        row: replaces one of the same key.
        path: the file.
        key: the fields that tell cells apart.
        rest: what the file says beside its rows.
    """
    path.parent.mkdir(exist_ok=True)
    with _alone_in(path.parent):
        rows = [found for found in load(path) if any(found[field] != row[field] for field in key)] + [dict(row)]
        record = {**rest, "seeds": sorted({found["seed"] for found in rows}), "settings": SETTINGS}
        record |= {"machine": machine(), "versions": versions(), "summary": summary(rows), "rows": rows}
        with written_aside(path) as aside:
            aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return rows


def gap_closed(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return what a way takes off the loss over what full fine-tuning does; None while either is missing."""
    same = {r["method"]: r for r in rows if (r["base"], r["seed"]) == (row["base"], row["seed"])}
    if not {"no recovery", CONTROL} <= same.keys():
        return None
    pruned, control = (math.log(same[name]["perplexity"]) for name in ("no recovery", CONTROL))
    return (pruned - math.log(row["perplexity"])) / (pruned - control)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over seeds, ordered as the tables are."""
    found = []
    for base in BASES:
        for method in METHODS:
            cells = [row for row in rows if (row.get("base"), row["method"]) == (base, method)]
            closed = [value for row in cells if (value := gap_closed(row, rows)) is not None]
            if not cells:
                continue
            values = sorted(row["perplexity"] for row in cells)
            line = {"base": base, "method": method, "num_seeds": len(cells), "range": [values[0], values[-1]]}
            for key in ("perplexity", "blimp", "trained_share", "seconds"):
                line[key] = round(statistics.median(row[key] for row in cells), 5)
            found.append(line | {"gap_closed": round(statistics.median(closed), 4) if closed else None})
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table per base."""
    head = ("perplexity", "range", "BLiMP", "trained", "seconds", "gap closed", "merge moves logits", "n")
    lines = summary(rows)
    for base in dict.fromkeys(line["base"] for line in lines):
        cells = []
        for line in (line for line in lines if line["base"] == base):
            same = [row for row in rows if (row["base"], row["method"]) == (base, line["method"])]
            moved = [row["largest_change_of_logits_by_merging"] for row in same]
            moves = [value for value in moved if value is not None]
            cells.append(
                [
                    line["method"],
                    f"{line['perplexity']:.3f}",
                    "-".join(f"{value:.2f}" for value in line["range"]),
                    f"{line['blimp']:.3f}",
                    f"{line['trained_share']:.2%}",
                    f"{line['seconds']:.0f}",
                    "" if line["gap_closed"] is None else f"{line['gap_closed']:.1%}",
                    f"{max(moves):.1e}" if moves else "",
                    line["num_seeds"],
                ]
            )
        print_table((base, *head), cells)
        print()


def tune(bench: Bench, args: argparse.Namespace) -> None:
    """Train every kind with every rate of its grid, and print the best."""
    path = args.output.with_name("quality_recovery_tuning.json")
    done = {(row["kind"], row["rate"]) for row in load(path)}
    wanted = [(kind, rate) for kind, grid in GRIDS.items() for rate in grid.rates]
    rows = load(path)
    for kind, rate in [key for key in wanted[args.part[0] - 1 :: args.part[1]] if key not in done]:
        method: Method = METHODS[GRIDS[kind].method]
        found = method.recover(bench.base(TUNED_ON, 0), bench.batches(0)[1], rate, seed=0)
        row = {"kind": kind, "method": GRIDS[kind].method, "rate": rate, "seed": 0}
        row |= {"perplexity": round(perplexity(found.model, bench.tuning), 4)}
        rest = {"benchmark": path.stem, "command": f"{COMMAND} --tune", "training_steps": bench.num_steps}
        rows = add(row, path, ("kind", "rate"), rest)
        print(row, f"{found.seconds:.0f} s", flush=True)
    for kind in GRIDS:
        best = min((row for row in rows if row["kind"] == kind), key=lambda row: row["perplexity"], default=None)
        print(kind, best, "used:", RATES[kind])


def main() -> None:
    """Measure what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="ROW")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=TRAIN_STEPS)
    parser.add_argument("--part", nargs=2, type=int, default=[1, 1], metavar=("I", "N"), help="the I-th of N processes")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what the result file holds")
    parser.add_argument("--tune", action="store_true", help="choose learning rates instead")
    args = parser.parse_args()
    bench = prepare(args.steps)
    if args.tune:
        tune(bench, args)
        return
    rows = load(args.output)
    done = set() if args.fresh else {(row["base"], row["method"], row["seed"]) for row in rows}
    wanted = [(base, name, seed) for seed in args.seeds for base in args.bases for name in args.rows]
    wanted = [key for key in wanted if key[0] in BASES[:2] or not METHODS[key[1]].only_masked]
    wanted = [key for key in wanted[args.part[0] - 1 :: args.part[1]] if key not in done]
    for number, (base, name, seed) in enumerate(wanted, 1):
        start = time.perf_counter()
        row = bench.row(name, base, seed)
        rest = {"benchmark": NAME, "command": COMMAND, "training_steps": args.steps}
        rows = add(row, args.output, ("base", "method", "seed"), rest)
        took = time.perf_counter() - start
        print(f"{number}/{len(wanted)} {base}, {name}, seed {seed}: {row['perplexity']:.3f} ({took:.0f} s)", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
