"""Torch-Pruning on feed-forward units, for a Llama in a process of its own with a time limit; optional.

Heads are left alone: with the residual stream kept, Torch-Pruning 1.6.0 stops with a shape error on a Llama whose
query heads outnumber its key/value heads.

Called as a script: python torch_pruning_peer.py REQUEST, a file written by `pruned_by_peer`.
"""

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TIME_LIMIT = 120


def peer_missing() -> str:
    """Return why the peer cannot run; nothing if it can."""
    return "" if importlib.util.find_spec("torch_pruning") else "torch_pruning is not installed"


def cut_ffn_with_peer(
    model: Any,
    names: Collection[str],
    share: float,
    *,
    inputs: Mapping[str, Tensor],
    round_to: int = 1,
    importance: str = "magnitude",
    batches: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Cut a share of feed-forward units in place, by Torch-Pruning.

    Args:
        model: in evaluation mode.
        names: the layers whose outputs are the units.
        share: of the units that go.
        inputs: a small batch, for the trace.
        round_to: widths that stay are multiples of it.
        importance: `magnitude` or `taylor`.
        batches: with labels, for Taylor.
    """
    import torch_pruning as tp

    kept = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    ignored = [m for name, m in model.named_modules() if isinstance(m, kept) and name not in names]
    scores = {"magnitude": tp.importance.GroupMagnitudeImportance(p=2), "taylor": tp.importance.GroupTaylorImportance()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=dict(inputs),
            importance=scores[importance],
            forward_fn=lambda module, values: module(**values)[0],
            pruning_ratio=share,
            ignored_layers=ignored,
            round_to=round_to,
        )
    for batch in batches if importance == "taylor" else ():
        model(**batch).loss.backward()
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad()


def pruned_by_peer(
    model: Any, ffn: float, round_to: int, importance: str, batches: Sequence[Mapping[str, Tensor]], folder: Path
) -> nn.Module:
    """Run the peer in another process and load what it saved.

    Raises:
        RuntimeError: if it fails or takes too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "dense")
    rows = list(batches)
    torch.save({"ffn": ffn, "round_to": round_to, "importance": importance, "batches": rows}, folder / "request.pt")
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(f"Torch-Pruning failed: {done.stderr.strip().splitlines()[-1]}")
    small: nn.Module = type(model).from_pretrained(folder / "pruned", dtype=torch.float32)
    return small


def main() -> None:
    """Prune what a request names."""
    from transformers import AutoModelForCausalLM

    folder = Path(sys.argv[1])
    request = torch.load(folder / "request.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    up = [name for name, _ in model.named_modules() if name.endswith(("gate_proj", "up_proj"))]
    inputs = {"input_ids": torch.arange(2, 18)[None]}
    cut_ffn_with_peer(model, up, request.pop("ffn"), inputs=inputs, **request)
    model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    model.save_pretrained(folder / "pruned")


if __name__ == "__main__":
    main()
