"""Write the tables of figures into README.md and docs/, from the files in benchmarks/results/.

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`; what is between them is replaced.
Usage: python docs/tables.py [--check]      --check: change nothing, and fail where a table is not that of the results
"""

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Row = Sequence[str]


@functools.cache
def result(name: str) -> Any:
    """Return what a result file holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rows(name: str, **same: object) -> list[dict[str, Any]]:
    """Return the rows of a result file that have these values."""
    found = [row for row in result(name)["rows"] if all(row.get(key) == value for key, value in same.items())]
    if not found:
        raise ValueError(f"{name}.json has no row with {same}; was the benchmark changed?")
    return found


def median(name: str, key: str, **same: object) -> float:
    """Return the median that the one row with these values states."""
    (row,) = rows(name, **same)
    return float(row[key]["median"])


def limit(name: str, text: str) -> dict[str, Any]:
    """Return the one limit of a benchmark whose name ends so."""
    (found,) = [entry for entry in result(name)["limits"] if entry["name"].endswith(text)]
    return dict(found)


def markdown(head: Row, lines: Sequence[Row], *, words: int = 1) -> str:
    """Lay out a table; the first `words` columns are words, the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *lines])


def ppl(value: float) -> str:
    """Write a perplexity with about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def headline() -> str:
    """Return the table of README.md."""
    quick = {row["model"]: row["val_ppl"] for row in result("quickstart")["rows"]}
    ways = {row["method"]: row["perplexity"] for row in result("quality_recovery_stories3M")["summary"][:15]}
    ours = structured("Wanda", 0.33, "trained")
    peer = structured("Torch-Pruning Taylor, FFN alone", 0.33, "trained")
    given, one = instruction("conditioned", 0.33), instruction("Wanda", 0.33)
    counts, built = result("architectures")["settings"]["counts"], result("architectures")["settings"]["num_built"]
    step = limit("step_overhead", "masks held / plain")["measured"]
    whole = result("calibration_text")["settings"]["dense_perplexity"]
    pruned, dense = quick["pruned while trained"], quick["dense, trained further"]
    recovered, lost = ppl(ways["reconstruction, then MaskLoRA"]), ppl(ways["no recovery"])
    lines = [
        ("Half of the weights pruned in the quickstart, validation perplexity", f"{pruned:.1f}", f"{dense:.1f} dense"),
        (
            "Half pruned once by Wanda, then refitted and MaskLoRA (stories3M)",
            recovered,
            f"{lost} pruned, {whole} dense",
        ),
        ("A third of the blocks' weights cut, then 30 steps (stories3M)", ppl(ours), f"{ppl(peer)} Torch-Pruning, FFN"),
        ("A third of the FFN units, by the instruction, nats per token", f"{given:.3f}", f"{one:.3f} one Wanda mask"),
        ("Architectures whose FFN units are cut exactly", f"{counts['ffn']['exact']}", f"{built} tried"),
        ("Time of a training step with masks held", f"{step:.3f}", "1 plain"),
    ]
    files = ("quickstart", "quality_recovery_stories3M", "quality_structured_stories3M", "quality_instruction")
    named = [f"`{name}.json`" for name in (*files, "architectures", "step_overhead")]
    cells = [(*line, name) for line, name in zip(lines, named, strict=True)]
    cells = [(what, file, value, beside) for what, value, beside, file in cells]
    return markdown(("what", "file in `benchmarks/results/`", "measured", "beside it"), cells, words=2)


def quickstart() -> str:
    """Return what the quickstart prints."""
    lines = [
        (
            row["model"],
            f"{row['num_parameters']:,}",
            f"{row['num_nonzeros']:,}",
            f"{row['sparsity']:.0%}",
            f"{row['val_ppl']:.2f}",
            f"{row['accuracy']:.3f}",
            f"{row['bits_per_byte']:.3f}",
        )
        for row in result("quickstart")["rows"]
    ]
    head = ("model", "parameters", "non-zeros", "sparsity", "perplexity", "next-line accuracy", "bits per byte")
    return markdown(head, lines)


def unstructured() -> str:
    """Return the table of single-weight methods."""
    recipes = {
        "magnitude": "oneshot/magnitude_half",
        "wanda": "oneshot/wanda_half",
        "taylor": "oneshot/taylor_half",
        "gradient": "train/gradient",
        "random": "oneshot/random_half",
        "magnitude 2:4": "train/nm_2_4",
        "wanda 2:4": "oneshot/wanda_2_4",
        "magnitude 70 %": "train/gradual_magnitude",
        "wanda, OWL 70 %": "oneshot/wanda_owl_70",
        "taylor 70 %": "train/taylor",
    }
    columns = ("oneshot", "oneshot_then_training", "gradual_training")
    lines = []
    for row in result("quality_unstructured_stories260K")["rows"]:
        numbers = [f"{row[name]:,.{0 if row[name] >= 1000 else 2}f}" if name in row else "" for name in columns]
        recipe = recipes.get(row["method"])
        lines.append((row["method"], f"`{recipe}`" if recipe else "", f"{row['sparsity']:.0%}", *numbers))
    head = ("method", "recipe", "sparsity", "once, not trained", "once, then trained", "pruned while trained")
    return markdown(head, lines, words=2)


def structured(method: str, share: float, what: str) -> float:
    """Return the median perplexity over seeds, `cut` or `trained`."""
    found = rows("quality_structured_stories3M", method=method, share=share)
    return statistics.median(row[what]["perplexity"] for row in found)


def cut_models() -> str:
    """Return the table of structured methods."""
    named = {
        "greedy output": ("width, greedy output error, least squares", ""),
        "Wanda": ("width, Wanda, least squares", "structured/width_quarter"),
        "FLAP fluctuation": ("width, fluctuation (FLAP), least squares", "structured/flap"),
        "Minitron activation": ("width, activation (Minitron), least squares", "structured/minitron_width"),
        "Taylor": ("width, Taylor, least squares", ""),
        "random": ("width, random, least squares", ""),
        "Taylor, no repair (LLM-Pruner)": ("width, Taylor, not repaired (LLM-Pruner)", ""),
        "Taylor, FFN alone, no repair": ("width, FFN alone, Taylor, not repaired", ""),
        "Torch-Pruning Taylor, FFN alone": ("Torch-Pruning, FFN alone, Taylor", ""),
        "ReplaceMe": ("ReplaceMe", "structured/replaceme"),
        "SLEB": ("SLEB", "structured/sleb"),
        "ShortGPT": ("ShortGPT", "structured/shortgpt"),
        "BlockPruner": ("BlockPruner", "structured/blockpruner"),
        "rotate and slice": ("rotate and slice (global SliceGPT)", ""),
    }
    lines = []
    for method, (text, recipe) in named.items():
        pairs = [[ppl(structured(method, share, what)) for what in ("cut", "trained")] for share in (0.2, 0.33, 0.5)]
        lines.append((text, f"`{recipe}`" if recipe else "", *(" -> ".join(pair) for pair in pairs)))
    return markdown(("method", "recipe", "20 %", "33 %", "50 %"), lines, words=2)


def architectures() -> str:
    """Return how many architectures can be cut, by kind of unit."""
    settings = result("architectures")["settings"]
    kinds = {
        "ffn": "FFN units",
        "heads": "heads or key/value groups",
        "layers": "blocks",
        "hidden": "residual channels",
        "experts": "experts",
        "channels": "other inner widths",
    }
    counts = [settings["counts"][kind] for kind in kinds]
    whole = [str(settings["blocks"][kind]["in_all_blocks"]) for kind in kinds]
    lines = [
        ("exact", *(str(count.get("exact", 0)) for count in counts)),
        ("exact in all blocks", *whole),
        ("refused, or none there", *(str(count.get("refused", 0)) for count in counts)),
        ("found, then refused by the proof of the cut", *(str(count.get("wrong", 0)) for count in counts)),
    ]
    return markdown(("", *kinds.values()), lines)


PARENT = "0.7M"  # of the tables; a file without parents has this one alone
ARMS = {
    "conditioned": "conditioned on the instruction",
    "Wanda": "one Wanda mask, then trained",
    "Taylor": "one Taylor mask, then trained",
    "magnitude": "one magnitude mask, then trained",
    "static": "one learned mask (the same head without input)",
    "dense small": "a dense model of that size, from random weights",
    "dense small, parent's steps too": "the same, trained as long as parent and arm",
    "Wanda per task, untrained": "one Wanda mask per kind of text, not trained",
}


def instruction(arm: str, keep: float, what: str = "loss") -> float:
    """Return the mean over seeds of one arm."""
    found = [
        row[what] for row in rows("quality_instruction", arm=arm, keep=keep) if row.get("parent", PARENT) == PARENT
    ]
    return statistics.mean(found)


def instructions() -> str:
    """Return the losses of a conditioned model and of those beside it."""
    own = [row for row in result("quality_instruction")["rows"] if row.get("parent", PARENT) == PARENT]
    there = {(row["arm"], row["keep"]) for row in own}
    keeps = sorted({keep for _, keep in there if keep < 1}, reverse=True)

    def line(text: str, arm: str, what: str = "loss") -> Row:
        return text, *(f"{instruction(arm, keep, what):.3f}" if (arm, keep) in there else "" for keep in keeps)

    lines: list[Row] = [("dense, all units", *[f"{instruction('dense', 1.0):.3f}"] * len(keeps))]
    lines += [line(text, arm) for arm, text in ARMS.items() if any((arm, keep) in there for keep in keeps)]
    lines.append(line("conditioned, a wording never trained on", "conditioned", "unseen_wording"))
    lines.append(line("one Wanda mask, a wording never trained on", "Wanda", "unseen_wording"))
    lines.append(("cost of another instruction's mask", *line("", "conditioned", "swap_cost")[1:]))
    shared = (instruction("conditioned", keep, "within") - instruction("conditioned", keep, "across") for keep in keeps)
    lines.append(("units shared within a kind, less those across (Jaccard)", *(f"{value:.2f}" for value in shared)))
    return markdown(("", *(f"{100 * keep:g} % of the FFN units" for keep in keeps)), lines)


def serving() -> str:
    """Return what serving a selected model costs."""
    first = {what: median("instruction_serving", "ms", what=what) for what in ("predicting", "gathering", "prefill")}
    whole = median("instruction_serving", "ms", what="prefill, whole model")
    decode = {name: median("instruction_serving", "ms", what=f"decode, {name} model") for name in ("selected", "whole")}
    ratio = median("instruction_serving", "ratio", what="selected over native")
    copy = median("instruction_serving", "ratio", what="gather over copy from where they lie")
    train = limit("instruction_training", "plain step")["measured"]
    held = [at_most(f"instruction_{name}", text) for name, text in (("serving", "native"), ("serving", "lie"))]
    lines = [
        ("decoding a token: selected / a native model of that size", f"{ratio:.2f}", held[0]),
        ("decoding a token: selected / whole model, ms", f"{decode['selected']:.0f} / {decode['whole']:.0f}", ""),
        ("first token of a new instruction / of the whole model, ms", f"{sum(first.values()):.0f} / {whole:.0f}", ""),
        ("of it predict, gather, prefill, ms", " + ".join(f"{value:.0f}" for value in first.values()), ""),
        ("gathering / a plain copy of the same bytes", f"{copy:.2f}", held[1]),
        ("a masked training step / a plain one", f"{train:.2f}", at_most("instruction_training", "plain step")),
    ]
    return markdown(("what", "measured", "limit"), lines)


def at_most(name: str, text: str) -> str:
    """Return a limit, and whether it is missed."""
    found = limit(name, text)
    return f"{found['at_most']:g}" + ("" if found["is_met"] else ", **missed**")


def relatives() -> str:
    """Return what methods that decide per token save."""
    cases = (("prompt of 256", "4 prompts of 128"), ("decoding 1",), ("decoding 4",))

    def saved(variant: str, names: Sequence[str]) -> str:
        found = sorted(median("conditional_skip", "ratio", case=case, variant=variant) for case in names)
        return " to ".join(dict.fromkeys(f"{value:.2f}" for value in found))

    def routed(variant: str) -> str:
        return f"{median('conditional_routers', 'to_plain', family='llama', variant=f'{variant}, a quarter'):.2f}"

    lines = [
        ("half of the tokens skip a block (`SkipLayer`)", *(saved("half skipped", names) for names in cases)),
        ("tokens leave halfway (`EarlyExit`)", *(saved("left halfway", names) for names in cases)),
        ("a quarter through the blocks (`ConditionalAdapter`)", routed("conditional adapters"), "", ""),
        ("a quarter through the heavy FFN (`HeavyLight`)", routed("heavy and light"), "", ""),
        ("four experts, each of a quarter (`ExpertChoice`)", routed("expert choice, 4 experts"), "", ""),
        ("the plain model again, the noise", *(saved("dense again", names) for names in cases)),
    ]
    return markdown(("", "prompt", "decoding 1 row", "decoding 4 rows"), lines)


def recovery() -> str:
    """Return perplexities after recovery."""
    named = {
        "no recovery": "no recovery",
        "full fine-tuning": "full fine-tuning",
        "LoRA": "LoRA, not merged; on width merged",
        "MaskLoRA": "MaskLoRA",
        "ScaleLoRA": "ScaleLoRA",
        "MaskLoRA, norms": "MaskLoRA, norms",
        "PERP norms": "PERP: norms",
        "PERP norms, head": "PERP: norms and head (tied to the embeddings)",
        "distillation": "distillation, KL alone",
        "distillation, KL + CE": "distillation, KL and cross-entropy",
        "distillation, corrected teacher": "distillation, KL alone, corrected teacher",
        "MaskLoRA, KL + CE": "MaskLoRA, distilled (KL and cross-entropy)",
        "reconstruction": "reconstruction, no training",
        "reconstruction, then MaskLoRA": "reconstruction, then MaskLoRA",
        "reconstruction, then full": "reconstruction, then full",
    }
    summary = {(row["base"], row["method"]): row for row in result("quality_recovery_stories3M")["summary"]}
    bases = list(dict.fromkeys(base for base, _ in summary))
    lines = []
    for method, text in named.items():
        first = summary[bases[0], method]
        cells = [_recovered(summary.get((base, method))) for base in bases]
        lines.append((text, f"{100 * first['trained_share']:.3g} %", *cells, f"{first['seconds']:.0f}"))
    return markdown(("way", "trained", *bases, "seconds"), lines)


def _recovered(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    closed = "" if row["method"] == "no recovery" else f" ({row['gap_closed']:.0%})"
    return f"{row['perplexity']:.{1 if row['perplexity'] >= 100 else 2}f}{closed}"


def cost() -> str:
    """Return every limit that a benchmark checks, and what was measured."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        for entry in _limits(path):
            missed = "" if entry["is_met"] else ", **missed**"
            lines.append((entry["name"], f"`{path.name}`", f"{entry['measured']:.4g}", f"{entry['at_most']:g}{missed}"))
    return markdown(("what", "file", "measured", "limit"), lines, words=2)


def _limits(path: Path) -> Iterator[dict[str, Any]]:
    if path.stem not in ("quality_instruction", "instruction_serving"):  # whose tables stand by themselves
        yield from result(path.stem).get("limits", [])


def steps() -> str:
    """Return the time of a training step beside a plain one."""
    lines = []
    for row in result("step_overhead")["rows"]:
        if "variant" in row and row["variant"] != "plain":
            ratio = row["ratio"]
            spread = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
            lines.append((row["variant"], row.get("optimizer", "fused"), f"{ratio['median']:.3f}", spread))
    return markdown(("step", "AdamW", "over a plain step", "range"), lines, words=2)


def memory() -> str:
    """Return what is held for each weight of the targets."""
    names = ("held_bytes_per_weight", "peak_bytes_per_weight", "checkpoint_bits_per_weight")
    lines = [
        (row["variant"], *(f"{abs(round(row[name], 1)):g}" for name in names)) for row in result("mask_memory")["rows"]
    ]
    return markdown(("", "bytes held", "bytes at the peak", "bits in a checkpoint"), lines)


def calibration() -> str:
    """Return perplexities after pruning from different texts."""
    found: dict[str, list[float]] = {}
    for row in result("calibration_text")["rows"]:
        found.setdefault(row["text"], []).append(row["perplexity"])
    texts = {"stories": "training stories", "its own text": "the model's own, three seeds"}
    numbers = (" to ".join(dict.fromkeys(f"{v:.2f}" for v in (min(own), max(own)))) for own in found.values())
    return markdown(("calibration text", *(texts.get(text, text) for text in found)), [("perplexity", *numbers)])


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        headline,
        quickstart,
        unstructured,
        cut_models,
        architectures,
        instructions,
        serving,
        relatives,
        recovery,
        cost,
        steps,
        memory,
        calibration,
    )
}


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """Return a page with its tables as the results give them."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}", text)


def main() -> int:
    """Write or check the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a table is not up to date")
    is_check = parser.parse_args().check
    stale = [path for path in pages() if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: " + ("stale; run python docs/tables.py" if is_check else "written"))
        if not is_check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return int(bool(stale) and is_check)


if __name__ == "__main__":
    sys.exit(main())
