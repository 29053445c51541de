"""The figures of step_overhead, mask_memory and oneshot_time on a GPU: a random Llama of 1 B parameters in bfloat16.

    python benchmarks/gpu_step_overhead.py

Needs about 60 GiB of GPU memory; --layers makes it smaller. Exits with code 2 where there is no GPU. Times are wall
times with the GPU synchronized at both ends; variants take turns step by step. Bytes are those of torch's allocator.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from measure import (
    block_weights,
    limit,
    print_table,
    random_batches,
    random_llama,
    seconds,
    spread,
    to_device,
    write_result,
)
from oneshot_time import BATCH, NUM_SEQUENCES, plain, prune
from step_overhead import compare, limits, prepare, show, take_turns
from torch import nn
from training import SPARSITY, Shape

NAMES = ("plain", "plain again", "masks held", "masks change every 10 steps", "torch.nn.utils.prune")
WIDTH, FFN, HEADS, VOCAB = 2048, 5504, 16, 32000


def shape(num_layers: int, device: torch.device) -> Shape:
    """Return the sizes of the model; 19 layers are a billion parameters."""
    return Shape(
        width=WIDTH,
        ffn=FFN,
        num_layers=num_layers,
        num_heads=HEADS,
        vocab=VOCAB,
        device=device,
        dtype=torch.bfloat16,
        is_fused=True,
    )


def overhead(num_layers: int, device: torch.device, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row per variant, as step_overhead does."""
    variants = prepare(shape(num_layers, device), NAMES, size=args.size, length=args.length, seed=args.seed)
    return compare(take_turns(variants, args.rounds), clock=0)


def allocated(name: str, num_layers: int, device: torch.device, seed: int) -> int:
    """Return the bytes that one variant holds between steps."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    variant = prepare(shape(num_layers, device), [name], size=1, length=64, seed=seed)[name]
    for _ in range(2):
        variant.step()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(device) - before


def memory(num_layers: int, device: torch.device, seed: int) -> dict[str, float]:
    """Return bytes per target weight beyond a plain training, by variant."""
    with torch.device("meta"):
        model = random_llama(width=WIDTH, ffn=FFN, num_layers=num_layers, num_heads=HEADS, vocab=VOCAB, seed=seed)
    num_weights = sum(module.weight.numel() for module in block_weights(model).values())
    base = allocated("plain", num_layers, device, seed)
    names = ("masks held", "torch.nn.utils.prune")
    return {name: round((allocated(name, num_layers, device, seed) - base) / num_weights, 4) for name in names}


def peak_of(work: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that were allocated at most, beyond those before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def oneshot(num_layers: int, device: torch.device, args: argparse.Namespace) -> dict[str, object]:
    """Time Wanda beside a plain pass over the same sequences; every pruning starts from a dense model."""
    batches = random_batches(num=NUM_SEQUENCES // BATCH, size=BATCH, length=args.length, vocab=VOCAB, seed=args.seed)
    inputs = [{"input_ids": to_device(batch, device)["input_ids"]} for batch in batches]
    sizes = {"width": WIDTH, "ffn": FFN, "num_layers": num_layers, "num_heads": HEADS, "vocab": VOCAB}
    model: nn.Module = random_llama(**sizes, seed=args.seed).to(device=device, dtype=torch.bfloat16).eval()
    dense = {name: value.cpu() for name, value in model.state_dict().items()}
    plain(model, inputs)
    prune(model, inputs)
    ratios, plains, prunings = [], [], []
    for _ in range(5):
        model.load_state_dict(dense)
        plains.append(seconds(lambda: plain(model, inputs)))
        prunings.append(seconds(lambda: prune(model, inputs)))
        ratios.append(prunings[-1] / plains[-1])
    model.load_state_dict(dense)
    num_masks = sum(module.weight.numel() for module in block_weights(model).values())
    return {
        "plain_seconds": spread(plains),
        "prune_seconds": spread(prunings),
        "ratio": spread(ratios),
        "peak_mb_beyond_model_and_masks": round((peak_of(lambda: prune(model, inputs), device) - num_masks) / 1e6, 1),
        "inputs_of_all_blocks_mb": round(2 * NUM_SEQUENCES * args.length * WIDTH * num_layers / 1e6, 1),
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--size", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step_overhead needs a CUDA GPU and torch sees none; step_overhead measures the CPU", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0)
    rows = overhead(args.layers, device, args)
    show(rows)
    held = memory(args.layers, device, args.seed)
    print_table(("variant", "bytes held per target weight"), list(held.items()))
    once = oneshot(args.layers, device, args)
    print_table(list(once), [[value if isinstance(value, float) else value["median"] for value in once.values()]])
    write_result(
        "gpu_step_overhead",
        seed=args.seed,
        settings={
            "layers": args.layers,
            "batch": f"{args.size} sequences of {args.length} tokens",
            "optimizer": "torch.optim.AdamW, fused",
            "dtype": "bfloat16",
            "sparsity": SPARSITY,
            "oneshot": f"Wanda, {NUM_SEQUENCES} sequences of {args.length} tokens",
        },
        rows=[*rows, {"variant": "memory", "bytes_held_per_weight": held}, {"variant": "oneshot"} | once],
        limits=[
            *limits(rows, 1.02, None),
            limit("bytes held per target weight while training", held["masks held"], 1.0),
            limit("Wanda / plain pass", once["ratio"]["median"], 2.5),
        ],
    )


if __name__ == "__main__":
    main()
