"""What masks add to memory and to a checkpoint, per target weight: ours, torch's and Lightning's own pruning.

    python benchmarks/mask_memory.py

"held" is what stays between steps beyond a plain training; "peak" is what a whole step needs beyond a plain step;
"checkpoint" is what is written beyond a plain one. All three are counted, not estimated: storages of live tensors,
storages made during a step, and the length of the file torch.save writes.

What it would take to need none: a mask of a fixed sparse weight is `weight != 0`, and a checkpoint of the weights holds
it already. In training that costs one more pass over each weight to make the mask again for its gradient (a quarter
byte of traffic becomes five), and a kept weight that underflows to exactly zero, which bfloat16 makes likely, would be
lost without a word; regrowing methods and a guard that rolls back need the mask itself. One bit per weight is the other
floor: packed masks would have to be unpacked at every use.
"""

import argparse
import io
from collections.abc import Mapping

import torch
from lightning.pytorch.callbacks import ModelPruning
from measure import PeakBytes, block_weights, limit, live_bytes, print_table, write_result
from step_overhead import prepare
from training import SPARSITY, Shape, Variant

from lightning_prune.conductor.sparsifier import Sparsifier

SHAPE = Shape(
    width=512, ffn=1408, num_layers=7, num_heads=8, vocab=4096, device=torch.device("cpu"), dtype=torch.float32
)
NAMES = ("plain", "masks held", "same, by Taylor", "torch.nn.utils.prune", "Lightning ModelPruning")


def file_size(state: Mapping[str, object]) -> int:
    """Return how many bytes torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer().nbytes


def checkpoint(variant: Variant) -> dict[str, object]:
    """Return what a checkpoint of this training holds, without the optimizer."""
    state: dict[str, object] = {"model": variant.model.state_dict()}
    match variant.extras:
        case [Sparsifier() as sparsifier]:
            state["pruning"] = sparsifier.state_dict()
        case [ModelPruning() as callback, module]:
            state = {"state_dict": module.state_dict()}
            callback.on_save_checkpoint(None, module, state)  # type: ignore[arg-type]
    return state


def measure_variant(name: str, seed: int) -> dict[str, int]:
    """Return live bytes between steps, bytes made at most during a step, bytes of a checkpoint."""
    before = live_bytes()
    variant = prepare(SHAPE, [name], size=1, length=16, seed=seed)[name]
    for _ in range(2):
        variant.step()
    held = live_bytes() - before
    with PeakBytes() as tracker:
        variant.step()
    return {"held": held, "peak": held + tracker.peak, "checkpoint": file_size(checkpoint(variant))}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    plain = prepare(SHAPE, ["plain"], size=1, length=16, seed=args.seed)["plain"].model
    num_weights = sum(module.weight.numel() for module in block_weights(plain).values())
    del plain
    sizes = {name: measure_variant(name, args.seed) for name in NAMES}
    rows = []
    for name in NAMES[1:]:
        extra = {key: (sizes[name][key] - sizes["plain"][key]) / num_weights for key in sizes[name]}
        row = {
            "variant": name,
            "held_bytes_per_weight": round(extra["held"], 4),
            "peak_bytes_per_weight": round(extra["peak"], 4),
            "checkpoint_bits_per_weight": round(8 * extra["checkpoint"], 4),
        }
        rows.append(row)
    print_table(("variant", "bytes held", "bytes at peak", "bits in checkpoint"), [list(row.values()) for row in rows])
    held = rows[0]
    packed = (
        prepare(SHAPE, ["masks held"], size=1, length=16, seed=args.seed)["masks held"].extras[0].state_dict()["masks"]
    )
    mask_bits = 8 * sum(bits.numel() for bits in packed.values()) / num_weights
    rest = (sizes["masks held"]["checkpoint"] - sizes["plain"]["checkpoint"] - num_weights * mask_bits / 8) / len(
        packed
    )
    print(f"masks alone {mask_bits:.4f} bits a weight; names and headers {rest:.0f} bytes a target")
    write_result(
        "mask_memory",
        seed=args.seed,
        settings={
            "num_target_weights": num_weights,
            "weights": "float32, AdamW",
            "sparsity": SPARSITY,
            "unit": "per weight of the targets, beyond a plain training",
        },
        rows=rows,
        limits=[
            limit("bytes held per target weight while training", float(held["held_bytes_per_weight"]), 1.0),
            limit("bits of masks per target weight in a checkpoint", mask_bits, 1.0),
        ],
        notes=[
            f"A checkpoint also holds {rest:.0f} bytes a target of names and file headers, whatever the target's size.",
            "Needing none: the mask of a fixed sparse weight is weight != 0; see the text of mask_memory.py.",
            "ModelPruning makes pruning permanent when it saves: its checkpoint holds no masks, so a resumed run has "
            "none; its default keeps a copy of the initial weights while training.",
        ],
    )


if __name__ == "__main__":
    main()
