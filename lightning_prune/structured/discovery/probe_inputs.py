"""Make up what a model reads: tokens, more of them than any window it has, pixels, or an image among tokens.

Shapes: N sequences, T tokens, C channels, P patches.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structured.discovery.blueprint import Path, leaves, text_path
from lightning_prune.structured.discovery.probe import outputs

__all__ = ["probe_inputs", "probes", "spans", "with_few_answers"]

_NUM_TOKENS = 6
# What configurations call a span of tokens beyond which, or a number of tokens after which, a model does otherwise.
_SPANS = ("window", "chunk", "local", "block_size", "period", "stride", "interval", "kernel", "span")
_NO_SPANS = ("layers", "theta", "freq", "base")
_LONGEST = 16384  # tokens; longer spans are taken on trust
_NUM_ANSWERS = 64  # positions of a long text at which logits are compared, where the class can leave out the others


def probes(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> tuple[Mapping[str, Tensor], ...]:
    """Return the batches on which two forms of a model must agree: a short one, and one longer than any span it names.

    Args:
        model: that is to run them.
        inputs: the short one; made up if it is not given. Where it holds more than tokens, it is the only one.
    """
    short = probe_inputs(model) if inputs is None else inputs
    if inputs is not None and not inputs.keys() <= {"input_ids", "attention_mask"}:
        return (short,)
    length = _longest_span(model) + 2
    ids = short.get("input_ids")
    if ids is None or length <= ids.shape[-1]:
        return (short,)
    return (short, with_few_answers(model, _both_sides(model, _tokens(model, 1, length))))


def with_few_answers(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch that asks for logits at some places of a long text, where the class can leave out the others."""
    ids = batch.get("input_ids")
    has_choice = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if ids is None or ids.shape[-1] <= 4 * _NUM_ANSWERS or not has_choice:
        return dict(batch)
    places = torch.linspace(0, ids.shape[-1] - 1, _NUM_ANSWERS, device=ids.device).long()
    return {**batch, "logits_to_keep": places}


def probe_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return a small random batch of what the model reads: token ids, with an image if it takes one, or pixels.

    Raises:
        ValueError: if it reads something else.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "input_ids")
    first = next(model.parameters())
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        pixels = torch.randn(2, getattr(config, "num_channels", 3), *size, generator=torch.Generator().manual_seed(0))
        return {name: pixels.to(first.device, first.dtype)}
    if name != "input_ids" or not isinstance(getattr(_text_config(model), "vocab_size", None), int):
        raise ValueError(
            f"{type(model).__name__} reads {name!r}, for which no probe can be made up; pass `inputs`, a small batch "
            "of keyword arguments of its forward"
        )
    return _with_image(model) or _both_sides(model, _tokens(model, 2, _NUM_TOKENS))


def _both_sides(model: Any, ids_NT: Tensor) -> dict[str, Tensor]:
    """Return tokens for the encoder and, where there is one, for the decoder."""
    has_decoder = "decoder_input_ids" in inspect.signature(type(model).forward).parameters
    is_two_sided = has_decoder and bool(getattr(model.config, "is_encoder_decoder", False))
    return {"input_ids": ids_NT} | ({"decoder_input_ids": ids_NT} if is_two_sided else {})


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def _tokens(model: Any, num_rows: int, length: int) -> Tensor:
    """Return random ids that stand for no image, sound or mark."""
    vocab = _text_config(model).vocab_size
    values = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
    special = {
        token
        for path, value in leaves(values)
        if path[-1].endswith(("token_id", "token_index"))
        for token in (value if isinstance(value, list) else [value])
    }
    plain = [token for token in range(min(4, vocab - 1), vocab) if token not in special] or list(range(vocab))
    picks = torch.randint(0, len(plain), (num_rows, length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(plain)[picks].to(next(model.parameters()).device)


def spans(config: Any) -> dict[Path, int]:
    """Return the numbers of tokens that the configuration of the text part names as a span, by field."""
    text = text_path(config)
    return {
        path: value
        for path, value in leaves(config.to_dict() if hasattr(config, "to_dict") else {})
        if path[: len(text)] == text
        and any(word in path[-1] for word in _SPANS)
        and not any(word in path[-1] for word in _NO_SPANS)
        and isinstance(value, int)
        and not isinstance(value, bool)
        and value > 0
    }


def _longest_span(model: Any) -> int:
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    limit = limit - 2 if isinstance(limit, int) and limit > 2 else _LONGEST
    return max((min(value, limit, _LONGEST) for value in spans(model.config).values()), default=0)


@torch.no_grad()
def _with_image(model: Any) -> dict[str, Tensor] | None:
    """Return tokens with an image among them that the model looks at; None if it takes none that could be made up."""
    config = model.config
    mark = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    vision = getattr(config, "vision_config", None)
    if not isinstance(mark, int) or vision is None:
        return None
    plain = _tokens(model, 1, _NUM_TOKENS)
    start = getattr(config, "vision_start_token_id", None)
    for image in _images(vision, next(model.parameters())):
        try:
            marks = torch.full((1, _num_features(model, image)), mark, device=plain.device)
            lead = plain[:, :2] if start is None else torch.cat([plain[:, :1], torch.full_like(marks[:, :1], start)], 1)
            inputs = {"input_ids": torch.cat([lead, marks, plain[:, 2:]], dim=1), **image}
            if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == mark).long()
            seen = outputs(model, inputs)
            other = outputs(model, inputs | {"pixel_values": -image["pixel_values"]})
        except Exception:  # noqa: BLE001 - a class that takes images in another form refuses these in its own way
            continue
        if bool(seen.isfinite().all()) and not torch.equal(seen, other):
            return inputs
    return None


def _images(vision: Any, like: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield one image in each of the forms that classes take."""
    size = getattr(vision, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = next((getattr(vision, name) for name in ("num_channels", "in_channels") if hasattr(vision, name)), 3)
    patch, merge = getattr(vision, "patch_size", None), getattr(vision, "spatial_merge_size", 1)
    generator = torch.Generator().manual_seed(1)
    if isinstance(height, int) and isinstance(width, int):
        pixels_CHW = torch.randn(channels, height, width, generator=generator).to(like.device, like.dtype)
        sizes = {"image_sizes": torch.tensor([[height, width]], device=like.device)}
        yield {"pixel_values": pixels_CHW[None]}
        yield {"pixel_values": pixels_CHW[None], **sizes}
        yield {"pixel_values": pixels_CHW[None, None]}
        yield {"pixel_values": pixels_CHW[None, None], **sizes}
    if isinstance(patch, int):
        side = 2 * merge  # patches
        entries = channels * getattr(vision, "temporal_patch_size", 1) * patch**2
        pixels_PC = torch.randn(side**2, entries, generator=generator).to(like.device, like.dtype)
        yield {"pixel_values": pixels_PC, "image_grid_thw": torch.tensor([[1, side, side]], device=like.device)}


def _num_features(model: Any, image: Mapping[str, Tensor]) -> int:
    """Return how many places in the text an image takes."""
    getter = getattr(model, "get_image_features", None) or model.model.get_image_features
    found = getter(**image)
    found = getattr(found, "pooler_output", found)
    while isinstance(found, list | tuple) and isinstance(found[0], list | tuple):
        found = found[0]
    parts = [found] if isinstance(found, Tensor) else list(found)
    return sum(part.shape[:-1].numel() for part in parts)
