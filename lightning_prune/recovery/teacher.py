"""The teacher of a distillation: a frozen model beside the student, opened when it is first needed.

It lives outside the student's module tree, so it is not saved, wrapped, sharded or trained. It runs in evaluation mode,
without gradients, in its own dtype: autocast is switched off for it, so a teacher gives the same logits under every
trainer.

Source: self-teacher, arXiv 2407.14679 (the uncut parent); evaluation mode and no gradients, as there.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Dtype", "Teacher", "fingerprint", "frozen", "self_teacher"]

Dtype = Literal["float32", "bfloat16", "float16"]


class Teacher:
    """Runs a teacher on the student's inputs.

    Args:
        source: the model, or what opens it; called once, on first need.
        dtype: of its weights; None leaves them as they are.
        is_placed: whether it already cares for its devices, as an offloaded one does; else it moves to the student's.
    """

    def __init__(
        self, source: nn.Module | Callable[[], nn.Module], *, dtype: Dtype | None = None, is_placed: bool = False
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._is_placed = is_placed
        self._model: nn.Module | None = None
        self._device: torch.device | None = None
        self._accepted: frozenset[str] | None = None

    @property
    def model(self) -> nn.Module:
        """Return the model, opened and frozen."""
        if self._model is None:
            opened = self._source if isinstance(self._source, nn.Module) else self._source()
            self._model = frozen(opened, dtype=self._dtype)
            self._accepted = _accepted(self._model)
        return self._model

    def check_apart(self, student: nn.Module) -> None:
        """Check that the student is not its own teacher, which would freeze it.

        Raises:
            ValueError: if the two share a weight.
        """
        if isinstance(self._source, nn.Module):
            own = {id(parameter) for parameter in student.parameters()}
            if any(id(parameter) in own for parameter in self._source.parameters()):
                raise ValueError(
                    "the teacher shares weights with the student, so it would be frozen and would learn from itself; "
                    "give it a copy: lightning_prune.recovery.teacher.self_teacher(model)"
                )

    @property
    def fingerprint(self) -> str:
        """Return a text that tells these weights from others; opens the model."""
        return fingerprint(self.model)

    def __call__(self, inputs: Mapping[str, object], *, device: torch.device, **wanted: bool) -> Any:
        """Run the teacher.

        Args:
            inputs: keyword arguments of the student's call; those that only the student's class takes are left out.
            device: where the student is.
            wanted: further outputs asked for, as `output_hidden_states`.

        Returns:
            the teacher's output.
        """
        model = self.model
        if not self._is_placed and device != self._device:
            model.to(device)
            self._device = device
        known = {key: value for key, value in inputs.items() if self._accepted is None or key in self._accepted}
        # The student's labels would cost a loss that nobody reads, and a cache of keys memory.
        extra = {"use_cache": False} if self._accepted is None or "use_cache" in self._accepted else {}
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return model(**(known | extra | wanted))


def frozen(model: nn.Module, *, dtype: Dtype | None = None) -> nn.Module:
    """Put a model into evaluation mode, without gradients, in place.

    Args:
        model: changed in place and returned.
        dtype: of its floating-point weights; None leaves them.
    """
    model.requires_grad_(False).eval()
    return model if dtype is None else model.to(getattr(torch, dtype))


def self_teacher(model: nn.Module, *, dtype: Dtype | None = None) -> nn.Module:
    """Return a frozen deep copy of a model as it is now, to be taken before it is pruned and before hooks are set.

    Args:
        model: not changed.
        dtype: of the copy's weights; None keeps them.
    """
    return frozen(copy.deepcopy(model), dtype=dtype)


def fingerprint(model: nn.Module) -> str:
    """Return a short text that tells one teacher from another: by every weight, and by its configuration if it has one.

    The configuration says how the weights are read: the same ones with other rotary angles are another teacher.
    """
    digest = hashlib.blake2b(digest_size=16)
    config: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    # What begins so is of the session: a path, a commit, the kernels.
    said = {
        name: value for name, value in config.items() if not name.startswith("_") and name != "transformers_version"
    }
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if isinstance(value, Tensor) and value.numel() and value.device.type != "meta":
            digest.update(memoryview(_bytes_of(value)))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _accepted(model: nn.Module) -> frozenset[str] | None:
    """Return the names that a model's call takes; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)
