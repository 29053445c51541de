"""The figures of recovery_overhead on a GPU: random Llamas in bfloat16, 1 B parameters whole, 7 B with adapters alone.

    python benchmarks/gpu_recovery.py

Needs about 100 GiB of GPU memory; --layers and --large-layers make it smaller. Exits with code 2 where there is no GPU.
Weights are bfloat16 and every training runs under autocast, as Transformers' Trainer does with bf16=True; PEFT keeps
adapters in float32. Times are wall times with the GPU synchronized at both ends; variants take turns step by step.
Bytes are those of torch's allocator.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import random_batches, random_llama, to_device, write_result
from recovery_overhead import (
    LORAS,
    STUDENTS,
    Setting,
    Training,
    disk_bytes_per_token,
    limits_of,
    measure_group,
    settings_of,
    show,
)
from torch import nn

VOCAB = 32000
SHAPES = {"1 B": {"width": 2048, "ffn": 5504, "num_heads": 16}, "7 B": {"width": 4096, "ffn": 11008, "num_heads": 32}}


def peak_mb(variant: Training) -> float:
    """Return the megabytes that one step allocates at most, beyond what is held between steps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant.step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def dense(label: str, num_layers: int, device: torch.device, seed: int) -> nn.Module:
    """Return a random model of one of the shapes, made on the device."""
    with device:
        model = random_llama(**SHAPES[label], num_layers=num_layers, vocab=VOCAB, seed=seed)
    return model.to(device, torch.bfloat16)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=19, help="of the model of 1 B")
    parser.add_argument("--large-layers", type=int, default=32, help="of the model of 7 B")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_recovery needs a CUDA GPU and torch sees none; recovery_overhead measures the CPU", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0)
    made = random_batches(num=2, size=args.size, length=args.length, vocab=VOCAB, seed=args.seed)
    batches = [to_device(batch, device) for batch in made]
    rows: list[dict[str, Any]] = []
    limits: list[dict[str, object]] = []
    notes: list[str] = []
    plan = (("1 B", args.layers, (LORAS, STUDENTS)), ("7 B", args.large_layers, (LORAS[:1] + LORAS[2:],)))
    for label, num_layers, groups in plan:
        with tempfile.TemporaryDirectory() as scratch:
            setting = Setting(dense(label, num_layers, device, args.seed), batches, Path(scratch), torch.bfloat16)
            found = []
            for names in groups:
                found += measure_group(setting, names, rounds=args.rounds, clock=0, peak=peak_mb)
            if STUDENTS in groups:
                notes.append(f"cached logits take {disk_bytes_per_token(setting)} bytes per token on disk")
        rows += [{"model": label, "layers": num_layers, **row} for row in found]
        limits += limits_of(label, found)
        del setting
    show(rows)
    settings = {**settings_of(args), "dtype": "bfloat16 under autocast, adapters float32", "ratio": "of wall time"}
    write_result("gpu_recovery", seed=args.seed, settings=settings, rows=rows, limits=limits, notes=notes)


if __name__ == "__main__":
    main()
