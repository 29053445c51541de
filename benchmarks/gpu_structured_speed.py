"""Prefill and decode speed of a random Llama of 7 B parameters: dense, cut to half the FFN, cut to 3/4 of the layers.

    python benchmarks/gpu_structured_speed.py

Needs about 50 GiB of GPU memory in bfloat16; --layers makes it smaller. Exits with code 2 where there is no GPU. Each
cut model is compared with one that is built at that shape from the start: the ratio must be 1 within 2 %. Times are
wall times with the GPU synchronized at both ends; variants take turns round by round.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from measure import limit, print_table, random_llama, seconds, spread, write_result
from torch import nn

from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.shrink import shrink

WIDTH, FFN, HEADS, VOCAB = 4096, 11008, 32, 32000


def built(num_layers: int, ffn: int, device: torch.device, seed: int) -> nn.Module:
    """Return a model built at a shape."""
    with device:
        model = random_llama(width=WIDTH, ffn=ffn, num_layers=num_layers, num_heads=HEADS, vocab=VOCAB, seed=seed)
    return model.to(device, torch.bfloat16).eval()


def cut(num_layers: int, kind: str, device: torch.device, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Return a dense model that was cut, with seconds of finding and cutting, and peak bytes beside the parent's."""
    parent = built(num_layers, FFN, device, seed)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    found: list[object] = []
    finding = seconds(lambda: found.append(discover(parent)))
    structure = discover(parent)
    plan = Plan(layers=tuple(range(0, num_layers * 3 // 4)))
    if kind == "half the FFN":
        plan = Plan(cuts=tuple(Cut(g.key, tuple(range(0, g.num_units, 2))) for g in structure.of_kind("ffn")))
    models: list[nn.Module] = []
    cutting = seconds(lambda: models.append(shrink(parent, plan, structure=structure, consume=True)))
    peak = torch.cuda.max_memory_allocated(device) - held
    return models[0], {"discover_seconds": finding, "shrink_seconds": cutting, "peak_bytes_beside_parent": float(peak)}


@torch.no_grad()
def work(model: nn.Module, device: torch.device, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is timed."""
    ids = torch.randint(0, VOCAB, (args.size, args.length), device=device)
    generate = model.generate
    options = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    return {
        "prefill": lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1),
        "decode": lambda: generate(ids[:, :8], use_cache=True, **options),
    }


@torch.no_grad()
def take_turns(jobs: dict[str, dict[str, Callable[[], object]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time all jobs round by round; the first round warms up and does not count."""
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in job} for name, job in jobs.items()}
    for round_idx in range(rounds + 1):
        for name, job in jobs.items():
            for what, run in job.items():
                taken = seconds(run)
                if round_idx:
                    times[name][what].append(taken)
    return times


def main() -> None:
    """Measure all variants side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu_structured_speed needs a CUDA GPU and torch sees none; shrink_time measures the CPU", file=sys.stderr
        )
        sys.exit(2)
    device = torch.device("cuda", 0)
    half, notes_half = cut(args.layers, "half the FFN", device, args.seed)
    shallow, notes_shallow = cut(args.layers, "3/4 of the layers", device, args.seed)
    models = {
        "dense": built(args.layers, FFN, device, args.seed),
        "half the FFN": half,
        "half the FFN, built so": built(args.layers, FFN // 2, device, args.seed),
        "3/4 of the layers": shallow,
        "3/4 of the layers, built so": built(args.layers * 3 // 4, FFN, device, args.seed),
    }
    times = take_turns({name: work(model, device, args) for name, model in models.items()}, args.rounds)
    rows: list[dict[str, object]] = []
    for name, taken_by in times.items():
        row: dict[str, object] = {"variant": name}
        for what, taken in taken_by.items():
            row[what] = spread(taken)
            row[f"{what} / dense"] = spread([a / b for a, b in zip(taken, times["dense"][what], strict=True)])
        rows.append(row)
    print_table(
        ("variant", "prefill s", "/ dense", "decode s", "/ dense"),
        [
            [
                row["variant"],
                *(row[key]["median"] for key in ("prefill", "prefill / dense", "decode", "decode / dense")),
            ]  # type: ignore[index]
            for row in rows
        ],
    )
    limits = [
        limit(
            f"{what} of {name} / built so",
            spread([a / b for a, b in zip(times[name][what], times[f"{name}, built so"][what], strict=True)])["median"],
            1.02,
        )
        for name in ("half the FFN", "3/4 of the layers")
        for what in ("prefill", "decode")
    ]
    write_result(
        "gpu_structured_speed",
        seed=args.seed,
        settings=vars(args) | {"dtype": "bfloat16", "width": WIDTH, "ffn": FFN, "heads": HEADS},
        rows=[*rows, {"variant": "cutting half the FFN", **notes_half}, {"variant": "cutting layers", **notes_shallow}],
        limits=limits,
    )


if __name__ == "__main__":
    main()
