"""Run a model on a few tokens, with units or blocks left out, to see whether two forms of it compute the same.

Shapes: N sequences, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.calibration import evaluating

__all__ = ["TOLERANCE", "decodes", "difference", "outputs", "probe_inputs", "skipping", "tolerance"]

# Largest difference of the outputs of two forms of a float32 model that are the same function, as a share of the
# largest output or of one. Cut and masked models add the same numbers in another order.
TOLERANCE = 1e-5


def probe_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return a small random batch of what the model reads: token ids or pixels.

    Raises:
        ValueError: if it reads something else.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        pixels = torch.randn(2, getattr(config, "num_channels", 3), *size, generator=generator)
        return {name: pixels.to(first.device, first.dtype)}
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    vocab = getattr(text, "vocab_size", None)
    if name != "input_ids" or not isinstance(vocab, int):
        raise ValueError(
            f"{type(model).__name__} reads {name!r}, for which no probe can be made up; pass `inputs`, a small batch "
            "of keyword arguments of its forward"
        )
    low = min(4, vocab - 1)
    return {"input_ids": torch.randint(low, vocab, (2, 6), generator=generator).to(first.device)}


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, or what else comes first, in evaluation mode."""
    with evaluating(model):
        result: Any = model(**inputs)
    if isinstance(result, Tensor):
        return result
    values = result.values() if isinstance(result, Mapping) else result
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


@torch.no_grad()
def decodes(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether the model generates two tokens with its cache."""
    generate: Any = getattr(model, "generate", None)
    if not callable(generate) or "input_ids" not in inputs:
        return False
    with evaluating(model):
        try:
            generate(
                inputs["input_ids"][:1],
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        except Exception:  # noqa: BLE001 - whatever a class raises, it does not decode
            return False
    return True


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value, or of one if that is smaller."""
    if got.shape != expected.shape:
        return float("inf")
    scale = max(1.0, float(expected.abs().max()))
    return float((got.double() - expected.double()).abs().max()) / scale


def tolerance(expected: Tensor) -> float:
    """Return the largest difference that rounding explains, for outputs of this precision."""
    return TOLERANCE if expected.dtype.itemsize >= 4 else 0.05


@contextmanager
def skipping(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks pass their input on unchanged."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        if isinstance(output, Tensor):
            return hidden
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        raise ValueError(f"{type(module).__name__} returns {type(output).__name__}, so it cannot be passed over")

    handles = [block.register_forward_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
