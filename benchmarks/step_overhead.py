"""What masks cost in a training step: a 25 M-parameter Llama, AdamW, CPU, beside torch's and Lightning's own pruning.

    python benchmarks/step_overhead.py

All variants train in one process and take turns step by step, in an order that rotates. Every ratio compares steps of
the same turn; "plain again" is a second plain training and shows the noise. On one thread the ratio is one of processor
time, which other programs on the machine do not inflate as they do wall time; both are written. Steps on which masks
change are measured apart: the cost over ten steps is that of nine steps between and one change.

AdamW runs fused, as Transformers' Trainer runs it, and as torch's loop over parameters, its default on a CPU. The loop
takes the square root of the second moments with MKL, which is up to ten times slower where they are zero on some
processors, and the moments of pruned weights are zero whoever prunes them: "sqrt" in the result says how much that is.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from measure import limit, print_table, processor_seconds, random_batches, spread, to_device, write_result
from training import INTERVAL, SPARSITY, VARIANTS, Shape, Variant

NUM_WARM = 2
LOOP_NAMES = ("plain", "masks held", "torch.nn.utils.prune")
CHANGING = ("masks change every 10 steps", "same, by Taylor")
SHAPE = Shape(
    width=512, ffn=1408, num_layers=7, num_heads=8, vocab=4096, device=torch.device("cpu"), dtype=torch.float32
)


def prepare(shape: Shape, names: Sequence[str], *, size: int, length: int, seed: int) -> dict[str, Variant]:
    """Start one training for each name, all from the same weights and over the same batches."""
    batches = random_batches(num=4, size=size, length=length, vocab=shape.vocab, seed=seed)
    batches = [to_device(batch, shape.device) for batch in batches]
    variants = {}
    for name in names:
        variants[name] = shape.plain(batches, seed)
        make = VARIANTS[name]
        if make is not None:
            make(variants[name])
    return variants


def take_turns(variants: dict[str, Variant], num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, processor) seconds of every step after warming up; step k of each list is of the same turn."""
    names = list(variants)
    for _ in range(NUM_WARM):
        for name in names:
            variants[name].step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(num_rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(processor_seconds(variants[name].step))
    return times


def compare(times: dict[str, list[tuple[float, float]]], clock: int) -> list[dict[str, object]]:
    """Return a row per variant: seconds, and its ratio to plain between changes, at changes and over ten steps.

    Args:
        times: from `take_turns`.
        clock: which time the ratios compare, 0 for wall and 1 for processor time; the other's are written beside.
    """
    rows = []
    for name, values in times.items():
        row: dict[str, object] = {"variant": name, "seconds": spread([value[0] for value in values])}
        for which, key in ((clock, "ratio"), (1 - clock, "ratio_of_other_clock")):
            pairs = zip(values, times["plain"], strict=True)
            ratios = [value[which] / plain[which] for value, plain in pairs]
            changes = [ratio for turn, ratio in enumerate(ratios) if (NUM_WARM + turn) % INTERVAL == 0]
            between = [ratio for turn, ratio in enumerate(ratios) if (NUM_WARM + turn) % INTERVAL]
            row[key] = spread(between)
            if name in CHANGING:
                over_ten = (9 * statistics.median(between) + statistics.median(changes)) / 10
                row |= {f"{key}_at_change": spread(changes), f"{key}_over_10_steps": round(over_ten, 5)}
        rows.append(row)
    return rows


def show(rows: Sequence[dict]) -> None:
    """Print the table."""
    cells = []
    for row in rows:
        ratio = row["ratio"]
        at_change = row.get("ratio_at_change", {}).get("median", "")
        cells.append(
            [
                row["variant"],
                f"{1000 * row['seconds']['median']:.1f}",
                f"{ratio['median']:.4f}",
                f"{ratio['low']:.3f}-{ratio['high']:.3f}",
                at_change and f"{at_change:.3f}",
                row.get("ratio_over_10_steps", ""),
            ]
        )
    print_table(("variant", "ms a step", "/ plain", "quartiles", "at change", "over 10 steps"), cells)


def limits(rows: Sequence[dict], held_at_most: float, changing_at_most: float | None) -> list[dict[str, object]]:
    """Compare with what was promised."""
    row_of = {row["variant"]: row for row in rows}
    found = [limit("training step, masks held / plain", row_of["masks held"]["ratio"]["median"], held_at_most)]
    if changing_at_most is not None:
        ratio = row_of["masks change every 10 steps"]["ratio_over_10_steps"]
        found.append(limit("training step, masks changing every 10 steps / plain", ratio, changing_at_most))
    return found


def sqrt_of_zeros(num_weights: int) -> dict[str, float]:
    """Return seconds of torch.sqrt over second moments without zeros and with one half zeros."""
    moments = torch.rand(num_weights) + 0.1
    halved = moments * (torch.rand(num_weights) > SPARSITY)
    out = torch.empty_like(moments)
    found = {}
    for name, values in (("without_zeros", moments), ("half_zeros", halved)):
        times = [processor_seconds(lambda values=values: torch.sqrt(values, out=out)) for _ in range(9)]
        found[name] = round(statistics.median(time for _, time in times), 4)
    return found


def run(args: argparse.Namespace) -> tuple[list[dict], list[dict], int]:
    """Return rows under fused AdamW, rows under the loop, and the number of parameters."""
    fused = prepare(replace(SHAPE, is_fused=True), list(VARIANTS), size=args.size, length=args.length, seed=args.seed)
    loop = prepare(SHAPE, LOOP_NAMES, size=args.size, length=args.length, seed=args.seed)
    num_parameters = sum(p.numel() for p in fused["plain"].model.parameters())
    times = take_turns(fused | {f"loop: {name}": variant for name, variant in loop.items()}, args.rounds)
    clock = 1 if args.threads == 1 else 0
    fused_rows = compare({name: times[name] for name in fused}, clock)
    return fused_rows, compare({name: times[f"loop: {name}"] for name in loop}, clock), num_parameters


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, loop_rows, num_parameters = run(args)
    print("AdamW, fused")
    show(rows)
    print("AdamW, loop over parameters")
    show(loop_rows)
    sqrt = sqrt_of_zeros(num_parameters)
    print("seconds in torch.sqrt over the second moments:", sqrt)
    loop_limit = limits(loop_rows, 1.03, None)[0]
    write_result(
        "step_overhead",
        seed=args.seed,
        settings={
            "num_parameters": num_parameters,
            "batch": f"{args.size} sequences of {args.length} tokens",
            "optimizer": "torch.optim.AdamW, fused unless a row says loop",
            "dtype": "float32",
            "ratio": "of processor time" if args.threads == 1 else "of wall time",
            "sparsity": SPARSITY,
            "rounds": args.rounds,
        },
        rows=[*rows, *({**row, "optimizer": "loop"} for row in loop_rows), {"sqrt": sqrt}],
        limits=[*limits(rows, 1.03, 1.08), loop_limit | {"name": f"{loop_limit['name']}, AdamW as a loop"}],
        notes=[
            "ModelPruning and torch.nn.utils.prune hold fixed masks: compare them with 'masks held'.",
            "AdamW as a loop: the square root of zero second moments costs more than the masks; see 'sqrt'.",
        ],
    )


if __name__ == "__main__":
    main()
