"""What recovery costs in a training step: masked LoRA beside PEFT's own, distillation beside its two halves.

    LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/recovery_overhead.py

All variants train in one process and take turns step by step, in an order that rotates; every ratio compares steps of
the same turn, and "again" is a second one of the same kind, which shows the noise. On one thread the ratio is one of
processor time, which other programs do not inflate; both times are written.

LoRA: the same half-sparse model, adapters on all linear layers of the blocks, AdamW over the adapters. Distillation:
the dense parent teaches a student that is trained whole; it is held against a student's step plus a forward pass of the
teacher in the same turn. Cached: the teacher's likeliest tokens are read from disk, written on the first pass.

Memory, measured apart: "saved" are the bytes that autograd holds between forward and backward pass, parameters left
out, each storage once; "peak" the largest sum of what torch's operations make in one step.
"""

import argparse
import copy
import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import (
    PeakBytes,
    limit,
    load_story_model,
    print_table,
    random_batches,
    random_llama,
    spread,
    write_result,
)
from peft import LoraConfig, get_peft_model
from step_overhead import take_turns
from torch import Tensor, nn
from training import Variant

from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.integrations.lora.peft_layers import LoraForm
from lightning_prune.integrations.lora.peft_lora import add_lora
from lightning_prune.recovery.distill import Distill, Distiller
from lightning_prune.schedules import Once
from lightning_prune.targets.targets import Targets

SPARSITY = 0.5
TOP_K = 100  # arXiv 2407.14679: fewer cost quality
LORA = {"r": 16, "lora_alpha": 32}  # PERP's
Batch = Mapping[str, Tensor]
LORAS = ("plain LoRA", "plain LoRA again", "MaskLoRA", "ScaleLoRA")
STUDENTS = ("student", "student again", "teacher forward", "distillation", "distillation, cached logits")


@dataclass
class Training(Variant):
    """A training under autocast, where a dtype is given."""

    autocast: torch.dtype | None = None

    def step(self) -> None:
        """Run forward, backward and the optimizer once."""
        batch = self.batches[self.num_steps % len(self.batches)]
        with self.precision(batch):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1

    def precision(self, batch: Batch) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(batch["input_ids"].device.type, self.autocast, enabled=self.autocast is not None)


class TeacherPass(Training):
    """A forward pass of the teacher alone."""

    @torch.no_grad()
    def step(self) -> None:
        """Run forward once."""
        self.model(input_ids=self.batches[self.num_steps % len(self.batches)]["input_ids"])
        self.num_steps += 1


@dataclass(frozen=True, eq=False)
class Setting:
    """A dense model on its device, and the batches that all variants read."""

    dense: nn.Module
    batches: Sequence[Batch]
    cache_dir: Path
    autocast: torch.dtype | None = None

    def pruned(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Return a copy of which half is zero, and its masks."""
        model = copy.deepcopy(self.dense)
        pruner = Sparsifier(schedule=Once(sparsity=SPARSITY))
        pruner.prune_once(model, progress=False)
        return model, dict(pruner.masks)

    def lora(self, form: LoraForm | None) -> Training:
        """Return a LoRA training; without a form, that of PEFT untouched."""
        model, masks = self.pruned()
        if form is None:
            names = [binding.name.removesuffix(".weight") for binding in Targets().resolve(model)]
            options: Any = {**LORA, "target_modules": names, "task_type": "CAUSAL_LM"}
            wrapped: nn.Module = get_peft_model(model, LoraConfig(**options))  # type: ignore[arg-type]
        else:
            wrapped = add_lora(model, form=form, config=LORA, masks=masks)
        return self._training(wrapped)

    def student(self, distill: Distill | None = None) -> Training:
        """Return a training of the whole model, by its own loss or a teacher's."""
        model, _ = self.pruned()
        variant = self._training(model)
        if distill is not None:
            distiller = Distiller(distill, teacher=self.dense)
            distiller.attach(model, replace_loss=True)
            variant.extras.append(distiller)
        return variant

    def variants(self) -> dict[str, Callable[[], Training]]:
        """Return what starts each training, by its name."""
        cached = Distill(top_k=TOP_K, cache_dir=str(self.cache_dir))
        return {
            "plain LoRA": lambda: self.lora(None),
            "plain LoRA again": lambda: self.lora(None),
            "MaskLoRA": lambda: self.lora("masked"),
            "ScaleLoRA": lambda: self.lora("scaled"),
            "student": self.student,
            "student again": self.student,
            "teacher forward": lambda: TeacherPass(self.dense.eval(), torch.optim.SGD([torch.zeros(1)]), self.batches),
            "distillation": lambda: self.student(Distill()),
            "distillation, cached logits": lambda: self.student(cached),
        }

    def _training(self, model: nn.Module) -> Training:
        parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        return Training(model, optimizer, self.batches, autocast=self.autocast)


def saved_mb(variant: Training) -> float:
    """Return the megabytes that autograd holds after a forward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in variant.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = variant.batches[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), variant.precision(batch):
        output = variant.model(**batch)
    del output
    return round(sum(saved.values()) / 1e6, 2)


def peak_mb(variant: Training) -> float:
    """Return the megabytes that one step makes at most at a time."""
    with PeakBytes() as peak:
        variant.step()
    return round(peak.peak / 1e6, 2)


def ratios(times: Mapping[str, Sequence[tuple[float, float]]], over: Sequence[str], clock: int) -> dict[str, Any]:
    """Return every variant's time over the sum of some others', turn by turn."""
    base = [sum(times[name][turn][clock] for name in over) for turn in range(len(times[over[0]]))]
    return {
        name: spread([value[clock] / total for value, total in zip(values, base, strict=True)])
        for name, values in times.items()
    }


def measure_group(
    setting: Setting, names: Sequence[str], *, rounds: int, clock: int, peak: Callable[[Training], float] = peak_mb
) -> list[dict[str, Any]]:
    """Return a row per variant, in ratio to the first one.

    Args:
        setting: what they train on.
        names: of variants that take turns.
        rounds: steps of each that count.
        clock: which time the ratios compare, 0 for wall and 1 for processor time; the other's are written beside.
        peak: measures the memory of a step.
    """
    gc.collect()  # the group before holds itself in cycles
    make = setting.variants()
    variants = {name: make[name]() for name in names}
    for _ in setting.batches:  # the first pass over all batches writes the cache
        for variant in variants.values():
            variant.step()
    times = take_turns(dict(variants), rounds)
    found, other = (ratios(times, names[:1], which) for which in (clock, 1 - clock))
    rows = []
    for name in names:
        row: dict[str, Any] = {"variant": name, "seconds": spread([value[0] for value in times[name]])}
        row |= {"ratio_to": names[0], "ratio": found[name], "ratio_of_other_clock": other[name]}
        if not isinstance(variants[name], TeacherPass):
            row |= {"saved_mb": saved_mb(variants[name]), "peak_mb": peak(variants[name])}
        if name == "distillation":
            row["ratio_to_student_and_teacher"] = ratios(times, ["student", "teacher forward"], clock)[name]
        rows.append(row)
    return rows


def limits_of(label: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Compare with what was promised, as far as the rows go."""
    row_of = {row["variant"]: row for row in rows}
    promised = (
        ("MaskLoRA", "ratio", "MaskLoRA step / PEFT LoRA step", 1.3),
        ("ScaleLoRA", "ratio", "ScaleLoRA step / PEFT LoRA step", 1.3),
        (
            "distillation",
            "ratio_to_student_and_teacher",
            "distillation step / (student step + teacher forward)",
            1.05,
        ),
        ("distillation, cached logits", "ratio", "cached distillation step / student step", 1.1),
    )
    return [
        limit(f"{label}: {words}", row_of[name][key]["median"], at_most)
        for name, key, words, at_most in promised
        if name in row_of
    ]


def disk_bytes_per_token(setting: Setting) -> float:
    """Return what the cache holds on disk per token of the batches."""
    total = sum(path.stat().st_size for path in setting.cache_dir.rglob("*") if path.is_file())
    return round(total / sum(batch["input_ids"].numel() for batch in setting.batches), 2)


def show(rows: Sequence[dict]) -> None:
    """Print the table."""
    cells = [
        [
            f"{row['model']}, {row['variant']}",
            f"{1000 * row['seconds']['median']:.1f}",
            f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['low']:.3f}-{row['ratio']['high']:.3f}",
            row["ratio_to"],
            row.get("saved_mb", ""),
            row.get("peak_mb", ""),
        ]
        for row in rows
    ]
    print_table(("variant", "ms a step", "ratio", "quartiles", "to", "saved MB", "peak MB"), cells)


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """Return what the result file says beside its rows."""
    return {
        "batch": f"{args.size} sequences of {args.length} tokens of random text",
        "optimizer": "torch.optim.AdamW, fused, over what is trained",
        "lora": f"rank {LORA['r']}, alpha {LORA['lora_alpha']}, all linear layers in the blocks",
        "distillation": f"forward KL, whole vocabulary; cached: the {TOP_K} likeliest tokens",
        "sparsity": SPARSITY,
        "rounds": args.rounds,
    }


def large(seed: int) -> nn.Module:
    """Return a random Llama of 91 M parameters."""
    return random_llama(width=768, ffn=2048, num_layers=12, num_heads=12, vocab=8192, seed=seed)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="a random Llama of 91 M parameters as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = 1 if args.threads == 1 else 0
    models: dict[str, Callable[[], nn.Module]] = {"stories3M": lambda: load_story_model("stories3M")[0]}
    models |= {"random 91 M": lambda: large(args.seed)} if args.large else {}
    rows: list[dict[str, Any]] = []
    limits: list[dict[str, object]] = []
    notes: list[str] = []
    for label, load in models.items():
        dense: Any = load()
        vocab = dense.config.vocab_size
        batches = random_batches(num=2, size=args.size, length=args.length, vocab=vocab, seed=args.seed)
        with tempfile.TemporaryDirectory() as scratch:
            setting = Setting(dense, batches, Path(scratch))
            found = []
            for names in (LORAS, STUDENTS):
                found += measure_group(setting, names, rounds=args.rounds, clock=clock)
            notes.append(f"{label}: cached logits take {disk_bytes_per_token(setting)} bytes per token on disk")
        rows += [{"model": label, **row} for row in found]
        limits += limits_of(label, found)
    show(rows)
    print("\n".join(notes))
    settings = {**settings_of(args), "dtype": "float32", "ratio": ("of wall time", "of processor time")[clock]}
    write_result("recovery_overhead", seed=args.seed, settings=settings, rows=rows, limits=limits, notes=notes)


if __name__ == "__main__":
    main()
