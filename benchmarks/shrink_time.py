"""From the call to the saved folder: this library beside Torch-Pruning, and smaller models beside ones built small.

    OMP_NUM_THREADS=1 python benchmarks/shrink_time.py

Shrink time: find what can be cut, rate feed-forward units by magnitude, cut half of them, save. Both sides start from
the same model, in turn; the figure is the processor time of one thread, which other work on the machine does not
inflate. This library proves on a few tokens that the smaller model computes what the masked one does; Torch-Pruning
checks nothing and leaves the configuration as it was. It is left out where it is not installed.

Built small: forward passes and greedy decoding of the smaller model and of one that its class built at that shape.
"""

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from measure import limit, print_table, processor_seconds, random_llama, spread, write_result
from torch import Tensor
from torch_pruning_peer import cut_ffn_with_peer, peer_missing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.width.method import Width

NAME = "shrink_time"
SHARE = 0.5
TINY = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
TEXT = {"input_ids": torch.arange(2, 18)[None]}
SLOWER = 1.02
WAYS = ("forward", "decode")


def _text(make: Any, config: Any, **values: Any) -> Any:
    return make(config(vocab_size=4096, pad_token_id=0, **TINY, **values))


MODELS: dict[str, Callable[[], Any]] = {
    "Llama 3M": lambda: _text(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2 3M": lambda: _text(Qwen2ForCausalLM, Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True),
    "Phi 3M": lambda: _text(PhiForCausalLM, PhiConfig),
    "BERT 3M": lambda: _text(BertForMaskedLM, BertConfig),
    "ViT 3M": lambda: ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **TINY)),
    "Llama 98M": lambda: random_llama(width=768, ffn=2048, num_layers=12, num_heads=12, vocab=16384, seed=0),
}
LARGE = ("Llama 98M",)


def inputs_of(name: str) -> Mapping[str, Tensor]:
    """Return a small batch."""
    return {"pixel_values": torch.zeros(1, 3, 32, 32)} if name.startswith("ViT") else TEXT


def ours(model: Any, folder: str, inputs: Mapping[str, Tensor]) -> tuple[Any, dict[str, float]]:
    """Discover, rate, cut, check, save; return the smaller model and the processor seconds of each."""
    made: dict[str, Any] = {}

    def rate() -> Any:
        method = Width(sparsity={"ffn": SHARE}, scorer=Magnitude(), compensate="none")
        return method.plan(model, made["discover"], ())

    steps: dict[str, Callable[[], Any]] = {
        "discover": lambda: discover(model, inputs, kinds=("ffn",)),
        "plan": rate,
        "shrink": lambda: shrink(model, made["plan"], structure=made["discover"], inputs=inputs),
        "save": lambda: made["shrink"].save_pretrained(folder),
    }
    seconds = {}
    for name, step in steps.items():
        start = time.process_time()
        made[name] = step()
        seconds[name] = time.process_time() - start
    return made["shrink"], seconds


def peers(model: Any, names: list[str], folder: str, inputs: Mapping[str, Tensor]) -> Any:
    """Trace, rate, cut, save."""
    cut_ffn_with_peer(model, names, SHARE, inputs=inputs)
    model.save_pretrained(folder)
    return model


def units_made_by(model: Any, inputs: Mapping[str, Tensor]) -> list[str]:
    """Return the layers whose outputs are feed-forward units."""
    groups = discover(model, inputs).of_kind("ffn")
    return sorted({m.name.rpartition(".")[0] for group in groups for m in group.members if m.role == "out"})


def shrink_row(name: str, repeats: int) -> tuple[dict[str, Any], Any]:
    """Time both sides in turn, after one round that is not counted; return the row and the smaller model."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]().eval(), inputs_of(name)
    names = units_made_by(model, inputs)
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            small, seconds = ours(copy.deepcopy(model), folder, inputs)
        seconds["ours"] = sum(seconds.values())
        if not peer_missing():
            copied = copy.deepcopy(model)
            with tempfile.TemporaryDirectory() as folder:
                seconds["peer"] = processor_seconds(functools.partial(peers, copied, names, folder, inputs))[1]
            assert sum(p.numel() for p in copied.parameters()) == sum(p.numel() for p in small.parameters())
        rounds.append(seconds)
    times = {key: [each[key] for each in rounds[1:]] for key in rounds[0]}
    row: dict[str, Any] = {"measure": "shrink", "model": name, "parameters": sum(p.numel() for p in model.parameters())}
    row |= {f"{key}_s": spread(values) for key, values in times.items()}
    if "peer" in times:
        known = [whole - found for whole, found in zip(times["ours"], times["discover"], strict=True)]
        row |= {"ratio": _ratio(times["ours"], times["peer"]), "ratio_known": _ratio(known, times["peer"])}
    return row, small


def _ratio(ours_s: list[float], others_s: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours_s, others_s, strict=True)), 3)


@torch.no_grad()
def _forward(model: Any, length: int) -> None:
    model(input_ids=torch.full((2, length), 5))


@torch.no_grad()
def _decode(model: Any, length: int) -> None:
    start = torch.full((1, 8), 5)
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "use_cache": True}
    model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **options)


def native_row(name: str, small: Any, repeats: int) -> dict[str, Any]:
    """Time the smaller model and one built at its shape, in turn."""
    native = type(small)(copy.deepcopy(small.config)).eval()
    assert [p.shape for p in native.parameters()] == [p.shape for p in small.parameters()]
    length = 32 if name in LARGE else 128
    row: dict[str, Any] = {"measure": "built small", "model": name}
    for work, label in zip((_forward, _decode), WAYS, strict=True):
        size = length if label == "forward" else length // 4
        times: list[list[float]] = [[], []]
        for turn in range(repeats + 1):
            for side, model in zip(times, (small.eval(), native), strict=True):
                value = processor_seconds(lambda: work(model, size))[1]  # noqa: B023
                side += [value] if turn else []
        row[label] = {"ours_s": spread(times[0]), "native_s": spread(times[1]), "ratio": _ratio(*times)}
    return row


def show(shrunk: Sequence[Mapping[str, Any]], built: Sequence[Mapping[str, Any]]) -> None:
    """Print two tables."""
    stages = ("discover", "plan", "shrink", "save", "ours", "peer")
    print_table(
        ("processor seconds", *stages, "ours / peer", "without discover"),
        [
            [
                row["model"],
                *(f"{row[f'{stage}_s']['median']:.3f}" if f"{stage}_s" in row else "-" for stage in stages),
                row.get("ratio", "-"),
                row.get("ratio_known", "-"),
            ]
            for row in shrunk
        ],
    )
    print_table(
        ("smaller / built small", *WAYS), [[row["model"], *(row[way]["ratio"] for way in WAYS)] for row in built]
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    shrunk, built = [], []
    for name in args.models:
        row, small = shrink_row(name, args.repeats)
        shrunk.append(row)
        print(
            f"{name}: {row['ours_s']['median']:.3f} s, Torch-Pruning {row.get('peer_s', {}).get('median')}", flush=True
        )
        if name.startswith("Llama"):
            built.append(native_row(name, small, args.repeats))
    show(shrunk, built)
    limits = [limit(f"shrink / Torch-Pruning, {row['model']}", row["ratio"], 1.0) for row in shrunk if "ratio" in row]
    limits += [
        limit(f"smaller / built small, {way}, {row['model']}", row[way]["ratio"], SLOWER)
        for row in built
        for way in WAYS
    ]
    missing = peer_missing()
    write_result(
        NAME,
        seed=0,
        settings={
            "command": "OMP_NUM_THREADS=1 python benchmarks/shrink_time.py",
            "share": f"{SHARE} of the feed-forward units, by magnitude",
            "repeats": args.repeats,
            "clock": "processor time of the process, medians; ratios are medians of the rounds' ratios",
            "ours": "discover (feed-forward units), plan, shrink with its check, save_pretrained",
            "peer": "Torch-Pruning: trace, magnitude, prune, save_pretrained",
            "ratio_known": "ours without discover, for a structure that is known",
            "built small": "forward of 2 x 128 tokens (98M: 32), greedy decoding of 32 tokens with cache (98M: 8)",
        },
        rows=[*shrunk, *built],
        limits=limits,
        notes=[f"Torch-Pruning left out: {missing}"] if missing else [],
    )


if __name__ == "__main__":
    main()
