"""Compare a model that chooses its units from the instruction with one fixed choice of the same size.

    LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/quality_instruction.py [--seeds 0 1 2] [--keep 0.33]

A Llama of 0.72 million parameters is trained on eight kinds of text, one parent per seed; every arm goes on from it
with the same batches, rate and number of steps. Loss: held-out text of all kinds, per token, each kind alike.

dense         all units
conditioned   the predictor's units, `Instruction` as the recipe `instruction/sft` has it
Wanda         one mask by Wanda over all kinds, then trained: the strongest fixed choice
static        one mask that is learned: the same head without input, started from the same importance
magnitude     one mask by the norms of the weights, then trained

Beside the loss: with a wording that was never trained on; with the mask of another instruction; how many units two
instructions of one kind share, less how many those of two kinds share (Jaccard index).
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from instruction_tasks import TASKS, InstructionTasks
from measure import data_folder, limit, print_table, write_result
from torch import Tensor, nn
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_prune.conditional.instruction import Instruction, InstructionCondition, Predictor, Start
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.collapse import overlap
from lightning_prune.predictors.encoder import Blind, Encoder, OwnLayers
from lightning_prune.predictors.prompt import Reads
from lightning_prune.predictors.soft_top_k import kept
from lightning_prune.predictors.unit_importance import UnitImportance
from lightning_prune.predictors.unit_masks import reader_of
from lightning_prune.structured.structure import Stack

BATCH = 16
PARENT_STEPS, ARM_STEPS = 1000, 300
PARENT_RATE, ARM_RATE = 4e-3, 1e-3
HEAD_TIMES = Instruction.rate  # of the rate, for predictors
NUM_HELD_OUT = 32  # sequences of each kind
NUM_MEASURED = 16  # batches from which masks are made
LIMITS = {0.33: 0.015, 0.125: 0.04}  # nats by which the conditioned model must be better than each fixed one
Batch = Mapping[str, Tensor]


class Bench:
    """One parent and the arms that go on from it."""

    def __init__(self, data: InstructionTasks, seed: int, parent_steps: int, arm_steps: int) -> None:
        self.data, self.seed = data, seed
        self.parent_steps, self.arm_steps = parent_steps, arm_steps
        self.held_out = {task: data.held_out(task, NUM_HELD_OUT) for task in TASKS}
        self.unseen = {task: data.held_out(task, NUM_HELD_OUT, wording=3) for task in TASKS}
        model = build(seed, data.shape.vocab_size, data.shape.length)
        self._train(model, parent_steps, PARENT_RATE, first=0, title="parent")
        self.parent = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fresh(self) -> LlamaForCausalLM:
        """Return a copy of the parent."""
        model = build(self.seed, self.data.shape.vocab_size, self.data.shape.length)
        model.load_state_dict(self.parent)
        return model

    def _train(
        self,
        model: nn.Module,
        num_steps: int,
        rate: float,
        *,
        first: int,
        title: str,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        model.train()
        own, added = [], []
        for name, parameter in model.named_parameters():
            (added if name.startswith("mask_predictor") else own).append(parameter)
        groups = [{"params": own, "times": 1.0}, {"params": added, "times": HEAD_TIMES}]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        warmup = max(1, num_steps // 20)
        for step in trange(num_steps, desc=title, mininterval=10):
            factor = min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor * group["times"]
            model(**self.data.train(self.seed, first + step, BATCH)).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after_step()

    def train_arm(self, model: nn.Module, title: str, after_step: Callable[[], None] = lambda: None) -> None:
        """Go on from the parent, with the same batches for every arm."""
        first = self.parent_steps
        self._train(model, self.arm_steps, ARM_RATE, first=first, title=title, after_step=after_step)

    def measured_batches(self) -> list[Batch]:
        """Return training batches that no arm trains on."""
        return [self.data.train(self.seed + 1000, number, BATCH) for number in range(NUM_MEASURED)]

    def row(self, arm: str, keep: float, model: nn.Module, **more: float) -> dict[str, object]:
        """Return one row of the table."""
        by_task = losses(model, self.held_out)
        found = {"seed": self.seed, "arm": arm, "keep": keep, "loss": mean(by_task)}
        found |= {"unseen_wording": mean(losses(model, self.unseen)), **more, "by_task": by_task}
        print({name: value for name, value in found.items() if name != "by_task"}, flush=True)
        return found


def build(seed: int, vocab_size: int, length: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    other = {"max_position_embeddings": length, "tie_word_embeddings": True, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **other))


@torch.no_grad()
def losses(model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, float]:
    """Return the loss on each kind of text."""
    model.eval()
    return {task: float(model(**batch).loss) for task, batch in batches.items()}


def mean(values: Mapping[str, float]) -> float:
    """Return the mean over kinds."""
    return sum(values.values()) / len(values)


def insert(model: nn.Module, keep: float, encoder: Encoder, *, start: Start | None) -> InstructionCondition:
    """Put a predictor into a model, with the options of the recipe `instruction/sft`."""
    reads = Reads(dropout=0.2 if isinstance(encoder, OwnLayers) else 0.0)
    predictor = Predictor(encoder=encoder, hidden=64)
    options = Instruction(budget=Budget(keep=keep), predictor=predictor, reads=reads, start=start)
    return options.insert(model, Stack((), "", (), 3))


def predicted(bench: Bench, keep: float, encoder: Encoder, arm: str) -> dict[str, object]:
    """Train a predictor with the model and measure both."""
    model = bench.fresh()
    condition = insert(model, keep, encoder, start=Start())
    condition.begin(total_steps=bench.arm_steps)
    condition.warm_start(bench.measured_batches())
    bench.train_arm(model, f"{arm} {keep}", condition.after_step)
    within, across = shared_units(condition, bench.held_out)
    mixed = {name: torch.cat([batch[name][:4] for batch in bench.held_out.values()]) for name in bench.held_out["wiki"]}
    found = condition.measure(mixed)
    return bench.row(arm, keep, model, swap_cost=found.swap_cost, within=within, across=across)


@torch.no_grad()
def shared_units(condition: InstructionCondition, batches: Mapping[str, Batch]) -> tuple[float, float]:
    """Return the overlap of two instructions of one kind, and of two kinds; mean over pairs and blocks."""
    condition.model.eval()
    masks = [condition.masks_of(condition.prompt(batch)) for batch in batches.values()]
    within, across = [], []
    for block in range(len(masks[0])):
        chosen = [mask[block] > 0 for mask in masks]
        for idx, first in enumerate(chosen):
            pairs = overlap(first[:, None], first[None])
            off_diagonal = ~torch.eye(len(first), dtype=torch.bool)
            within.append(float(pairs[off_diagonal].mean()))
            across += [float(overlap(first[:, None], second[None]).mean()) for second in chosen[idx + 1 :]]
    return sum(within) / len(within), sum(across) / len(across)


@torch.no_grad()
def wanda(condition: InstructionCondition, batches: Sequence[Batch]) -> list[Tensor]:
    """Return how much each unit matters over all batches: Wanda, by the units that readers read."""
    counter = UnitImportance(condition.model, condition.predictor.units.groups)
    condition.model.eval()
    total: list[Tensor] = []
    with condition.whole():
        for batch in batches:
            with counter.counting(batch["attention_mask"]):
                condition.model(**batch)
            squares = [one.square().sum(0) for one in counter.importance()]
            total = [a + b for a, b in zip(total, squares, strict=True)] if total else squares
    return total


def magnitude(condition: InstructionCondition, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the norm of the weights that read each unit."""
    groups = condition.predictor.units.groups
    return [reader_of(condition.model, group.readers[0])[1].detach().square().sum(0) for group in groups]


def fixed(bench: Bench, keep: float, rate: Callable[..., list[Tensor]], arm: str) -> dict[str, object]:
    """Train the model under one mask."""
    model = bench.fresh()
    condition = insert(model, keep, Blind(), start=None)
    scores = rate(condition, bench.measured_batches())
    masks = [kept(one[None], k).float() for one, k in zip(scores, condition.predictor.keep, strict=True)]
    with condition.fixed(masks):
        untrained = mean(losses(model, bench.held_out))
        bench.train_arm(model, f"{arm} {keep}")
        return bench.row(arm, keep, model, untrained=untrained)


def per_task(bench: Bench, keep: float) -> dict[str, object]:
    """Measure one Wanda mask per kind of text, without any training."""
    model = bench.fresh()
    condition = insert(model, keep, Blind(), start=None)
    found = {}
    for task, batch in bench.held_out.items():
        scores = wanda(condition, [bench.data.of_task(task, bench.seed, NUM_HELD_OUT)])
        masks = [kept(one[None], k).float() for one, k in zip(scores, condition.predictor.keep, strict=True)]
        with condition.fixed(masks):
            found[task] = losses(model, {task: batch})[task]
    row = {"seed": bench.seed, "arm": "Wanda per task, untrained", "keep": keep, "loss": mean(found)}
    print(row, flush=True)
    return row | {"by_task": found}


def limits(rows: Sequence[Mapping[str, object]], keeps: Sequence[float]) -> list[dict[str, object]]:
    """Return what was promised, and whether it holds, for the mean over seeds."""

    def average(arm: str, keep: float, what: str = "loss") -> float:
        values = [float(row[what]) for row in rows if row["arm"] == arm and row["keep"] == keep]  # type: ignore[arg-type]
        return sum(values) / len(values)

    found = []
    for keep in keeps:
        for arm in ("Wanda", "static"):
            gain = average("conditioned", keep) - average(arm, keep)
            found.append(limit(f"keep {keep}: nats over {arm}", gain, -LIMITS.get(keep, 0.0)))
        apart = average("conditioned", keep, "within") - average("conditioned", keep, "across")
        unseen = average("conditioned", keep, "unseen_wording") - average("Wanda", keep, "unseen_wording")
        cost = average("conditioned", keep, "swap_cost")
        found.append(limit(f"keep {keep}: less than 0 by what a swapped instruction costs", -cost, -0.3))
        found.append(limit(f"keep {keep}: less than 0 by the overlap within kinds over that across", -apart, -0.4))
        found.append(limit(f"keep {keep}: nats over Wanda with an unseen wording", unseen, 0.03))
    return found


def main() -> None:
    """Train all arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.33, 0.125])
    parser.add_argument("--parent-steps", type=int, default=PARENT_STEPS)
    parser.add_argument("--arm-steps", type=int, default=ARM_STEPS)
    parser.add_argument("--arms", nargs="+", default=["dense", "magnitude", "per_task"], help="beside those compared")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.monotonic(), []
    data = InstructionTasks(data_folder())
    for seed in given.seeds:
        bench = Bench(data, seed, given.parent_steps, given.arm_steps)
        if "dense" in given.arms:
            model = bench.fresh()
            bench.train_arm(model, "dense")
            rows.append(bench.row("dense", 1.0, model))
        for keep in given.keep:
            rows.append(predicted(bench, keep, OwnLayers(), "conditioned"))
            rows.append(fixed(bench, keep, wanda, "Wanda"))
            rows.append(predicted(bench, keep, Blind(), "static"))
            if "magnitude" in given.arms:
                rows.append(fixed(bench, keep, magnitude, "magnitude"))
            if "per_task" in given.arms:
                rows.append(per_task(bench, keep))
        write(rows, given, seconds=time.monotonic() - began)


def write(rows: Sequence[Mapping[str, object]], given: argparse.Namespace, *, seconds: float) -> None:
    """Print the table so far and write the result; a seed that was finished is not lost."""
    shown = ("loss", "unseen_wording", "swap_cost")
    print_table(
        ("seed", "arm", "keep", *shown),
        [(row["seed"], row["arm"], row["keep"], *(_shown(row, name) for name in shown)) for row in rows],
    )
    settings = {"batch": BATCH, "parent_steps": given.parent_steps, "arm_steps": given.arm_steps, "tasks": list(TASKS)}
    settings |= {"parent_rate": PARENT_RATE, "arm_rate": ARM_RATE, "seconds": round(seconds)}
    checked = limits(rows, given.keep)
    write_result("quality_instruction", seed=given.seeds[0], settings=settings, rows=rows, limits=checked)


def _shown(row: Mapping[str, object], name: str) -> str:
    value = row.get(name, math.nan)
    return "" if isinstance(value, float) and math.isnan(value) else f"{value:.3f}"


if __name__ == "__main__":
    main()
