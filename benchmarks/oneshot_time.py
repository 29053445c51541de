"""How long one-shot Wanda takes beside a plain forward pass over the same 32 sequences, and how much memory.

    LIGHTNING_PRUNE_DATA=FOLDER python benchmarks/oneshot_time.py

Two models: stories3M on TinyStories text, and a random Llama of 100 M parameters on random tokens. Pruning and plain
passes take turns in one process; a ratio compares neighbours in time. On one thread it is a ratio of processor time,
which other programs on the machine do not inflate. Two passes are the floor: every block runs once to be observed and
once pruned. The plain pass computes the output head, which pruning skips.

Memory: bytes of tensors beyond the model, its masks, and the pruned values, which stay in main memory until the end so
that an error changes nothing; from every torch operation. Three figures bound it: it does not grow with the
number of blocks, it stays below what one block makes and takes for all sequences at once, and it is a small part of the
inputs of all blocks.
"""

import argparse
import copy
import functools
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from measure import (
    PeakBytes,
    block_weights,
    data_folder,
    limit,
    load_story_model,
    print_table,
    processor_seconds,
    random_batches,
    random_llama,
    spread,
    write_result,
)
from torch import Tensor, nn

from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.schedules import Once
from lightning_prune.scorers.wanda import Wanda

NUM_SEQUENCES = 32
LENGTH = 256
BATCH = 4
Batches = Sequence[Mapping[str, Tensor]]


def prune(model: nn.Module, batches: Batches) -> None:
    """Prune half of every row of every target."""
    Sparsifier(schedule=Once(sparsity=0.5), scorer=Wanda()).prune_once(model, batches, progress=False)


@torch.no_grad()
def plain(model: nn.Module, batches: Batches) -> None:
    """Run all sequences through the model."""
    for batch in batches:
        model(**batch)


def take_turns(model: nn.Module, batches: Batches, num_rounds: int, clock: int) -> dict[str, object]:
    """Time plain passes and pruning by turns; pruning starts from the dense weights every time."""
    dense = copy.deepcopy(model.state_dict())
    plain(model, batches)
    passes, prunings = [processor_seconds(lambda: plain(model, batches))], []
    for _ in range(num_rounds):
        prunings.append(processor_seconds(lambda: prune(model, batches)))
        zeros = [float((module.weight == 0).float().mean()) for module in block_weights(model).values()]
        assert all(abs(share - 0.5) < 1e-3 for share in zeros), "pruning did not reach one half"
        model.load_state_dict(dense)
        passes.append(processor_seconds(lambda: plain(model, batches)))
    found: dict[str, object] = {
        "plain_seconds": spread([times[0] for times in passes]),
        "prune_seconds": spread([times[0] for times in prunings]),
    }
    for which, key in ((clock, "ratio"), (1 - clock, "ratio_of_other_clock")):
        ratios = [
            2 * p[which] / (a[which] + b[which]) for p, a, b in zip(prunings, passes[:-1], passes[1:], strict=True)
        ]
        found[key] = spread(ratios)
    return found


def tracked(model: nn.Module, tracker: PeakBytes) -> Callable[..., object]:
    """Return the model's forward so that operations on other threads are counted too."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: object, **kwargs: object) -> object:
        if threading.current_thread() is threading.main_thread():
            return original(*args, **kwargs)
        with tracker:
            return original(*args, **kwargs)

    return forward


def peak_of(work: Callable[[nn.Module, Batches], None], model: nn.Module, batches: Batches) -> int:
    """Return the bytes that were live at most, beyond the model and the batches."""
    tracker = PeakBytes()
    model.forward = tracked(model, tracker)
    try:
        with tracker:
            work(model, batches)
    finally:
        del model.forward
    return tracker.peak


def memory(make: Callable[[int], nn.Module], batches: Batches, depths: Sequence[int]) -> list[dict[str, object]]:
    """Return peaks by number of blocks, beside what one block and all blocks would hold."""
    rows = []
    for depth in depths:
        model = make(depth).eval()
        width, ffn = model.config.hidden_size, model.config.intermediate_size
        num_tokens = sum(batch["input_ids"].numel() for batch in batches)
        hidden = 4 * width * num_tokens
        masks = sum(module.weight.numel() for module in block_weights(model).values())
        removed = 4 * masks // 2  # kept in main memory until the end, so that an error changes no weight
        row = {
            "num_blocks": depth,
            "peak_mb": round((peak_of(prune, model, batches) - masks - removed) / 1e6, 2),
            "masks_mb": round(masks / 1e6, 2),
            "removed_values_mb": round(removed / 1e6, 2),
            "plain_pass_mb": round(peak_of(plain, make(depth).eval(), batches) / 1e6, 2),
            "one_block_mb": round(4 * num_tokens * (6 * width + 3 * ffn) / 1e6, 2),
            "input_of_one_block_mb": round(hidden / 1e6, 2),
            "inputs_of_all_blocks_mb": round(depth * hidden / 1e6, 2),
        }
        rows.append(row)
    return rows


def story_batches() -> list[dict[str, Tensor]]:
    """Return 32 sequences of TinyStories text."""
    _, encode = load_story_model("stories3M")
    text = (data_folder() / "text" / "tinystories_v1_train.txt").read_text(encoding="utf-8")
    ids = torch.tensor(encode(text[:100_000])[: NUM_SEQUENCES * LENGTH]).view(-1, BATCH, LENGTH)
    return [{"input_ids": rows} for rows in ids]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="for the small model; the large one takes a third")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = 1 if args.threads == 1 else 0
    large = functools.partial(random_llama, width=768, ffn=2048, num_heads=12, vocab=8192, seed=args.seed)
    tokens = random_batches(num=NUM_SEQUENCES // BATCH, size=BATCH, length=LENGTH, vocab=8192, seed=args.seed)
    tokens = [{"input_ids": batch["input_ids"]} for batch in tokens]
    rows = []
    for name, model, batches, rounds in (
        ("stories3M", load_story_model("stories3M")[0], story_batches(), args.rounds),
        ("random Llama, 100 M", large(num_layers=13), tokens, max(2, args.rounds // 3)),
    ):
        row = {"model": name, "num_parameters": sum(p.numel() for p in model.parameters())}
        rows.append(row | take_turns(model.eval(), batches, rounds, clock))
        del model
    print_table(
        ("model", "parameters", "plain s", "prune s", "ratio"),
        [
            [
                row["model"],
                f"{row['num_parameters']:,}",
                f"{row['plain_seconds']['median']:.2f}",
                f"{row['prune_seconds']['median']:.2f}",
                f"{row['ratio']['median']:.3f}",
            ]
            for row in rows
        ],
    )
    small = functools.partial(random_llama, width=256, ffn=704, num_heads=4, vocab=512, seed=args.seed)
    short = [{"input_ids": batch["input_ids"] % 512} for batch in tokens]
    peaks = memory(lambda depth: small(num_layers=depth), short, (2, 8, 16))
    print_table(list(peaks[0]), [list(row.values()) for row in peaks])
    growth = (peaks[-1]["peak_mb"] - peaks[0]["peak_mb"]) / peaks[0]["peak_mb"]
    limits = [limit(f"{row['model']}: Wanda / plain pass", row["ratio"]["median"], 2.5) for row in rows]
    limits.append(
        limit(
            "peak beyond model and masks / one block, all sequences",
            peaks[-1]["peak_mb"] / peaks[-1]["one_block_mb"],
            1.0,
        )
    )
    limits.append(limit("growth of the peak from 2 to 16 blocks", growth, 0.05))
    write_result(
        "oneshot_time",
        seed=args.seed,
        settings={
            "sequences": NUM_SEQUENCES,
            "length": LENGTH,
            "sequences_in_a_batch": BATCH,
            "sparsity": 0.5,
            "dtype": "float32",
            "ratio": "of processor time" if clock else "of wall time",
        },
        rows=[*rows, *peaks],
        limits=limits,
        notes=[
            "one_block: what a block takes and makes for all sequences at once: six tensors of the model's width and "
            "three of the MLP's, float32.",
        ],
    )


if __name__ == "__main__":
    main()
