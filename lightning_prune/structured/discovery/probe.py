"""Run a model on a few inputs, with units or blocks left out, to see whether two forms of it compute the same.

What runs is the class: a `forward` that a trainer has put on the instance (autocast, casts of the output) is looked
through, since the other form of the model does not have it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.calibration.walk import evaluating

__all__ = [
    "TOLERANCE",
    "WeightsChangeError",
    "decodes",
    "difference",
    "first_row",
    "guarded_outputs",
    "outputs",
    "reached",
    "skipping",
    "told",
    "tolerance",
]

# Largest difference of the outputs of two forms of a float32 model that are the same function, as a share of the
# largest output or of one. Cut and masked models add the same numbers in another order.
TOLERANCE = 1e-5

_LONGEST = 240  # characters of another library's error that are passed on


@contextmanager
def _as_built(model: nn.Module) -> Iterator[None]:
    """Run what the class computes, in evaluation mode and in the precision of the weights, until the block ends."""
    device = next((tensor.device.type for tensor in model.state_dict(keep_vars=True).values()), "cpu")
    forward = vars(model).pop("forward", None)
    try:
        with evaluating(model), torch.autocast(device, enabled=False):
            yield
    finally:
        if forward is not None:
            model.forward = forward


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, or what else comes first, in evaluation mode."""
    with _as_built(model):
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
    with _as_built(model):
        try:
            generate(
                **first_row(inputs),
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        except Exception:  # noqa: BLE001 - whatever a class raises, it does not decode
            return False
    return True


def first_row(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the first row of a batch; a batch of one row as it is, since not all of its tensors may count rows."""
    ids = inputs.get("input_ids")
    return dict(inputs) if ids is not None and len(ids) == 1 else {name: value[:1] for name, value in inputs.items()}


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value, or of one if that is smaller."""
    if got.shape != expected.shape:
        return float("inf")
    scale = max(1.0, float(expected.abs().max()))
    return float((got.double() - expected.double()).abs().max()) / scale


def tolerance(expected: Tensor) -> float:
    """Return the largest difference that rounding explains, for outputs of this precision."""
    return TOLERANCE if expected.dtype.itemsize >= 4 else 0.05


def reached(model: nn.Module, probes: Sequence[Mapping[str, Tensor]]) -> set[str]:
    """Return the names of the modules that are called when a model runs."""
    names: set[str] = set()
    with ExitStack() as hooks:
        for name, module in model.named_modules(remove_duplicate=False):
            handle = module.register_forward_pre_hook(lambda *_, name=name: names.add(name))
            hooks.callback(handle.remove)
        for inputs in probes:
            outputs(model, inputs)
    return names


def told(error: Exception, what: str) -> str:
    """Return why something could not be run, in one line for a reader who knows the model and not its code.

    Args:
        error: what was raised; the words of a `ValueError` are meant for readers, those of others are not.
        what: was tried, for example `LlamaForCausalLM with half of its heads`.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ValueError) and text and not re.search(r"shape|size of tensor", text):
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"{what} does not run ({type(error).__name__}): the code of the class ties this number to other sizes"


class WeightsChangeError(ValueError):
    """A model that changes its own weights while it runs."""


class _Unwritten(TorchDispatchMode):
    """Stops an operation that would write into one of these tensors before it does."""

    def __init__(self, tensors: Mapping[int, str]) -> None:
        super().__init__()
        self.tensors = tensors
        self.written: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, unless a weight would change."""
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and isinstance(value, Tensor) and value.data_ptr() in self.tensors:
                    self.written = self.tensors[value.data_ptr()]
                    raise RuntimeError("a weight would change")
        return func(*args, **(kwargs or {}))


def guarded_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs of a model that leaves its weights alone; those of one that does not have not changed either.

    Raises:
        WeightsChangeError: naming the weight that it would have changed.
    """
    guard = _Unwritten({parameter.data_ptr(): name for name, parameter in model.named_parameters()})
    try:
        with guard:
            return outputs(model, inputs)
    except RuntimeError as error:
        if guard.written is None:
            raise
        raise WeightsChangeError(
            f"{type(model).__name__} changes {guard.written} while it runs, so that no run says what its weights are; "
            "switch that off in its configuration (rescale_every: 0 in RWKV), or cut another model"
        ) from error


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
