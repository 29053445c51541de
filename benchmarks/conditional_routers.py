"""What routers over tokens save at inference: the heavy branch on a quarter of the tokens against all of them.

    python benchmarks/conditional_routers.py

A random Llama of 20 M parameters and a random BERT of its size read 4 sequences of 256 tokens. Every method stands in
the model twice: with all tokens chosen, and narrowed to a quarter of them; the plain model runs beside. They take turns
in one process on one thread, and ratios compare processor time of the same turn, so that other programs matter little.
Routers are untrained: the estimates of the causal one are taken from one batch of the same text.
"""

import argparse
import copy
import statistics

import torch
from measure import limit, print_table, processor_seconds, random_batches, random_llama, spread, write_result
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from lightning_prune.conditional.conditional_adapter import ConditionalAdapter
from lightning_prune.conditional.expert_choice import ExpertChoice
from lightning_prune.conditional.heavy_light import HeavyLight
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.stack import candidate_stacks

WIDTH, FFN, LAYERS, HEADS, VOCAB = 512, 1376, 6, 8, 2048
LENGTH, SIZE = 256, 4
METHODS: dict[str, ConditionMethod] = {
    "conditional adapters": ConditionalAdapter(reduction=4, ramp=0),
    "heavy and light": HeavyLight(share=0.25, ramp=0),
    "expert choice, 4 experts": ExpertChoice(num_experts=4, capacity=1, ramp=0),
}
# What a quarter of the tokens may cost beside all of them; the light branch is half of the heavy one, and attention is
# left to all tokens by the two methods of the feed-forward part.
AT_MOST = {"conditional adapters": 0.6, "heavy and light": 0.8, "expert choice, 4 experts": 0.5}


def random_bert(seed: int) -> nn.Module:
    """Return a BERT of the same shape with random weights."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    return BertForMaskedLM(config)


def models(family: str, seed: int) -> dict[str, nn.Module]:
    """Return the plain model, and per method the model with all tokens chosen and with a quarter of them."""
    if family == "llama":
        plain = random_llama(width=WIDTH, ffn=FFN, num_layers=LAYERS, num_heads=HEADS, vocab=VOCAB, seed=seed)
    else:
        plain = random_bert(seed)
    found = {"plain": plain.eval(), "plain again": plain}
    batch = random_batches(num=1, size=SIZE, length=LENGTH, vocab=VOCAB, seed=seed)[0]
    for name, method in METHODS.items():
        model = copy.deepcopy(plain)
        condition = method.insert(model, next(candidate_stacks(model, Blueprint(model))))
        found[f"{name}, all"] = copy.deepcopy(model)
        condition.begin(total_steps=1)
        for _ in range(2):  # the share falls, and is then measured
            condition.after_step()
            model(input_ids=batch["input_ids"])
        condition.after_step()
        found[f"{name}, a quarter"] = model
    return found


def measured(family: str, num_rounds: int, seed: int) -> list[dict[str, object]]:
    """Return a row per model: milliseconds, and ratios to the plain model and to all tokens."""
    variants = models(family, seed)
    ids = random_batches(num=1, size=SIZE, length=LENGTH, vocab=VOCAB, seed=seed)[0]["input_ids"]
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    with torch.no_grad():
        for turn in range(num_rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(processor_seconds(lambda name=name: variants[name](input_ids=ids))[1])
    rows = []
    for name, values in times.items():
        values = values[1:]
        row: dict[str, object] = {"family": family, "variant": name, "seconds": spread(values)}
        for key, other in (("to_plain", "plain"), ("to_all", name.replace("a quarter", "all"))):
            row[key] = spread([a / b for a, b in zip(values, times[other][1:], strict=True)])
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for family in ("llama", "bert") for row in measured(family, options.rounds, options.seed)]
    cells, limits = [], []
    for row in rows:
        seconds, to_plain, to_all = (row[key]["median"] for key in ("seconds", "to_plain", "to_all"))  # type: ignore[index]
        cells.append(
            (f"{row['family']}: {row['variant']}", f"{1000 * seconds:.0f}", f"{to_plain:.3f}", f"{to_all:.3f}")
        )
        name = str(row["variant"]).removesuffix(", a quarter")
        if name in AT_MOST and name != row["variant"]:
            limits.append(limit(f"{row['family']}, {name}: a quarter of the tokens / all", to_all, AT_MOST[name]))
    print_table(("model", "ms", "/ plain", "/ all tokens"), cells)
    settings = {
        "width": WIDTH, "ffn": {"llama": FFN, "bert": 4 * WIDTH}, "layers": LAYERS, "heads": HEADS, "vocab": VOCAB,
        "length": LENGTH, "sequences": SIZE, "rounds": options.rounds,
        "methods": {n: repr(m) for n, m in METHODS.items()},
    }  # fmt: skip
    noise = statistics.median(
        row["to_plain"]["median"]
        for row in rows
        if row["variant"] == "plain again"  # type: ignore[index]
    )
    notes = [f"plain again / plain: {noise:.3f}, the noise of a ratio", "processor time of one thread"]
    write_result("conditional_routers", seed=options.seed, settings=settings, rows=rows, limits=limits, notes=notes)


if __name__ == "__main__":
    main()
