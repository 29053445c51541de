"""Memory that shrinking needs beside the model, and how long it takes to find what can be cut.

    OMP_NUM_THREADS=2 python benchmarks/shrink_memory.py

Both on random Llamas on the CPU: memory as the resident bytes of the process, sampled while half of the FFN is cut
with `consume`, against the bytes of one block; time as wall time of `discover` on 1.1 B parameters.
"""

import gc
import threading
import time
from pathlib import Path

import torch
from measure import limit, print_table, random_llama, seconds, spread, write_result
from torch import nn

from lightning_prune.structured import Cut, Plan, discover, shrink

SEED = 0
ROUNDS = 3


def resident_bytes() -> int:
    """Return the bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def num_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def peak_beyond_model() -> dict[str, float]:
    """Cut half of the FFN units; return bytes of the model, of a block, and the peak beyond what was held before."""
    model = random_llama(width=1024, ffn=2816, num_layers=16, num_heads=16, vocab=8000, seed=SEED).eval()
    structure = discover(model, kinds=("ffn",))
    plan = Plan(tuple(Cut(g.key, tuple(range(0, g.num_units, 2))) for g in structure.of_kind("ffn")))
    sizes = {"model": float(num_bytes(model)), "block": float(num_bytes(model.get_submodule("model.layers.0")))}
    gc.collect()
    before, highest, is_done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            highest[0] = max(highest[0], resident_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    shrink(model, plan, structure=structure, consume=True)
    is_done.set()
    watcher.join()
    return sizes | {"peak beyond model": float(highest[0] - before)}


def main() -> None:
    """Measure both, print, write."""
    memory = peak_beyond_model()
    model = random_llama(width=2048, ffn=5632, num_layers=22, num_heads=32, vocab=32000, seed=SEED).eval()
    taken = spread([seconds(lambda: discover(model)) for _ in range(ROUNDS)])
    only_ffn = spread([seconds(lambda: discover(model, kinds=("ffn",))) for _ in range(ROUNDS)])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print_table(("what", "value"), [(name, f"{value / 1e6:.1f} MB") for name, value in memory.items()])
    print_table(("what", "seconds"), [("discover, all kinds", taken["median"]), ("discover, FFN", only_ffn["median"])])
    write_result(
        "shrink_memory",
        seed=SEED,
        settings={"threads": torch.get_num_threads(), "parameters of the timed model": parameters, "rounds": ROUNDS},
        rows=[{"bytes": memory}, {"discover_s": taken, "discover_ffn_s": only_ffn}],
        limits=[
            limit("peak beyond the model / one block", memory["peak beyond model"] / memory["block"], 1.0),
            limit("seconds to discover all kinds of a 1.1 B model", taken["median"], 5.0),
            limit("seconds to discover the FFN of a 1.1 B model", only_ffn["median"], 5.0),
        ],
    )


if __name__ == "__main__":
    main()
