"""Compare a model that chooses its units from the instruction with one fixed choice of the same size.

    LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/quality_instruction.py [--seeds 0 1 2] [--keep 0.33]

A Llama of 0.72 million parameters is trained on eight kinds of text, one parent per seed; every arm goes on from it
with the same batches, rate and number of steps. Loss: held-out text of all kinds, per token, each kind alike.

dense         all units
conditioned   the predictor's units, `Instruction` as the recipe `instruction/sft` has it
Wanda         one mask by Wanda over all kinds, then trained
static        one mask that is learned: the same head without input, started from the same importance
Taylor        one mask by first-order importance over all kinds, then trained
magnitude     one mask by the norms of the weights, then trained
dense small   a model of that size from random weights, at the parent's rate: with the arms' batches only; and
              (`parent's steps too`) with all that the dense arm saw, the parent's batches and then the arms'

Beside the loss: with a wording that was never trained on; with the mask of another instruction; how many units two
instructions of one kind share, less how many those of two kinds share (Jaccard index).

Other parents (`--parent`): 3.4M, the same at twice the width and with one block more; stories3M, trained on children's
stories with its own tokenizer and then for a few steps on the eight kinds. No limit applies to them, nor to 50 %.

A run adds its rows to the result file, in place of those of the same parent, seed, arm and share, and leaves out what
the file has of the same code already; `code` is the last commit of the library that a row was measured with, and
`processor` what it ran on, since another one rounds otherwise.
"""

import argparse
import fcntl
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from instruction_arms import ARM_RATE, ARMS, BATCH, PARENTS, Bench, Row
from instruction_tasks import TASKS
from measure import RESULTS, limit, machine, print_table, write_result

from lightning_prune.recipe.recipe import Recipe
from lightning_prune.report.page import write_report

NAME = "quality_instruction"
ARM_STEPS = 300
LIMITED = PARENTS[0].name
LIMITS = {0.33: 0.015, 0.125: 0.04}  # nats by which the conditioned model must be better than each fixed one
COMPARED = ("conditioned", "Wanda", "static")
SHOWN = (*COMPARED, "Taylor", "dense small, parent's steps too", "dense")  # on the page: what a reader chooses between
NOTES = (
    f"dense small saw the arms' {ARM_STEPS * BATCH} sequences, from random weights at the parent's rate; dense small, "
    "parent's steps too saw all that the dense arm saw: the parent's steps, then the arms', each at its own rate",
    "num_activated: parameters that compute for one instruction; a predictor's do not count",
)


def limits(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return what was promised, and whether it holds, for the mean over seeds; of shares measured for all arms."""

    def values(arm: str, keep: float, what: str = "loss") -> dict[object, float]:
        chosen = (row for row in rows if (row["parent"], row["arm"], row["keep"]) == (LIMITED, arm, keep))
        return {row["seed"]: float(row[what]) for row in chosen}  # type: ignore[arg-type]

    def average(*of: object) -> float:
        found = values(*of).values()  # type: ignore[arg-type]
        return sum(found) / len(found)

    found = []
    for keep, nats in LIMITS.items():
        seeds = [set(values(arm, keep)) for arm in COMPARED]
        if not seeds[0] or any(other != seeds[0] for other in seeds):
            continue
        for arm in COMPARED[1:]:
            gain = average("conditioned", keep) - average(arm, keep)
            found.append(limit(f"keep {keep}: nats over {arm}", gain, -nats))
        apart = average("conditioned", keep, "within") - average("conditioned", keep, "across")
        unseen = average("conditioned", keep, "unseen_wording") - average("Wanda", keep, "unseen_wording")
        cost = average("conditioned", keep, "swap_cost")
        found.append(limit(f"keep {keep}: less than 0 by what a swapped instruction costs", -cost, -0.3))
        found.append(limit(f"keep {keep}: less than 0 by the overlap within kinds over that across", -apart, -0.4))
        found.append(limit(f"keep {keep}: nats over Wanda with an unseen wording", unseen, 0.03))
    return found


def code() -> str:
    """Return the last commit of the library; with a mark, if it was changed since."""
    folder, parts = Path(__file__).parent.parent, ("lightning_prune", "integrations")

    def git(*words: str) -> str:
        return subprocess.run(["git", *words, "--", *parts], cwd=folder, capture_output=True, text=True).stdout.strip()

    return (git("log", "-1", "--format=%h") or "unknown") + ("+changed" if git("status", "--porcelain") else "")


def key(row: Mapping[str, object]) -> tuple[object, ...]:
    """Return what tells one row from another."""
    return row["parent"], row["seed"], row["keep"], row["arm"]


def _order(row: Mapping[str, object]) -> tuple[object, ...]:
    names = [parent.name for parent in PARENTS]
    return names.index(str(row["parent"])), row["seed"], -float(str(row["keep"])), list(ARMS).index(str(row["arm"]))


def measured() -> list[Row]:
    """Return the rows of the result file."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


@contextmanager
def alone() -> Iterator[None]:
    """Keep other runs off the result file."""
    with (Path(tempfile.gettempdir()) / f"{NAME}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(row: Row) -> None:
    """Add a row to the result file; an arm that was finished is not lost."""
    with alone():
        rows = sorted([*(one for one in measured() if key(one) != key(row)), row], key=_order)
        settings: Row = {"batch": BATCH, "arm_rate": ARM_RATE, "tasks": list(TASKS)}
        settings |= {"parent_rates": {parent.name: parent.rate for parent in PARENTS}}
        write_result(NAME, seed=0, settings=settings, rows=rows, limits=limits(rows), notes=NOTES)


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    shown = ("loss", "unseen_wording", "swap_cost")
    print_table(
        ("parent", "seed", "keep", "arm", "activated", *shown),
        [(*key(row), row["num_activated"], *(_shown(row, name) for name in shown)) for row in rows],
    )


def quality(rows: Sequence[Row], parent: str) -> list[Row]:
    """Return the mean over seeds of every arm and share of one parent, as the report page shows it."""
    own = [row for row in rows if row["parent"] == parent and row["arm"] in SHOWN]
    found = []
    for arm, keep in dict.fromkeys((row["arm"], row["keep"]) for row in own):
        alike = [row for row in own if (row["arm"], row["keep"]) == (arm, keep)]
        loss = sum(float(str(row["loss"])) for row in alike) / len(alike)
        seeds = sorted(str(row["seed"]) for row in alike)
        found.append({"arm": arm, "num_activated": alike[0]["num_activated"], "loss": loss, "seeds": seeds})
    return sorted(found, key=lambda row: SHOWN.index(str(row["arm"])))


def page(rows: Sequence[Row], parent: str, folder: Path) -> Path:
    """Write a report page of one parent's rows, and return it."""
    shown = quality(rows, parent)
    seeds = sorted({tuple(row["seeds"]) for row in shown})
    notes = [*NOTES, "the losses are means over seeds " + " or ".join(", ".join(one) for one in seeds)]
    condition = {"method": "Instruction", "quality": shown}
    about: Row = {"step": max(int(str(row["arm_steps"])) for row in rows if row["parent"] == parent)}
    recipe = Recipe.load("instruction/sft").dump()
    return write_report(
        folder, report=about, history=[], evaluations=[], recipe_text=recipe, notes=notes, condition=condition
    )


def _shown(row: Mapping[str, object], name: str) -> str:
    value = row.get(name, math.nan)
    return "" if isinstance(value, float) and math.isnan(value) else f"{value:.3f}"


def main() -> None:
    """Train all arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", default=LIMITED, choices=[parent.name for parent in PARENTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=list(LIMITS))
    parser.add_argument("--parent-steps", type=int, help="other than the parent's own")
    parser.add_argument("--arm-steps", type=int, default=ARM_STEPS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--report", type=Path, help="a folder for a page: loss against activated parameters")
    parser.add_argument("--store", type=Path, help="a folder that keeps trained parents for a later run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    parent = next(one for one in PARENTS if one.name == given.parent)
    parent = parent if given.parent_steps is None else replace(parent, steps=given.parent_steps)
    version, data = code(), parent.data()
    for seed in given.seeds:
        wanted = [
            {"parent": parent.name, "seed": seed, "keep": keep, "arm": arm}
            for keep in (1.0, *given.keep)
            for arm in given.arms
            if (arm == "dense") == (keep == 1)
        ]
        there = {key(row) for row in measured() if row.get("code") == version}
        missing = [one for one in wanted if key(one) not in there]
        if not missing:
            continue
        bench = Bench(parent, data, seed, given.arm_steps, given.store)
        for one in missing:
            began = time.monotonic()
            found = ARMS[str(one["arm"])](bench, float(str(one["keep"])))
            about = {"parent_steps": parent.steps, "arm_steps": given.arm_steps, "code": version}
            about |= {"processor": machine()["processor"], "seconds": round(time.monotonic() - began)}
            row = {**one, **found, **about}
            print({name: value for name, value in row.items() if name != "by_task"}, flush=True)
            write(row)
    show(measured())
    if given.report is not None:
        print(page(measured(), parent.name, given.report))


if __name__ == "__main__":
    main()
