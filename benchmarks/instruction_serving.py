"""Serving sub-models of one instruction each: decoding, gathering, memory, time to first token.

    OMP_NUM_THREADS=1 python benchmarks/instruction_serving.py

A random Llama of about 120 M parameters keeps a third of its FFN units for each instruction. Everything is measured in
one process, what is compared takes turns, and ratios are medians over rounds of processor time, which other work on the
machine does not inflate. One pass is a plain copy of the kept bytes into memory that is there.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import limit, live_bytes, print_table, processor_seconds, random_llama, spread, write_result
from torch import Tensor, nn

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.sub_model import Selection
from lightning_prune.structured.structure import Stack

WIDTH, FFN, KEPT, LAYERS, HEADS, VOCAB = 768, 3072, 1024, 12, 12, 8192
DECODING, PASSES = 1.03, 1.0


def llama(ffn: int, seed: int) -> Any:
    """Return a model that keeps its cache."""
    model = random_llama(width=WIDTH, ffn=ffn, num_layers=LAYERS, num_heads=HEADS, vocab=VOCAB, seed=seed).eval()
    model.config.use_cache = True
    return model.requires_grad_(False)


def served_model(seed: int) -> InstructionModel:
    """Return a model with a predictor whose scores differ between units and between instructions."""
    model = llama(FFN, seed)
    condition = Instruction(budget=Budget(num_units=KEPT)).insert(model, Stack((), "", (), LAYERS))
    nn.init.normal_(condition.predictor.head.outer.bias)
    condition.predictor.num_steps.fill_(1)
    return InstructionModel(condition, cache_bytes=1 << 30)


@torch.no_grad()
def decoding(model: Any, prompt: Tensor, num_tokens: int) -> Callable[[], object]:
    """Return work that reads a prompt, and then decodes token by token; only the latter is timed."""
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    token = prompt[:, -1:]

    def work() -> None:
        with torch.no_grad():
            for _ in range(num_tokens):
                model(token, past_key_values=cache, use_cache=True)
        cache.crop(-num_tokens)

    return work


@torch.no_grad()
def in_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return processor seconds of each job, round by round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        names = list(jobs) if number % 2 else list(jobs)[::-1]
        for name in names:
            taken = processor_seconds(jobs[name])[1]
            if number:
                times[name].append(taken)
    return times


def ratios(times: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Return the spread over rounds of one job's time over another's."""
    return spread([one / other for one, other in zip(times[name], times[to], strict=True)])


def gathering(served: InstructionModel, prompts: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """Return the gathering of a sub-model, and two copies of its bytes: all in a row, and from where they lie."""
    selections = [served.selection(prompt) for prompt in prompts]
    small = served.sub_models.gather(selections[0])
    row = [parameter.data.clone() for name, parameter in small.named_parameters() if ".mlp." in name]
    lying = [unit_rows(parameter.data) for name, parameter in served.model.named_parameters() if ".mlp." in name]
    turn = iter(range(1 << 30))

    def one_more() -> Selection:
        return selections[next(turn) % len(selections)]

    def pick() -> list[Tensor]:
        units = one_more().units
        return [matrix.index_select(0, units[number * len(units) // len(lying)]) for number, matrix in enumerate(lying)]

    return {
        "gather": lambda: served.sub_models.gather(one_more()),
        "copy, all in a row": lambda: [part.clone() for part in row],
        "copy from where they lie": pick,
    }


def unit_rows(matrix: Tensor) -> Tensor:
    """Return an FFN matrix with its units as rows."""
    return matrix if len(matrix) == FFN else matrix.t()


def first_token(served: InstructionModel, whole: Any, prompt: Tensor) -> dict[str, Callable[[], object]]:
    """Return the parts of the time to the first token, and the prefill of the whole model."""
    selection = served.selection(prompt)
    small = served.sub_models.gather(selection)
    return {
        "predicting": lambda: served.selection(prompt),
        "gathering": lambda: served.sub_models.gather(selection),
        "prefill": lambda: small(prompt, use_cache=True, logits_to_keep=1),
        "prefill, whole model": lambda: whole(prompt, use_cache=True, logits_to_keep=1),
    }


def memory(served: InstructionModel, prompts: Sequence[Tensor]) -> dict[str, float]:
    """Return the bytes that a sub-model adds beyond the gathered ones, as a share of these."""
    served.cache.clear()
    before = live_bytes()
    held = [served.select(prompt) for prompt in prompts]
    added = live_bytes() - before
    return {"models": len(held), "added_bytes": added, "gathered_bytes": served.cache.num_bytes}


def main() -> None:
    """Measure all of it, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    served, native, whole = served_model(args.seed), llama(KEPT, args.seed + 1), llama(FFN, args.seed + 2)
    generator = torch.Generator().manual_seed(args.seed)
    prompts = [torch.randint(VOCAB, (1, args.length), generator=generator) for _ in range(4)]
    selected = served.select(prompts[0])
    start = prompts[0][:, :32]
    decode = in_turns(
        {
            "selected": decoding(selected, start, args.tokens),
            "native": decoding(native, start, args.tokens),
            "whole": decoding(whole, start, args.tokens),
        },
        args.rounds,
    )
    gather = in_turns(gathering(served, prompts), args.rounds)
    first = in_turns(first_token(served, whole, prompts[0]), max(3, args.rounds // 3))
    held = memory(served, prompts)
    rows: list[dict[str, object]] = [
        {"what": f"decode, {name} model", "ms": spread([1e3 * t / args.tokens for t in times])}
        for name, times in decode.items()
    ]
    rows += [{"what": name, "ms": spread([1e3 * t for t in times])} for name, times in (gather | first).items()]
    rows += [{"what": "memory", **held}]
    print_table(
        ("what", "median ms", "low", "high"), [(r["what"], *list(r["ms"].values())[:3]) for r in rows if "ms" in r]
    )  # type: ignore[attr-defined]
    decode_ratio = ratios(decode, "selected", "native")
    passes = ratios(gather, "gather", "copy, all in a row")
    picked = ratios(gather, "gather", "copy from where they lie")
    rows += [{"what": "selected over native", "ratio": decode_ratio}, {"what": "gather over copy", "ratio": passes}]
    rows += [{"what": "gather over copy from where they lie", "ratio": picked}]
    write_result(
        "instruction_serving",
        seed=args.seed,
        settings={
            **vars(args),
            **{"width": WIDTH, "ffn": FFN, "kept": KEPT, "layers": LAYERS, "heads": HEADS, "vocab": VOCAB},
            "load_average_at_start": round(load, 2),
        },
        rows=rows,
        limits=[
            limit("decoding per token, selected over native", decode_ratio["median"], DECODING),
            limit("gathering, passes over the kept bytes", picked["median"], PASSES),
            limit("memory of sub-models over their gathered bytes", held["added_bytes"] / held["gathered_bytes"], 1.01),
        ],
    )


if __name__ == "__main__":
    main()
