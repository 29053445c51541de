"""Choose the few parameters that are trained after pruning: biases, norms, head, embeddings.

Source: Zimmer et al., PERP, arXiv 2312.15230: retraining biases and norms, well under one percent of the parameters,
    wins back most of what pruning cost; the head and the embeddings can be added.
Cost: gradients and optimizer state for the chosen parameters alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from lightning_prune.targets.targets import is_linear

__all__ = ["Part", "Trainable", "choose_trainable", "count_trainable", "parameters_of_part"]

Part = Literal["biases", "norms", "head", "embeddings", "all"]


@dataclass(frozen=True)
class Trainable:
    """How much of a model is trained."""

    num_trainable: int
    num_parameters: int

    @property
    def share(self) -> float:
        """Trainable over all parameters, in [0, 1]."""
        return self.num_trainable / self.num_parameters if self.num_parameters else 0.0

    def __str__(self) -> str:
        return f"{self.num_trainable:,} of {self.num_parameters:,} parameters trained ({100 * self.share:.3g} %)"


def count_trainable(model: nn.Module) -> Trainable:
    """Count parameters, each shared one once, and those that ask for a gradient."""
    parameters = list(model.parameters())
    return Trainable(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def parameters_of_part(model: nn.Module, part: Part) -> dict[str, nn.Parameter]:
    """Return the parameters of one part by name.

    A bias is a parameter that its module calls `bias`; a norm is any other parameter of one dimension outside linear
    layers; head and embeddings are what the model's `get_output_embeddings` and `get_input_embeddings` return, and for
    `embeddings` every other `nn.Embedding` too, such as learned positions.

    Raises:
        ValueError: if the part is unknown, or the model has nothing of it.
    """
    if part not in get_args(Part):
        raise ValueError(f"retrain knows the parts {', '.join(get_args(Part))}; got {part!r}")
    found = dict(_named(model, part))
    if not found:
        raise ValueError(f"retrain: {type(model).__name__} has no {part} to train; leave the part out")
    return found


def _named(model: nn.Module, part: Part) -> Iterator[tuple[str, nn.Parameter]]:
    head = _embedding_module(model, "get_output_embeddings") if part == "head" else None
    table = _embedding_module(model, "get_input_embeddings") if part == "embeddings" else None
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            is_bias = leaf == "bias"
            belongs = {
                "all": True,
                "biases": is_bias,
                "norms": not is_bias and parameter.ndim == 1 and not is_linear(module),
                "head": module is head,
                "embeddings": module is table or isinstance(module, nn.Embedding),
            }
            if belongs[part]:
                yield f"{prefix}.{leaf}" if prefix else leaf, parameter


def _embedding_module(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    return get() if callable(get) else None


def choose_trainable(model: nn.Module, parts: Iterable[Part]) -> Trainable:
    """Let the named parts ask for gradients, and nothing else.

    A head that shares its weight with the embeddings is trained together with them, whichever is named.

    Args:
        model: changed in place.
        parts: see `parameters_of_part`.

    Raises:
        ValueError: if no part is given, one is unknown, or the model has nothing of one.
    """
    chosen = [parameter for part in parts for parameter in parameters_of_part(model, part).values()]
    if not chosen:
        raise ValueError(
            f"retrain names no part, so nothing would be trained; name some of {', '.join(get_args(Part))}"
        )
    ids = {id(parameter) for parameter in chosen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    return count_trainable(model)
