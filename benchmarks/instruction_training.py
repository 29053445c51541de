"""What instruction-following pruning costs in training: the choice of k among n, and a masked step.

    OMP_NUM_THREADS=1 python benchmarks/instruction_training.py [--rounds 15]

choice   SoftTopK, exact, 24,576 scores in 32 rows, forward and backward, against `torch.topk` and a sort of the same
step     one training step (forward, backward, AdamW) of a random Llama of 25 million parameters under masks that are
         given, against the plain step: the predictor's own cost stands apart, as the third row

Processor time of one thread, side by side in each round; medians of the ratios.
"""

import argparse
from collections.abc import Callable

import torch
from measure import limit, print_table, processor_seconds, random_batches, random_llama, spread, write_result

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.prompt import Reads
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.structured.structure import Stack

NUM_SCORES, ROWS, CHOSEN = 24_576, 32, 6_656
SHAPE = {"width": 512, "ffn": 1408, "num_layers": 6, "num_heads": 8, "vocab": 4096}
SIZE, LENGTH = 4, 128


def choice_cost(rounds: int) -> dict[str, object]:
    """Return the time of the exact choice over that of a top-k and a sort."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(ROWS, NUM_SCORES, generator=generator, requires_grad=True)
    grad = torch.randn(ROWS, NUM_SCORES, generator=generator)
    plain = scores.detach()

    def peer() -> None:
        plain.topk(CHOSEN)
        plain.sort(dim=-1, descending=True)

    def ours() -> None:
        torch.autograd.grad(SoftTopK()(scores, CHOSEN), scores, grad)

    return ratio("choice", rounds, ours, peer)


def step_cost(rounds: int) -> list[dict[str, object]]:
    """Return the time of a masked step, and of one with its predictor, over that of a plain step."""
    batches = random_batches(num=1, size=SIZE, length=LENGTH, vocab=SHAPE["vocab"], seed=0)
    batch = {**batches[0], "labels": batches[0]["input_ids"].clone()}
    batch["labels"][:, : LENGTH // 4] = -100
    model = random_llama(**SHAPE, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    condition = Instruction(budget=Budget(keep=0.33), reads=Reads(dropout=0.0)).insert(model, Stack((), "", (), 6))
    condition.begin(total_steps=1)
    with torch.no_grad():
        masks = condition.masks_of(condition.prompt(batch))

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> None:
        with condition.whole():
            step()

    def masked() -> None:
        with condition.fixed(masks):
            step()

    return [ratio("masked step", rounds, masked, plain), ratio("masked step with predictor", rounds, step, plain)]


def ratio(name: str, rounds: int, ours: Callable[[], None], peer: Callable[[], None]) -> dict[str, object]:
    """Return the spread of the ratios of the two, measured in turn."""
    for work in (ours, peer):
        work()
    found = []
    for _ in range(rounds):
        _, first = processor_seconds(peer)
        _, second = processor_seconds(ours)
        found.append(second / first)
    return {"name": name, "ratio": spread(found)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [choice_cost(rounds), *step_cost(rounds)]
    print_table(("what", "ratio"), [(row["name"], row["ratio"]) for row in rows])
    medians = {str(row["name"]): float(row["ratio"]["median"]) for row in rows}  # type: ignore[index]
    limits = [
        limit("choice / top-k and sort", medians["choice"], 4.0),
        limit("masked step / plain step", medians["masked step"], 1.10),
    ]
    settings = {"shape": SHAPE, "batch": [SIZE, LENGTH], "choice": [ROWS, NUM_SCORES, CHOSEN], "rounds": rounds}
    write_result("instruction_training", seed=0, settings=settings, rows=rows, limits=limits)


if __name__ == "__main__":
    main()
