"""Time to first token and decoding of a 9 B model that serves each instruction with 3 B of itself, in bfloat16.

    python benchmarks/gpu_instruction.py

The shapes are those of arXiv 2501.02086: width 2048, 56 blocks, FFN 24576 of which 6656 units stay. Needs about 40 GiB
of GPU memory; --layers makes it smaller. Exits with code 2 where there is no GPU. Weights are random, so that only
times mean something; they are wall times with the GPU synchronized at both ends, and what is compared takes turns.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from instruction_serving import decoding
from measure import limit, print_table, seconds, spread, write_result
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.predictors.budget import Budget
from lightning_prune.structured.structure import Stack

WIDTH, FFN, KEPT, HEADS, KV_HEADS, VOCAB = 2048, 24576, 6656, 16, 2, 32000
DECODING, PASSES = 1.03, 1.0


def llama(ffn: int, num_layers: int, device: torch.device, seed: int) -> Any:
    """Return a random Llama in bfloat16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with device:
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


@torch.no_grad()
def take_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time all jobs round by round; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, run in jobs.items():
            taken = seconds(run)
            if number:
                times[name].append(taken)
    return times


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here; nothing was measured", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda")
    parent = llama(FFN, args.layers, device, args.seed)
    condition = Instruction(budget=Budget(num_units=KEPT)).insert(parent, Stack((), "", (), args.layers))
    nn.init.normal_(condition.predictor.head.outer.bias)
    condition.predictor.num_steps.fill_(1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    served = InstructionModel(condition, cache_bytes=8 << 30)
    native = llama(KEPT, args.layers, device, args.seed + 1)
    held_native = torch.cuda.memory_allocated() - before
    prompt = torch.randint(0, VOCAB, (args.size, args.length), device=device)
    selection = served.selection(prompt[0])
    small = served.sub_models.gather(selection)
    parts = [parameter.data for name, parameter in small.named_parameters() if ".mlp." in name]
    with condition.whole():
        times = take_turns(
            {
                "predicting": lambda: served.selection(prompt[0]),
                "gathering": lambda: served.sub_models.gather(selection),
                "copying the gathered bytes": lambda: [part.clone() for part in parts],
                "prefill, selected": lambda: small(prompt, use_cache=True, logits_to_keep=1),
                "prefill, native": lambda: native(prompt, use_cache=True, logits_to_keep=1),
                "prefill, whole": lambda: parent(prompt, use_cache=True, logits_to_keep=1),
                "decode, selected": decoding(small, prompt, args.tokens),
                "decode, native": decoding(native, prompt, args.tokens),
                "decode, whole": decoding(parent, prompt, args.tokens),
            },
            args.rounds,
        )
    rows: list[dict[str, object]] = [
        {"what": name, "ms": spread([1e3 * t / (args.tokens if name.startswith("decode") else 1) for t in taken])}
        for name, taken in times.items()
    ]
    median = {str(row["what"]): float(row["ms"]["median"]) for row in rows}  # type: ignore[index]
    print_table(("what", "median ms"), list(median.items()))
    first = median["predicting"] + median["gathering"] + median["prefill, selected"]
    write_result(
        "gpu_instruction",
        seed=args.seed,
        settings={**vars(args), "width": WIDTH, "ffn": FFN, "kept": KEPT, "native_model_bytes": held_native},
        rows=[*rows, {"what": "time to first token", "selected": first, "whole": median["prefill, whole"]}],
        limits=[
            limit("decoding, selected over native", median["decode, selected"] / median["decode, native"], DECODING),
            limit(
                "gathering, passes over the kept bytes",
                median["gathering"] / median["copying the gathered bytes"],
                PASSES,
            ),
        ],
    )


if __name__ == "__main__":
    main()
