"""What `quality_instruction.py` compares: parents, and the arms that go on from one with the same batches and steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from instruction_tasks import TASKS, InstructionTasks, Shape
from measure import data_folder
from torch import Tensor, nn
from tqdm import trange
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_prune.conditional.instruction import Instruction, InstructionCondition, Predictor, Start
from lightning_prune.integrations.instruction.record import num_activated
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.collapse import overlap
from lightning_prune.predictors.encoder import Blind, Encoder, OwnLayers
from lightning_prune.predictors.prompt import Reads
from lightning_prune.predictors.soft_top_k import kept
from lightning_prune.predictors.unit_importance import UnitImportance
from lightning_prune.predictors.unit_masks import reader_of
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.structure import Stack

BATCH = 16
ARM_RATE = 1e-3
HEAD_TIMES = Instruction.rate  # of the rate, for predictors
NUM_HELD_OUT = 32  # sequences of each kind
NUM_MEASURED = 16  # batches from which masks are made
Batch = Mapping[str, Tensor]
Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The model that every arm goes on from.

    Args:
        name: in the table.
        steps: of its training on the eight kinds of text.
        rate: of that training.
        sizes: of a Llama with random weights; those of the folder's model without them.
        folder: of a model that is trained already, below `models` of the test data.
    """

    name: str
    steps: int
    rate: float
    sizes: tuple[tuple[str, int], ...] = ()
    folder: str = ""

    def data(self) -> InstructionTasks:
        """Return the texts as this parent's tokens."""
        if not self.folder:
            return InstructionTasks(data_folder())
        tokenizer = AutoTokenizer.from_pretrained(data_folder() / "models" / self.folder).backend_tokenizer
        return InstructionTasks(data_folder(), Shape(vocab_size=tokenizer.get_vocab_size()), tokenizer)

    def build(self, seed: int, shape: Shape) -> LlamaForCausalLM:
        """Return the model before its training here."""
        if self.folder:
            return LlamaForCausalLM.from_pretrained(data_folder() / "models" / self.folder, dtype=torch.float32)
        other = {"max_position_embeddings": shape.length, "tie_word_embeddings": True, "use_cache": False}
        return random_llama(LlamaConfig(vocab_size=shape.vocab_size, **dict(self.sizes), **other), seed)


_SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
_LARGE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
PARENTS = (
    Parent(
        name="0.7M",
        steps=1000,
        rate=4e-3,
        sizes=tuple((_SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}).items()),
    ),
    Parent(
        name="3.4M",
        steps=1000,
        rate=3e-3,
        sizes=tuple((_LARGE | {"num_attention_heads": 8, "num_key_value_heads": 4}).items()),
    ),
    Parent(name="stories3M", steps=500, rate=1e-3, folder="stories3M"),
)


def random_llama(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


class Bench:
    """One trained parent and the arms that go on from it."""

    def __init__(
        self, parent: Parent, data: InstructionTasks, seed: int, arm_steps: int, store: Path | None = None
    ) -> None:
        self.parent, self.data, self.seed, self.arm_steps = parent, data, seed, arm_steps
        self.held_out = {task: data.held_out(task, NUM_HELD_OUT) for task in TASKS}
        self.unseen = {task: data.held_out(task, NUM_HELD_OUT, wording=3) for task in TASKS}
        model = parent.build(seed, data.shape)
        self.config = model.config
        file = None if store is None else store / f"{parent.name}_{parent.steps}_{seed}.pt"
        if file is not None and file.exists():
            self._weights = torch.load(file, weights_only=True)
            return
        self.train_parent(model, "parent")
        self._weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._weights, file)

    def fresh(self) -> LlamaForCausalLM:
        """Return a copy of the parent."""
        model = random_llama(self.config, self.seed)
        model.load_state_dict(self._weights)
        return model

    def small(self, num_units: int) -> LlamaForCausalLM:
        """Return a model with random weights and so many FFN units in each block."""
        return random_llama(type(self.config)(**{**self.config.to_dict(), "intermediate_size": num_units}), self.seed)

    def num_units(self, keep: float) -> int:
        """Return how many FFN units of each block stay."""
        return Budget(keep=keep).numbers(discover(self.fresh(), kinds=["ffn"]).of_kind("ffn"))[0]

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

    def train_parent(self, model: nn.Module, title: str) -> None:
        """Train with the batches, rate and steps of the parent."""
        self._train(model, self.parent.steps, self.parent.rate, first=0, title=title)

    def train_arm(
        self, model: nn.Module, title: str, after_step: Callable[[], None] = lambda: None, rate: float = ARM_RATE
    ) -> None:
        """Go on from the parent, with the same batches for every arm."""
        self._train(model, self.arm_steps, rate, first=self.parent.steps, title=title, after_step=after_step)

    def measured_batches(self) -> list[Batch]:
        """Return training batches that no arm trains on."""
        return [self.data.train(self.seed + 1000, number, BATCH) for number in range(NUM_MEASURED)]

    def row(self, model: nn.Module, num_activated: int, **more: float) -> Row:
        """Return what is measured of a trained arm."""
        by_task = losses(model, self.held_out)
        found = {
            "num_activated": num_activated,
            "loss": mean(by_task),
            "unseen_wording": mean(losses(model, self.unseen)),
        }
        return found | more | {"by_task": by_task}


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


def activated(condition: InstructionCondition) -> int:
    """Return how many parameters compute for one instruction."""
    return num_activated(condition.model, condition.predictor.units.groups, condition.predictor.keep)


def dense(bench: Bench, keep: float) -> Row:
    """Train the parent on, with all its units."""
    model = bench.fresh()
    bench.train_arm(model, "dense")
    return bench.row(model, model.num_parameters())


def dense_small(bench: Bench, keep: float) -> Row:
    """Train a model of the small size from random weights, with the arm's batches and the parent's rate."""
    model = bench.small(bench.num_units(keep))
    bench.train_arm(model, f"dense small {keep}", rate=bench.parent.rate)
    return bench.row(model, model.num_parameters())


def dense_small_long(bench: Bench, keep: float) -> Row:
    """Train a model of the small size from random weights as the parent was, then as the arms are."""
    model = bench.small(bench.num_units(keep))
    bench.train_parent(model, f"dense small {keep}, as the parent")
    bench.train_arm(model, f"dense small {keep}, as the arms")
    return bench.row(model, model.num_parameters())


def predicted(bench: Bench, keep: float, encoder: Encoder) -> Row:
    """Train a predictor with the model and measure both."""
    model = bench.fresh()
    condition = insert(model, keep, encoder, start=Start())
    condition.begin(total_steps=bench.arm_steps)
    condition.warm_start(bench.measured_batches())
    bench.train_arm(model, f"{type(encoder).__name__} {keep}", condition.after_step)
    within, across = shared_units(condition, bench.held_out)
    mixed = {name: torch.cat([batch[name][:4] for batch in bench.held_out.values()]) for name in bench.held_out["wiki"]}
    found = condition.measure(mixed)
    return bench.row(model, activated(condition), swap_cost=found.swap_cost, within=within, across=across)


def conditioned(bench: Bench, keep: float) -> Row:
    """Train a predictor that reads the instruction."""
    return predicted(bench, keep, OwnLayers())


def static(bench: Bench, keep: float) -> Row:
    """Train a predictor that reads nothing."""
    return predicted(bench, keep, Blind())


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
def wanda_scores(condition: InstructionCondition, batches: Sequence[Batch]) -> list[Tensor]:
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


def taylor_scores(condition: InstructionCondition, batches: Sequence[Batch]) -> list[Tensor]:
    """Return what leaving out each unit would change to first order: the size of the loss's slope by its mask.

    Summed over sequences. Source: Michel et al., arXiv 1905.10650, equation 2, for units instead of heads.
    """
    condition.model.eval()
    groups = condition.predictor.units.groups
    total = [torch.zeros(group.num_units) for group in groups]
    for batch in batches:
        masks = [torch.ones(len(batch["input_ids"]), group.num_units, requires_grad=True) for group in groups]
        with condition.fixed(masks):
            slopes = torch.autograd.grad(condition.model(**batch).loss, masks)
        total = [a + slope.abs().sum(0) for a, slope in zip(total, slopes, strict=True)]
    return total


def magnitude_scores(condition: InstructionCondition, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the norm of the weights that read each unit."""
    groups = condition.predictor.units.groups
    return [reader_of(condition.model, group.readers[0])[1].detach().square().sum(0) for group in groups]


def _masks(condition: InstructionCondition, scores: Sequence[Tensor]) -> list[Tensor]:
    return [kept(one[None], k).float() for one, k in zip(scores, condition.predictor.keep, strict=True)]


def fixed(bench: Bench, keep: float, rate: Callable[..., list[Tensor]]) -> Row:
    """Train the model under one mask."""
    model = bench.fresh()
    condition = insert(model, keep, Blind(), start=None)
    with condition.fixed(_masks(condition, rate(condition, bench.measured_batches()))):
        untrained = mean(losses(model, bench.held_out))
        bench.train_arm(model, f"{rate.__name__} {keep}")
        return bench.row(model, activated(condition), untrained=untrained)


def wanda(bench: Bench, keep: float) -> Row:
    """Train under one mask by Wanda."""
    return fixed(bench, keep, wanda_scores)


def taylor(bench: Bench, keep: float) -> Row:
    """Train under one mask by first-order importance."""
    return fixed(bench, keep, taylor_scores)


def magnitude(bench: Bench, keep: float) -> Row:
    """Train under one mask by the norms of the weights."""
    return fixed(bench, keep, magnitude_scores)


def per_task(bench: Bench, keep: float) -> Row:
    """Measure one Wanda mask per kind of text, without any training."""
    model = bench.fresh()
    condition = insert(model, keep, Blind(), start=None)
    found = {}
    for task, batch in bench.held_out.items():
        scores = wanda_scores(condition, [bench.data.of_task(task, bench.seed, NUM_HELD_OUT)])
        with condition.fixed(_masks(condition, scores)):
            found[task] = losses(model, {task: batch})[task]
    return {"num_activated": activated(condition), "loss": mean(found), "by_task": found}


ARMS: Mapping[str, Callable[[Bench, float], Row]] = {
    "dense": dense,
    "conditioned": conditioned,
    "Wanda": wanda,
    "static": static,
    "Taylor": taylor,
    "magnitude": magnitude,
    "dense small": dense_small,
    "dense small, parent's steps too": dense_small_long,
    "Wanda per task, untrained": per_task,
}
