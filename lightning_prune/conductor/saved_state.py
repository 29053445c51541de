"""The conductor's state as plain dicts, tensors, numbers and strings, and the checks when it comes back."""

import dataclasses
import errno
import hashlib
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_prune.base import distributed, masks
from lightning_prune.conductor.guard import GoodMasks, GuardMemory
from lightning_prune.targets.targets import Binding

if TYPE_CHECKING:
    from lightning_prune.base.statistic import Statistic

__all__ = [
    "FORMAT_VERSION",
    "check_digest",
    "check_plan",
    "check_recipe",
    "check_same",
    "check_version",
    "check_zeros",
    "describe",
    "digest",
    "gather_statistics",
    "load_file",
    "only_numbers",
    "pack_guard",
    "pack_masks",
    "restore_statistics",
    "unpack_guard",
    "unpack_masks",
]

FORMAT_VERSION = 1
# What torch raises when a file is not what it was.
_DAMAGES = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
_CHUNK = 1 << 20
_KEYS = {"step", "sparsity", "plan", "settings", "shapes", "masks", "digest", "statistics", "guard"} | {
    "history",
    "notes",
    "num_updates",
    "is_once",
}
_MOMENTS = {"at", "start", "end", "interval"}
Statistics = Mapping[str, Mapping[str, "Statistic"]]


def describe(part: object) -> Any:
    """Return an options object as plain values: its class name and its fields."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: describe(getattr(part, field.name)) for field in dataclasses.fields(part)}
        return {"class": type(part).__name__, **fields}
    if isinstance(part, tuple | list):
        return [describe(entry) for entry in part]
    return part


def check_version(state: Mapping[str, Any]) -> None:
    """Refuse a state of another format.

    Raises:
        ValueError: if the version is not ours, or keys are missing.
    """
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"saved pruning state has format version {version}, this release reads {FORMAT_VERSION}; "
            "resume with the release that wrote it"
        )
    missing = _KEYS - set(state)
    if missing:
        raise ValueError(f"saved pruning state lacks {sorted(missing)}; the file is damaged, use an earlier checkpoint")


def check_same(what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a state that belongs to another recipe or model.

    Raises:
        ValueError: naming the first difference.
    """
    for key in {**saved, **now}:
        if saved.get(key) != now.get(key):
            raise ValueError(
                f"the checkpoint was written with another {what}: {key} was {saved.get(key)}, is now {now.get(key)}; "
                f"resume with the same {what}, or start anew without the checkpoint"
            )


def check_recipe(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a state of another recipe; moments are left to `check_plan`, in steps or as fractions.

    Raises:
        ValueError: naming the first difference.
    """
    check_same("recipe", _without_moments(saved), _without_moments(now))


def _without_moments(settings: Mapping[str, Any]) -> dict[str, Any]:
    schedule = {key: value for key, value in settings["schedule"].items() if key not in _MOMENTS}
    return {**settings, "schedule": schedule}


def check_zeros(differences: Sequence[str]) -> None:
    """Refuse a state whose masks are not those of the weights that came with it.

    Raises:
        ValueError: if there are differences between them.
    """
    if differences:
        raise ValueError(
            f"the weights of this checkpoint are not those that its masks prune: {'; '.join(differences)}. Weights and "
            "pruning state of two checkpoints were mixed up, or the weights were not loaded; use an untouched "
            "checkpoint, and load its weights before attaching"
        )


def check_plan(saved: Sequence[int], now: Sequence[int]) -> None:
    """Refuse a state whose schedule ran over other steps.

    Raises:
        ValueError: if start, end or interval differ.
    """
    if list(saved) != list(now):
        raise ValueError(
            f"the checkpoint's schedule ran over steps {saved[0]} to {saved[1]} every {saved[2]}, now it would be "
            f"{now[0]} to {now[1]} every {now[2]}: the number of training steps changed. Train for the same number, or "
            f"write the schedule's moments as steps of the old plan: start: {saved[0]}, end: {saved[1]}, interval: "
            f"{saved[2]} (at: {saved[0]} where it has one moment)"
        )


def pack_masks(held: Mapping[str, Tensor], bindings: Sequence[Binding]) -> dict[str, Tensor]:
    """Gather and pack masks to bits on the CPU; collective."""
    return {
        binding.name: masks.pack(distributed.gather(held[binding.name], binding.parameter)).cpu()
        for binding in bindings
        if binding.name in held
    }


def unpack_masks(packed: Mapping[str, Tensor], bindings: Sequence[Binding]) -> dict[str, Tensor]:
    """Undo `pack_masks`: this process's rows, where the weights lie."""
    held = {}
    for binding in bindings:
        if binding.name in packed:
            whole = masks.unpack(packed[binding.name], binding.parameter.shape)
            held[binding.name] = distributed.shard(whole, binding.parameter).to(binding.parameter.device)
    return held


def digest(value: Any) -> str:
    """Return the SHA-256 of nested plain values and tensors, an entry called `digest` left out."""
    sha = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                if key != "digest":
                    sha.update(f"{key}:".encode())
                    add(part[key])
        elif isinstance(part, list | tuple):
            sha.update(f"[{len(part)}".encode())
            for entry in part:
                add(entry)
        else:
            sha.update(f"{type(part).__name__}{part!r};".encode())

    add(value)
    return sha.hexdigest()


def check_digest(state: Mapping[str, Any]) -> None:
    """Refuse a state that is not the one that was saved.

    Raises:
        ValueError: if the digest differs.
    """
    if digest(state) != state["digest"]:
        raise ValueError(
            "the saved state does not match its digest; the file was changed or damaged, use an earlier one"
        )


def gather_statistics(statistics: Statistics, bindings: Sequence[Binding]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return all statistics, merged over the ranks, on the CPU; collective."""
    saved: dict[str, dict[str, dict[str, Tensor]]] = {}
    for binding in bindings:
        for name, statistic in statistics.get(binding.name, {}).items():
            if not statistic.update_called:
                continue
            states = {"is_old": torch.tensor(True)} if statistic.is_old else {}
            for key in statistic._defaults:
                value = getattr(statistic, key)
                if statistic.source == "input":
                    value = distributed.sum_everywhere(value)
                elif value.ndim:
                    value = distributed.gather(value, binding.parameter)
                states[key] = value.detach().clone().cpu()
            saved.setdefault(binding.name, {})[name] = states
    return saved


def restore_statistics(saved: Mapping[str, Any], statistics: Statistics, bindings: Sequence[Binding]) -> None:
    """Undo `gather_statistics`: sums go to the first rank, rows to the process that holds them."""
    for binding in bindings:
        for name, statistic in statistics.get(binding.name, {}).items():
            states = dict(saved.get(binding.name, {}).get(name, {}))
            statistic.is_old = bool(states.pop("is_old", False))
            for key, value in states.items():
                if statistic.source == "input" and not distributed.is_first_rank():
                    value = torch.zeros_like(value)
                elif statistic.source == "step" and value.ndim:
                    value = distributed.shard(value, binding.parameter)
                setattr(statistic, key, value.to(binding.parameter.device, copy=True))
                statistic._update_count = max(statistic._update_count, 1)


def pack_guard(memory: GuardMemory, bindings: Sequence[Binding]) -> dict[str, Any]:
    """Return the guard's memory as plain values, gathered; collective."""
    good = None
    if memory.good is not None:
        weights = {b.name: distributed.gather(memory.good.weights[b.name], b.parameter).cpu() for b in bindings}
        good = {
            "sparsity": memory.good.sparsity,
            "masks": pack_masks(memory.good.masks, bindings),
            "weights": weights,
        }
    return {"is_held": memory.is_held, "is_late": memory.is_late, "has_seen": memory.has_seen, "good": good}


def unpack_guard(saved: Mapping[str, Any], bindings: Sequence[Binding]) -> GuardMemory:
    """Undo `pack_guard`."""
    good = None
    if saved["good"] is not None:
        weights = {
            b.name: distributed.shard(saved["good"]["weights"][b.name], b.parameter).to(b.parameter.device, copy=True)
            for b in bindings
        }
        good = GoodMasks(saved["good"]["sparsity"], unpack_masks(saved["good"]["masks"], bindings), weights)
    return GuardMemory(saved["is_held"], saved["is_late"], saved["has_seen"], good)


def load_file(path: str) -> dict[str, Any]:
    """Read saved tensors and plain values from a file; nothing in it is executed.

    Raises:
        ValueError: if the file is truncated, damaged or holds anything else.
        OSError: if it is not there or cannot be read now, which says nothing of what it holds.
    """
    problem = "it is not a file of tensors"
    content: Any = None
    _read_through(path)
    if zipfile.is_zipfile(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except _DAMAGES as error:
            problem = type(error).__name__
        except OSError as error:
            if error.errno != errno.EINVAL:  # a damaged file tells where to look in it, and that is no place in it
                raise
            problem = type(error).__name__
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: it is truncated, damaged or not ours ({problem}); use an earlier one")
    return content


def _read_through(path: str) -> None:
    """Read a file and forget it: what reads archives takes an error of the disk for damage."""
    with open(path, "rb") as file:
        while file.read(_CHUNK):
            pass


def only_numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """Keep the metrics that are single numbers."""
    numbers = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = float(value)
    return numbers
