"""What every benchmark here shares: the machine in words, ratios and medians, live memory, models, the result file.

A result file holds the machine, the versions, the seed, the settings, the rows of the printed table and, where a limit
was promised, whether it was met.
"""

import gc
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from lightning_prune.base.whole_file import written_aside

disable_progress_bar()

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("lightning_prune", "torch", "lightning", "transformers")


def machine() -> dict[str, object]:
    """Describe processor, memory and accelerator without naming the machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    described: dict[str, object] = {
        "processor": name,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "accelerator": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["accelerator"] = properties.name
        described["accelerator_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return described


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "from source"
    return found


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def processor_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall time and processor time of one call; with one thread, other work does not inflate the second."""
    start = time.process_time()
    wall = seconds(work)
    return wall, time.process_time() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles; for fewer than four values the extremes stand for the quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 3 else (min(values), 0.0, max(values))
    return {
        "median": round(statistics.median(values), 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "n": len(values),
    }


def limit(name: str, measured: float, at_most: float) -> dict[str, object]:
    """Return one promise and whether it was kept."""
    return {"name": name, "measured": round(measured, 4), "at_most": at_most, "is_met": measured <= at_most}


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their head, first column to the left."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[idx]) for row in cells) for idx in range(len(head))]
    for idx, row in enumerate(cells):
        first, *rest = (
            cell.ljust(w) if pos == 0 else cell.rjust(w) for pos, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]), flush=True)
        if idx == 0:
            print("-" * (sum(widths) + 2 * (len(widths) - 1)))


def write_result(
    name: str,
    *,
    seed: int,
    settings: Mapping[str, object],
    rows: Sequence[Mapping[str, object]],
    limits: Sequence[Mapping[str, object]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write results/<name>.json and print which limits were met."""
    record = {
        "benchmark": name,
        "machine": machine(),
        "versions": versions(),
        "seed": seed,
        "settings": dict(settings),
        "rows": list(rows),
        "limits": list(limits),
        "notes": list(notes),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with written_aside(path) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for item in limits:
        word = "met" if item["is_met"] else "MISSED"
        print(f"{word}: {item['name']}: {item['measured']} (at most {item['at_most']})")
    print(f"wrote {path.parent.name}/{path.name}")


def data_folder() -> Path:
    """Return the folder of models and texts; leave with one line if it is not set."""
    folder = os.environ.get("LIGHTNING_PRUNE_DATA")
    if not folder or not Path(folder).is_dir():
        sys.exit("set LIGHTNING_PRUNE_DATA to a folder with models/stories3M and text/tinystories_v1_train.txt")
    return Path(folder)


def load_story_model(name: str) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """Return a trained story model in float32 and its tokenizer as a function, without special tokens."""
    folder = data_folder() / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def random_llama(*, width: int, ffn: int, num_layers: int, num_heads: int, vocab: int, seed: int) -> nn.Module:
    """Return a Llama with random weights and tied embeddings, in training mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def random_batches(*, num: int, size: int, length: int, vocab: int, seed: int) -> list[dict[str, Tensor]]:
    """Return batches of random tokens with labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(vocab, (size, length), generator=generator) for _ in range(num)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch."""
    return {key: value.to(device) for key, value in batch.items()}


def block_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers inside the repeated blocks, by the name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}."
    }


def live_bytes() -> int:
    """Count the bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and item.layout is torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if item.is_leaf and item.grad is not None:
                grad = item.grad.untyped_storage()
                storages[grad.data_ptr()] = grad.nbytes()
    return sum(storages.values())


class PeakBytes(TorchDispatchMode):
    """Tracks the bytes of tensors made by torch operations inside the context, freed ones left out again.

    What an operation uses inside itself and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operation and count the storages that are new."""
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen and storage._cdata not in given:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result
