"""What each structured method keeps of a story model at 20, 33 and 50 % of its block parameters, and what it gains.

    LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/quality_structured.py

Perplexity: the first characters of tinystories_v1_valid.txt, in windows of 256 tokens, each read on its own after the
start token. BLiMP: the first pairs of each of 67 paradigms; a pair counts if the good sentence is likelier, not
normalised by length. Both are measured on the smaller model itself, right after the cut and after a short training
that gives every method, and the dense control, the same batches in the same order.

Tokens/s: the smaller model over the dense one, measured in turn; rows of the same shape share the figure. What no
stock class can hold (single sub-blocks, uneven widths) is held as a mask and has no speed.

Torch-Pruning is measured beside these where it is installed; it cuts feed-forward units alone on this model.

Finished rows are kept in the result file, and a second call goes on from there; --fresh starts again.
"""

import argparse
import copy
import functools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, data_folder, load_story_model, machine, print_table, processor_seconds, versions
from quality_unstructured import START, WINDOW, perplexity, windows
from structured_methods import HEAD_SHARE, METHODS, MULTIPLE, NUM_SEARCH, Pruned, Task, skipped
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base.whole_file import written_aside
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.structure import Structure

NAME = "quality_structured_stories3M"
MODEL = "stories3M"
SHARES = (0.20, 0.33, 0.50)
REFERENCE = 5.590  # dense, first 100,000 characters, measured apart from this code
REFERENCE_CHARACTERS = 100_000
NUM_CHARACTERS = 25_000
PAIRS_PER_PARADIGM = 5
NUM_CALIBRATION = 16
TRAIN_STEPS = 30
TRAIN_ROWS = 2
TRAIN_LENGTH = 128
LEARNING_RATE = 1e-4  # see SETTINGS
WARM_UP = 5
Batch = Mapping[str, Tensor]
Pair = tuple[list[int], list[int]]


def blimp_pairs(encode: Callable[[str], list[int]]) -> list[Pair]:
    """Return the tokens of the good and the bad sentence of the first pairs of every paradigm."""
    lines = (data_folder() / "bench/blimp_67x100.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Pair]] = {}
    for entry in map(json.loads, lines):
        pairs = found.setdefault(entry["UID"], [])
        if len(pairs) < PAIRS_PER_PARADIGM:
            pairs.append((encode(entry["sentence_good"]), encode(entry["sentence_bad"])))
    return [pair for pairs in found.values() for pair in pairs]


@torch.no_grad()
def blimp_accuracy(model: nn.Module, pairs: Sequence[Pair], size: int = 128) -> float:
    """Return the share of pairs whose good sentence has the higher log-likelihood."""
    model.eval()
    sentences = [ids for pair in pairs for ids in pair]
    order = sorted(range(len(sentences)), key=lambda idx: len(sentences[idx]))
    scores = [0.0] * len(sentences)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        length = max(len(sentences[idx]) for idx in chosen)
        rows_BT = torch.tensor([[START, *sentences[i]] + [-1] * (length - len(sentences[i])) for i in chosen])
        targets_BT = rows_BT[:, 1:]
        logits_BTV = model(input_ids=rows_BT.clamp(min=0)).logits[:, :-1]
        losses_BT = functional.cross_entropy(logits_BTV.mT, targets_BT, ignore_index=-1, reduction="none")
        for idx, value in zip(chosen, losses_BT.sum(1).tolist(), strict=True):
            scores[idx] = -value
    return sum(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)) / len(pairs)


@dataclass
class Bench:
    """The dense model with its texts, and the speeds of shapes measured so far."""

    dense: nn.Module
    structure: Structure
    valid: Sequence[Tensor]
    pairs: Sequence[Pair]
    rows_NT: Tensor
    scratch: Path
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)

    def batches(self, seed: int) -> tuple[list[Batch], list[Batch]]:
        """Return calibration and training batches of a seed, of different sequences."""
        order = list(range(len(self.rows_NT)))
        random.Random(seed).shuffle(order)
        calibration = self.rows_NT[order[:NUM_CALIBRATION]]
        training = self.rows_NT[order[NUM_CALIBRATION : NUM_CALIBRATION + TRAIN_STEPS * TRAIN_ROWS], : TRAIN_LENGTH + 1]
        assert len(training) == TRAIN_STEPS * TRAIN_ROWS, "the text is too short"
        return [{"input_ids": rows, "labels": rows} for rows in calibration.split(8)], [
            {"input_ids": rows, "labels": rows} for rows in training.split(TRAIN_ROWS)
        ]

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Return perplexity and BLiMP accuracy."""
        return {
            "perplexity": round(perplexity(model, self.valid), 4),
            "blimp": round(blimp_accuracy(model, self.pairs), 4),
        }

    def row(self, method: str, share: float, seed: int) -> dict[str, Any]:
        """Measure one method at one share with one seed."""
        calibration, training = self.batches(seed)
        scratch = self.scratch / str(seed)
        scratch.mkdir(exist_ok=True)
        start = time.perf_counter()
        task = Task(copy.deepcopy(self.dense), self.structure, calibration, share, seed, scratch)
        pruned = METHODS[method](task) if share else Pruned(task.model)
        row: dict[str, Any] = {"method": method, "share": share, "seed": seed}
        row["seconds_to_prune"] = round(time.perf_counter() - start, 2)
        blocks, everything = pruned.removed(self.dense)
        row |= {"removed_of_blocks": round(blocks, 4), "removed_of_all": round(everything, 4)}
        row["form"] = "mask" if pruned.is_mask else "smaller"
        with pruned.held():
            row["cut"] = self.quality(pruned.model)
            row["shape"] = None if pruned.is_mask else shape_of(pruned.model)
            row["speed"] = None if pruned.is_mask else self.speed(pruned.model)
            train(pruned.model, training)
            row["trained"] = self.quality(pruned.model)
        return row

    def speed(self, model: Any) -> dict[str, float]:
        """Return tokens/s over that of the dense model: of a forward pass, and of greedy decoding with the cache."""
        shape = str(shape_of(model))
        if shape not in self.speeds:
            self.speeds[shape] = {
                "forward": tokens_ratio(self.dense, model, _forward, 7),
                "decode": tokens_ratio(self.dense, model, _decode, 5),
            }
        return self.speeds[shape]


SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def shape_of(model: Any) -> dict[str, Any]:
    """Return the fields of the configuration that a method changes."""
    return {name: getattr(model.config, name) for name in (*SHAPE, "tie_word_embeddings")}


def train(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Train over the batches once: a short warm-up, then a cosine to a tenth."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / len(batches))) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for batch in batches:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def tokens_ratio(dense: nn.Module, small: nn.Module, work: Callable[[Any], object], repeats: int) -> float:
    """Return the median over rounds of dense time / small time, measured in turn on the processor's clock."""
    ratios = []
    for turn in range(repeats + 1):
        times = [processor_seconds(functools.partial(work, model.eval()))[1] for model in (dense, small)]
        ratios += [times[0] / times[1]] if turn else []
    return round(statistics.median(ratios), 3)


@torch.no_grad()
def _forward(model: Any) -> None:
    model(input_ids=torch.full((4, WINDOW), 5))


@torch.no_grad()
def _decode(model: Any) -> None:
    start = torch.full((1, 8), 5)
    model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


def prepare(scratch: Path) -> Bench:
    """Load the model and the texts; stop if the dense figure is not the reference's."""
    folder = data_folder()
    model, encode = load_story_model(MODEL)
    text = (folder / "text/tinystories_v1_valid.txt").read_text(encoding="utf-8")
    dense = perplexity(model, windows(encode, text[:REFERENCE_CHARACTERS]))
    if abs(dense - REFERENCE) > 0.01:
        raise SystemExit(f"dense perplexity is {dense:.4f}, the reference says {REFERENCE}")
    source = (folder / "text/tinystories_v1_train.txt").read_text(encoding="utf-8")
    rows = [window for window in windows(encode, source) if len(window) == WINDOW + 1]
    return Bench(
        dense=model,
        structure=discover(model),
        valid=windows(encode, text[:NUM_CHARACTERS]),
        pairs=blimp_pairs(encode),
        rows_NT=torch.stack(rows),
        scratch=scratch,
    )


SETTINGS = {
    "share": "of the parameters inside the blocks; removed_of_blocks and removed_of_all say what was reached",
    "width": f"{HEAD_SHARE:.3f} of the query heads of each key/value group, FFN units the rest, FFN in {MULTIPLE}s",
    "perplexity": f"first {NUM_CHARACTERS} characters of tinystories_v1_valid.txt, windows of {WINDOW} tokens",
    "blimp": f"first {PAIRS_PER_PARADIGM} pairs of each paradigm, log-likelihood, not normalised by length",
    "calibration": f"{NUM_CALIBRATION} sequences of {WINDOW} tokens of tinystories_v1_train.txt; greedy searches over "
    f"blocks and sub-blocks {NUM_SEARCH} of them",
    "training": f"{TRAIN_STEPS} AdamW steps of {TRAIN_ROWS} x {TRAIN_LENGTH} tokens, no weight decay, gradient norm "
    f"clipped at 1, learning rate {LEARNING_RATE}, {WARM_UP} steps of warm-up, cosine to a tenth",
    "speed": f"tokens/s over dense, in turn, one thread, processor time: forward 4 x {WINDOW} tokens (median of 7), "
    "greedy decoding of 32 tokens with cache (median of 5); rows of the same shape share one measurement",
    "learning_rate": "chosen among 3e-5, 1e-4, 2e-4 and 4e-4 by the perplexity of Wanda at 50 %, one seed, 60 steps, "
    "on the held-out text itself; the dense control was best at 3e-5 and ShortGPT at 50 % at 4e-4, so that training "
    "figures flatter width methods against depth methods",
    "noise": "the dense row gives the speed of the model over itself; BLiMP has a standard error of 0.027 per row",
    "seeds": "choose the calibration sequences, random scores, and the order of the training text",
}


def write(rows: Sequence[Mapping[str, Any]], path: Path, omitted: Mapping[str, str]) -> None:
    """Replace the result file in one step."""
    record = {
        "benchmark": NAME,
        "machine": machine(),
        "versions": versions(),
        "command": "LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/quality_structured.py",
        "seeds": sorted({row["seed"] for row in rows}),
        "settings": SETTINGS,
        "omitted": dict(omitted),
        "rows": list(rows),
    }
    path.parent.mkdir(exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print medians over seeds; the spread of the perplexities in brackets."""
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["share"], row["method"]), []).append(row)
    lines = []
    for (share, method), found in sorted(groups.items(), key=lambda item: item[0][0]):
        speed = next((row["speed"] for row in found if row["speed"]), None)
        lines.append(
            [
                method,
                f"{share:.0%}",
                f"{_median(found, 'removed_of_blocks'):.1%}",
                f"{_median(found, 'removed_of_all'):.1%}",
                *(_with_range(found, when) for when in ("cut", "trained")),
                *(f"{statistics.median(row[when]['blimp'] for row in found):.3f}" for when in ("cut", "trained")),
                *((f"{speed['forward']:.2f}", f"{speed['decode']:.2f}") if speed else ("mask", "mask")),
                len(found),
            ]
        )
    head = ("method", "share", "blocks", "all", "perplexity", "trained", "BLiMP", "trained", "forward", "decode", "n")
    print_table(head, lines)


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _with_range(rows: Sequence[Mapping[str, Any]], when: str) -> str:
    values = [row[when]["perplexity"] for row in rows]
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    """Measure what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what the result file holds")
    args = parser.parse_args()
    keep = args.output.exists() and not args.fresh
    rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if keep else []
    done = {(row["method"], row["share"], row["seed"]) for row in rows}
    omitted = skipped()
    wanted = [("dense", 0.0, seed) for seed in args.seeds]
    wanted += [
        (m, s, seed) for seed in args.seeds for m in args.methods if m not in omitted for s in sorted(args.shares)
    ]
    wanted = [key for key in dict.fromkeys(wanted) if key not in done]
    for name, reason in omitted.items():
        print(f"left out: {name}: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare(Path(scratch))
        bench.speeds |= {str(row["shape"]): row["speed"] for row in rows if row["shape"]}
        for number, (method, share, seed) in enumerate(wanted, 1):
            start = time.perf_counter()
            rows.append(bench.row(method, share, seed))
            write(rows, args.output, omitted)
            figures = [f"{rows[-1][when]['perplexity']:.2f}" for when in ("cut", "trained")]
            took = time.perf_counter() - start
            print(
                f"{number}/{len(wanted)} {method} {share:.0%} seed {seed}: {' '.join(figures)} ({took:.0f} s)",
                flush=True,
            )
    show(rows)


if __name__ == "__main__":
    main()
