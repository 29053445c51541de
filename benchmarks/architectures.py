"""Cut every causal-LM architecture of the installed Transformers that can be made tiny, and check the result.

Per architecture and kind of unit one of three answers is printed:

exact    the smaller model gives the masked model's logits in float32, to 1e-5 of the largest logit or of one; saved,
         and loaded by the stock class in a process that cannot import lightning_prune, it gives the same logits and
         the same 8 greedy tokens, with cache
refused  `discover` says that it cannot be cut, and why
wrong    it was cut, and one of these checks failed

The models have six blocks and, where they have experts, six of them. An architecture counts as exact where some blocks
can be cut; beside it stands in how many of all blocks that is so, and how many of the exact ones have norms over the
units that are cut: there what is left is rescaled, so that the norms divide by what they divided by, and "exact" means
equal to the masked model under such norms, not to one whose norms saw zeros.

Run:  python benchmarks/architectures.py [--only llama gpt2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import write_result
from tiny_causal_lms import Unbuildable, architectures, build, token_ids
from torch import Tensor
from tqdm import tqdm

from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.shrink import masked, shrink
from lightning_prune.structured.structure import Structure

KINDS = ("ffn", "heads", "layers", "hidden", "experts", "channels")
TOLERANCE = 1e-5  # largest difference of logits, as a share of the largest logit or of one if that is smaller
NUM_TOKENS = 8

# Runs without lightning_prune: loads a folder, answers with the logits' difference to the saved ones and with tokens.
LOADER = """
import json, sys, warnings
answers, sys.stdout = sys.stdout, sys.stderr
sys.modules["lightning_prune"] = None
warnings.filterwarnings("ignore")
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
for line in sys.stdin:
    job = json.loads(line)
    try:
        kind = getattr(transformers, job["class"])
        model = kind.from_pretrained(job["folder"]).eval()
        saved = torch.load(job["folder"] + "/probe.pt")
        with torch.no_grad():
            logits = model(**saved["inputs"], **job["arguments"]).logits
            answer = {"difference": float((logits - saved["logits"]).abs().max())}
            if job["generates"]:
                for cache in (True, False):
                    out = model.generate(saved["inputs"]["input_ids"], max_new_tokens=job["num_tokens"],
                                         do_sample=False, use_cache=cache, eos_token_id=-1, pad_token_id=0)
                    answer["cached" if cache else "uncached"] = out.tolist()
    except Exception as error:
        answer = {"error": type(error).__name__ + ": " + " ".join(str(error).split())[:300]}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Loader:
    """A process that loads folders with stock Transformers alone."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send one job and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the loading process died"}


def half(group: Group) -> Cut:
    """Keep the odd half of the units, equally many in each part."""
    size = group.num_units // group.num_parts
    keep = [part * size + unit for part in range(group.num_parts) for unit in range(size) if unit % 2 or size == 1]
    return Cut(group.key, tuple(keep))


def plan_for(structure: Structure, kind: str) -> Plan:
    """Plan the removal of half of the units of a kind, or of one block from the middle.

    Raises:
        ValueError: with the reason, if the structure refuses it.
    """
    if kind == "layers":
        stack = structure.stack
        if stack is None or not stack.removable:
            raise ValueError(structure.refused.get("layers", "no blocks"))
        gone = stack.removable[len(stack.removable) // 2]
        return Plan(layers=tuple(layer for layer in range(stack.num_layers) if layer != gone))
    try:
        groups = structure.of_kind("kv_groups" if kind == "heads" and "kv_groups" in structure.kinds else kind)
    except ValueError as error:
        reasons = [structure.refused.get(name) for name in (kind, "kv_groups" if kind == "heads" else kind)]
        fields = [f"{name}: {why}" for name, why in structure.refused.items() if kind == "ffn" and "inter" in name]
        raise ValueError(next((why for why in (*reasons, *fields) if why), str(error))) from error
    if kind == "heads" and all(group.num_units // group.num_parts < 2 for group in groups):
        groups = structure.of_kind("heads")
    return Plan(cuts=tuple(half(group) for group in groups))


@torch.no_grad()
def generated(model: Any, ids: Tensor, *, use_cache: bool = True) -> list[list[int]] | None:
    """Return greedy tokens; None if the class does not generate with this configuration."""
    try:
        with evaluating(model):
            out = model.generate(
                ids, max_new_tokens=NUM_TOKENS, do_sample=False, use_cache=use_cache, eos_token_id=-1, pad_token_id=0
            )
    except Exception:  # noqa: BLE001 - whatever keeps a parent from generating, there is nothing to compare with
        return None
    return out.tolist()


def ask(
    loader: Loader, model: Any, logits: Tensor, folder: Path, arguments: dict[str, Any], *, generates: bool
) -> dict[str, Any]:
    """Save a model and let the other process load it."""
    model.save_pretrained(folder)
    torch.save({"inputs": {"input_ids": token_ids()}, "logits": logits}, folder / "probe.pt")
    return loader.ask(
        {
            "folder": str(folder),
            "class": type(model).__name__,
            "arguments": arguments,
            "generates": generates,
            "num_tokens": NUM_TOKENS,
        }
    )


def survives_saving(model: Any, loader: Loader) -> bool:
    """Return whether the uncut model, saved and loaded, is the same."""
    arguments = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        logits = model(input_ids=token_ids(), **arguments).logits
        answer = ask(loader, model, logits, Path(folder), arguments, generates=False)
    return bool(answer.get("difference", 1.0) <= TOLERANCE)


def check(model: Any, structure: Structure, kind: str, loader: Loader, folder: Path) -> dict[str, Any]:
    """Cut one kind of unit and compare."""
    try:
        plan = plan_for(structure, kind)
    except ValueError as error:
        return {"answer": "refused", "reason": str(error)}
    ids = token_ids()
    arguments = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    start = time.perf_counter()
    try:
        small: Any = shrink(model, plan, structure=structure, inputs={"input_ids": ids})
    except ValueError as error:
        return {"answer": "refused", "reason": str(error)}
    except RuntimeError as error:
        return {"answer": "wrong", "reason": str(error)}
    seconds = time.perf_counter() - start
    with masked(model, structure, plan), torch.no_grad():
        expected = model(input_ids=ids, **arguments).logits
        tokens = generated(model, ids)
    with torch.no_grad():
        got = small(input_ids=ids, **arguments).logits
    gap = float((got - expected).abs().max())
    answer = ask(loader, small, got, folder, arguments, generates=tokens is not None)
    result = {
        "max_difference": gap,
        "scale": float(expected.abs().max()),
        "seconds": seconds,
        "generates": tokens is not None,
    }
    failures = []
    if gap > TOLERANCE * max(1.0, result["scale"]):
        failures.append(f"logits differ by {gap:.2g}")
    if "error" in answer:
        failures.append(f"loading: {answer['error']}")
    elif answer["difference"] > TOLERANCE * max(1.0, result["scale"]):
        failures.append(f"loaded logits differ by {answer['difference']:.2g}")
    elif tokens is not None and answer["cached"] != tokens:
        failures.append("greedy tokens of the masked and the cut model differ")
    elif tokens is not None and answer["uncached"] != tokens:
        with masked(model, structure, plan):
            without = generated(model, ids, use_cache=False)
        if without == tokens:  # a few classes give other tokens with cache, uncut ones too
            failures.append("greedy tokens with and without cache differ")
    return {"answer": "wrong" if failures else "exact", "reason": "; ".join(failures) or None, **result}


def blocks_with(structure: Structure, kind: str) -> list[int]:
    """Return in how many blocks units of a kind can go (or how many blocks can), and how many blocks there are."""
    if structure.stack is None:
        return [0, 0]
    if kind == "layers":
        return [len(structure.stack.removable), structure.stack.num_layers]
    kinds = ("heads", "kv_groups") if kind == "heads" else (kind,)
    groups = [group for group in structure.groups.values() if group.kind in kinds]
    if any(group.layer is None for group in groups):  # residual channels run through all of them
        return [structure.stack.num_layers] * 2
    return [len({group.layer for group in groups}), structure.stack.num_layers]


def has_norms(structure: Structure, kind: str) -> bool:
    """Return whether a norm spans units of a kind."""
    return any(member.power for group in structure.groups.values() if group.kind == kind for member in group.members)


def examine(name: str, loader: Loader) -> dict[str, Any]:
    """Check all kinds of one architecture."""
    try:
        model = build(name)
    except Unbuildable as error:
        return {"unbuildable": str(error)}
    if not survives_saving(model, loader):
        return {"unbuildable": "the uncut model is another one after save_pretrained and from_pretrained"}
    start = time.perf_counter()
    try:
        structure = discover(model, {"input_ids": token_ids()})
    except ValueError as error:
        return {kind: {"answer": "refused", "reason": str(error)} for kind in KINDS}
    row: dict[str, Any] = {"discover_seconds": time.perf_counter() - start}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            row[kind] = check(model, structure, kind, loader, Path(folder))
        row[kind] |= {"blocks": blocks_with(structure, kind), "rescaled": has_norms(structure, kind)}
    return row


def shares(built: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return in how many architectures a kind can be cut in all, in some and in no blocks, and the share of blocks."""
    exact = [row[kind] for row in built.values() if row[kind]["answer"] == "exact"]
    counts = [row[kind]["blocks"] for row in built.values() if "blocks" in row[kind]]
    can, all_ = sum(part for part, _ in counts), sum(whole for _, whole in counts)
    return {
        "in_all_blocks": sum(row["blocks"][0] == row["blocks"][1] > 0 for row in exact),
        "in_some_blocks": sum(0 < row["blocks"][0] < row["blocks"][1] for row in exact),
        "share_of_blocks": can / all_ if all_ else None,
        "rescaled": sum(row["rescaled"] for row in exact),
    }


def main() -> None:
    """Check the architectures, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=None)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loader = Loader()
    rows: dict[str, Any] = {}
    bar = tqdm(arguments.only or architectures())
    for name in bar:
        bar.set_postfix_str(name)
        rows[name] = examine(name, loader)
        shown = {kind: rows[name].get(kind, {}).get("answer", "-") for kind in KINDS}
        tqdm.write(f"{name:24}" + "  ".join(f"{kind} {answer:8}" for kind, answer in shown.items()))
        for kind in KINDS:
            if rows[name].get(kind, {}).get("answer") == "wrong":
                tqdm.write(f"    {kind}: {rows[name][kind]['reason']}")
    built = {name: row for name, row in rows.items() if "unbuildable" not in row}
    counts = {kind: dict(Counter(row[kind]["answer"] for row in built.values())) for kind in KINDS}
    absolute = {
        kind: sum(row[kind]["answer"] == "exact" and row[kind]["max_difference"] <= TOLERANCE for row in built.values())
        for kind in KINDS
    }
    parts = {kind: shares(built, kind) for kind in KINDS}
    print(f"{len(built)} of {len(rows)} architectures built")
    for kind, count in counts.items():
        print(f"{kind:10}", count, f"({absolute[kind]} exact to {TOLERANCE} absolute)", parts[kind])
    if arguments.only is None:
        write_result(
            "architectures",
            seed=0,
            settings={
                "tolerance": TOLERANCE,
                "num_tokens": NUM_TOKENS,
                "num_built": len(built),
                "counts": counts,
                "exact_absolute": absolute,
                "blocks": parts,
            },
            rows=[{"architecture": name, **row} for name, row in rows.items()],
        )


if __name__ == "__main__":
    main()
