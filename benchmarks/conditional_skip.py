"""What leaving tokens out of blocks saves: a 21 M-parameter random Llama, dense against skipped, prompts and decoding.

    python benchmarks/conditional_skip.py

The routers are random and shifted so that each runs half of the tokens; early exits let every token leave halfway.
Variants take turns, each on its own copy of the weights; a ratio compares the processor time of calls of the same turn,
which other programs on the machine do not inflate as they do wall time. "computed" is the share of the multiplications
in the blocks' matrices that is left: keys and values are computed for all tokens. "mixed" computes every token and
mixes, which is what training does.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measure import print_table, processor_seconds, random_llama, spread, write_result
from torch import Tensor

from lightning_prune.conditional.early_exit import EarlyExit
from lightning_prune.conditional.skip_layer import SkipLayer, SkipLayerCondition
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.stack import candidate_stacks

WIDTH, FFN, NUM_LAYERS, VOCAB = 512, 1408, 6, 4096
NUM_DECODED = 16
CASES = {"prompt of 256": (1, 256), "4 prompts of 128": (4, 128), "decoding 1": (1, 0), "decoding 4": (4, 0)}


def llama(seed: int) -> Any:
    """Return the model in evaluation mode."""
    model = random_llama(width=WIDTH, ffn=FFN, num_layers=NUM_LAYERS, num_heads=8, vocab=VOCAB, seed=seed).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)  # a stream of the size that trained models have
    return model


def tokens(size: int, length: int, seed: int) -> Tensor:
    """Return random ids."""
    return torch.randint(VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def halved(model: Any, seed: int) -> SkipLayerCondition:
    """Insert random routers that each run half of the tokens."""
    condition = SkipLayer(offset=0.0).insert(model, next(candidate_stacks(model, Blueprint(model))))
    generator, ids = torch.Generator().manual_seed(seed), tokens(8, 64, seed + 1)
    for layer, router in enumerate(condition.routers):
        seen: list[Tensor] = []
        handle = model.model.layers[layer].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(input_ids=ids)
        handle.remove()
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        logits = router.logits(seen[0])
        middle = float((logits[..., 1] - logits[..., 0]).median())
        if middle > 0:
            router.weight.neg_()
        router.options = replace(router.options, offset=abs(middle))
    return condition


def variants(seed: int) -> tuple[dict[str, Any], SkipLayerCondition]:
    """Return the models, and the condition of the one that skips half."""
    found = {name: llama(seed) for name in ("dense", "dense again", "routers, all run", "half skipped", "half mixed")}
    found["left halfway"] = llama(seed)
    stack = next(candidate_stacks(found["dense"], Blueprint(found["dense"])))
    SkipLayer().insert(found["routers, all run"], stack)
    condition = halved(found["half skipped"], seed)
    for router in halved(found["half mixed"], seed).routers:
        router.sparse.is_sparse = False
    exits = EarlyExit(exits=(NUM_LAYERS // 2 - 1,), positions="all").insert(found["left halfway"], stack)
    exits.exits[0].threshold.fill_(0.0)
    return found, condition


@torch.no_grad()
def call(model: Any, size: int, length: int, seed: int) -> Callable[[], object]:
    """Return a prompt to compute, or a number of tokens to decode one by one behind a short one."""
    if length:
        ids = tokens(size, length, seed)
        return lambda: model(input_ids=ids, use_cache=True)
    ids, prompt = tokens(size, NUM_DECODED, seed), tokens(size, 32, seed + 1)
    cache = model(input_ids=prompt, use_cache=True).past_key_values

    def decode() -> None:
        for place in range(NUM_DECODED):
            model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache.crop(-NUM_DECODED)

    return decode


@torch.no_grad()
def share_run(model: Any, condition: SkipLayerCondition, seed: int) -> float:
    """Return the share of tokens and blocks that run."""
    shares: list[float] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, router=router: shares.append(router.logits(args[0]).argmax(-1).float().mean().item())
        )
        for block, router in zip(model.model.layers, condition.routers, strict=True)
    ]
    model(input_ids=tokens(1, 512, seed))
    for handle in handles:
        handle.remove()
    return statistics.mean(shares)


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load = os.getloadavg()
    models, condition = variants(options.seed)
    share = share_run(models["half skipped"], condition, options.seed + 7)
    of_keys = 2 * WIDTH**2 / (4 * WIDTH**2 + 3 * WIDTH * FFN)
    computed = {"half skipped": share + (1 - share) * of_keys, "left halfway": 0.5 + 0.5 * of_keys}
    rows: list[dict[str, object]] = []
    for case, (size, length) in CASES.items():
        calls = {name: call(model, size, length, options.seed) for name, model in models.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        names = list(calls)
        for turn in range(options.rounds + 2):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                measured = processor_seconds(calls[name])
                if turn > 1:
                    times[name].append(measured)
        for name, values in times.items():
            ratios = [value[1] / plain[1] for value, plain in zip(values, times["dense"], strict=True)]
            seconds = spread([value[1] for value in values])
            wall = statistics.median(value[0] for value in values)
            row = {"case": case, "variant": name, "processor_seconds": seconds, "wall_seconds": round(wall, 5)}
            print(case, name, spread(ratios), flush=True)
            rows.append({**row, "ratio": spread(ratios), "computed": round(computed.get(name, 1.0), 3)})
    head = ("case", "variant", "ms", "ratio", "low", "high", "computed")
    print_table(head, [_cells(row) for row in rows])
    write_result(
        "conditional_skip",
        seed=options.seed,
        settings={"shape": [WIDTH, FFN, NUM_LAYERS, VOCAB], "rounds": options.rounds, "decoded": NUM_DECODED}
        | {"share_run": round(share, 3), "load_at_start": [round(value, 2) for value in load]},
        rows=rows,
    )


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    ratio, seconds = row["ratio"], row["processor_seconds"]
    milliseconds = round(1000 * seconds["median"], 1)
    return row["case"], row["variant"], milliseconds, ratio["median"], ratio["low"], ratio["high"], row["computed"]


if __name__ == "__main__":
    main()
