"""Masks of two trained Llamas against formulas written here anew, with plain torch and numpy and none of our code.

The references follow the papers' released code: a stable sort decides, ties go to the lowest index, and Wanda replays
the model block by block: catch the inputs of block 0, observe a block, prune it, run it again for the next.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from lightning_prune import NM, Once, Sparsifier, Targets
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.wanda import Wanda

DATA = os.environ.get("LIGHTNING_PRUNE_DATA", "")
pytestmark = pytest.mark.skipif(not DATA, reason="LIGHTNING_PRUNE_DATA names no folder with the trained models")

Keep = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module", params=["stories260K", "stories3M"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(DATA) / "models" / request.param


@pytest.fixture(scope="module")
def batches(folder: Path) -> list[dict[str, Tensor]]:
    """Return three batches of two windows of 48 tokens of stories."""
    text = (Path(DATA) / "text" / "tinystories_v1_valid.txt").read_text(encoding="utf-8")[:4000]
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: 6 * 48]
    return [{"input_ids": part} for part in torch.tensor(ids).reshape(3, 2, 48)]


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def row(score: np.ndarray, num_pruned_of: Callable[[int], int]) -> np.ndarray:
    """Keep all but the lowest of every row."""
    order = np.argsort(-score, axis=1, kind="stable")
    keep = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(keep, order[:, : score.shape[1] - num_pruned_of(score.shape[1])], True, axis=1)
    return keep


def half(count: int) -> int:
    return count // 2


def keep_row(score: np.ndarray) -> np.ndarray:
    return row(score, half)


def keep_tensor(score: np.ndarray) -> np.ndarray:
    return row(score.reshape(1, -1), half).reshape(score.shape)


def keep_groups(n: int, m: int) -> Keep:
    return lambda score: row(score.reshape(-1, m), lambda _: m - n).reshape(score.shape)


def keep_global(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    keep = row(np.concatenate([score.reshape(-1) for score in scores.values()])[None], half)[0]
    parts = np.split(keep, np.cumsum([score.size for score in scores.values()])[:-1])
    return {name: part.reshape(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)}


class CaughtError(Exception):
    """Raised instead of running block 0."""


def inputs_of_block_0(model: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return hidden states and keyword arguments that block 0 is called with."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise CaughtError

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        with pytest.raises(CaughtError):
            model(**batch, use_cache=False)
    handle.remove()
    return caught


def scores_of_block(block: nn.Module, inputs: list[tuple[Tensor, dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Return |W| times the norm of the inputs seen, in float32, of all linear layers of a block."""
    squares = {name: np.zeros(layer.in_features) for name, layer in linears(block).items()}

    def observe(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[name] += (args[0].numpy().reshape(-1, args[0].shape[-1]) ** 2).sum(0, dtype=np.float64)

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in linears(block).items()]
    for hidden, kwargs in inputs:
        block(hidden, **kwargs)
    for handle in handles:
        handle.remove()
    return {
        name: np.abs(layer.weight.numpy()) * np.sqrt(squares[name]).astype(np.float32)
        for name, layer in linears(block).items()
    }


@torch.no_grad()
def wanda_masks(
    model: LlamaForCausalLM, batches: list[dict[str, Tensor]], keep: Keep, skip: str
) -> dict[str, np.ndarray]:
    """Prune a model as locuslab/wanda does and return the masks."""
    model.requires_grad_(False)
    masks = {}
    inputs = inputs_of_block_0(model, batches)
    for index, block in enumerate(model.model.layers):
        for name, score in scores_of_block(block, inputs).items():
            if not name.endswith(skip or " "):
                mask = keep(score)
                linears(block)[name].weight[torch.from_numpy(~mask)] = 0
                masks[f"model.layers.{index}.{name}.weight"] = mask
        outputs = [block(hidden, **kwargs) for hidden, kwargs in inputs]
        hidden_states = [output if isinstance(output, Tensor) else output[0] for output in outputs]
        inputs = [(hidden, kwargs) for hidden, (_, kwargs) in zip(hidden_states, inputs, strict=True)]
    return masks


@torch.no_grad()
def dense_wanda_scores(model: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return the scores under the inputs of the dense model."""
    model.requires_grad_(False)
    scores = {}
    inputs = inputs_of_block_0(model, batches)
    for index, block in enumerate(model.model.layers):
        found = scores_of_block(block, inputs)
        scores |= {f"model.layers.{index}.{name}.weight": score for name, score in found.items()}
        inputs = [(block(hidden, **kwargs), kwargs) for hidden, kwargs in inputs]
    return scores


def check(conductor: Sparsifier, expected: dict[str, np.ndarray]) -> None:
    assert list(conductor.masks) == list(expected)
    differing = {
        name: int((conductor.masks[name].numpy() != mask).sum())
        for name, mask in expected.items()
        if not np.array_equal(conductor.masks[name].numpy(), mask)
    }
    assert differing == {}


def sparsifier(scorer: Any, nm: tuple[int, int] | None, skip: str) -> Sparsifier:
    parts: dict[str, Any] = {"granularity": NM(n=nm[0], m=nm[1])} if nm else {}
    exclude = (f"*.{skip}.weight",) if skip else ()
    return Sparsifier(schedule=Once(sparsity=0.5), scorer=scorer, targets=Targets(exclude=exclude), **parts)


PATTERNS = [
    pytest.param("row", None, keep_row, id="row"),
    pytest.param("tensor", None, keep_tensor, id="tensor"),
    pytest.param("row", (2, 4), keep_groups(2, 4), id="2:4"),
    pytest.param("row", (4, 8), keep_groups(4, 8), id="4:8"),
]


def left_out(folder: Path, nm: tuple[int, int] | None) -> str:
    """Return the layer whose 172 inputs 8 does not divide."""
    return "down_proj" if nm == (4, 8) and folder.name == "stories260K" else ""


@pytest.mark.parametrize(("scope", "nm", "keep"), PATTERNS)
def test_wanda_block_by_block(
    folder: Path, batches: list[dict[str, Tensor]], scope: Any, nm: tuple[int, int] | None, keep: Keep
) -> None:
    skip = left_out(folder, nm)
    conductor = sparsifier(Wanda(scope=scope), nm, skip)
    conductor.prune_once(load(folder), batches, progress=False)
    check(conductor, wanda_masks(load(folder), batches, keep, skip))


def test_wanda_ranked_over_all_targets(folder: Path, batches: list[dict[str, Tensor]]) -> None:
    conductor = sparsifier(Wanda(scope="global"), None, "")
    conductor.prune_once(load(folder), batches, progress=False)
    check(conductor, keep_global(dense_wanda_scores(load(folder), batches)))


def magnitudes(model: LlamaForCausalLM, skip: str) -> dict[str, np.ndarray]:
    return {
        f"model.layers.{index}.{name}.weight": np.abs(layer.weight.detach().numpy())
        for index, block in enumerate(model.model.layers)
        for name, layer in linears(block).items()
        if not name.endswith(skip or " ")
    }


@pytest.mark.parametrize(("scope", "nm", "keep"), PATTERNS)
def test_magnitude(folder: Path, scope: Any, nm: tuple[int, int] | None, keep: Keep) -> None:
    skip = left_out(folder, nm)
    model = load(folder)
    expected = {name: keep(score) for name, score in magnitudes(model, skip).items()}
    conductor = sparsifier(Magnitude(scope=scope), nm, skip)
    conductor.prune_once(model, progress=False)
    check(conductor, expected)


def test_magnitude_ranked_over_all_targets(folder: Path) -> None:
    model = load(folder)
    expected = keep_global(magnitudes(model, ""))
    conductor = sparsifier(Magnitude(scope="global"), None, "")
    conductor.prune_once(model, progress=False)
    check(conductor, expected)


def test_a_width_that_m_does_not_divide_is_refused_by_name() -> None:
    model = load(Path(DATA) / "models" / "stories260K")
    message = r"4:8 needs an input dimension that 8 divides; model\.layers\.0\.mlp\.down_proj\.weight has 172; exclude"
    with pytest.raises(ValueError, match=message):
        sparsifier(Magnitude(), (4, 8), "").prune_once(model, progress=False)
    assert all(bool(block.mlp.down_proj.weight.all()) for block in model.model.layers)
