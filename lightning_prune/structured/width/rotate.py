"""Make the residual stream narrower by rotating it to its principal directions and dropping the weakest.

RMS norms commute with rotations once their weights are folded into what reads them. One rotation is used for the whole
model, so nothing is left on the residual path and the result is a plain model of the same class with a smaller hidden
size and an output head of its own.

Source: Ashkboos et al., SliceGPT, arXiv 2401.15024 (microsoft/TransformerCompression). Differences: one global
    rotation in place of one per sub-block, whose shortcut matrices no stock class can hold; directions come from the
    normalised inputs x / rms(x) of the norms, since with raw inputs late layers of large norm decide alone; no damping.
Cost: one pass over the batches; D x D numbers and one eigenvalue problem in float64; one more model in memory.
Limits: RMS norms before the sub-blocks. Norms that subtract a mean, and norms inside the residual branch, are refused.
    The result has the cost of its width alone; sparsity of the weights is lost by the rotation.

Shapes: T tokens, D residual channels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.calibration.walk import Batch
from lightning_prune.statistics.gram import Gram
from lightning_prune.structured.build import build_smaller, check_whole, field_edits
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe import difference, outputs
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.undo import undone_on_error
from lightning_prune.structured.width.norm_readers import norm_of_readers
from lightning_prune.structured.width.options import fingerprint
from lightning_prune.structured.width.reader_repair import bind_weight, feed

__all__ = ["Signal", "principal_directions", "rotate", "rotate_and_slice", "stream_moments"]

Signal = Literal["normalised", "raw"]
_TOLERANCE = 1e-3  # of the largest output, for float32: two roundings of every weight
_TOLERANCE_HALF = 0.1


class _NormalisedGram(Gram):
    """Sum the outer products of x / rms(x)."""

    def update(self, input_TI: Tensor) -> None:
        """Add the tokens of one forward pass, in any float dtype."""
        input_TI = input_TI.double()
        rms_T1 = input_TI.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        super().update(input_TI / rms_T1)


def rotate_and_slice(
    model: nn.Module,
    hidden_size: int,
    batches: Sequence[Batch],
    *,
    signal: Signal = "normalised",
    structure: Structure | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model of the same class with a narrower residual stream, and what was done.

    Args:
        model: whole tensors on one device, unwrapped; unchanged.
        hidden_size: how many directions stay; the model's own width gives a rotated model of the same outputs.
        batches: calibration data, `input_ids` and where there is padding `attention_mask`; under several processes
            each gives its own share.
        signal: what the directions are taken from: the norms' inputs divided by their root mean square, or as they are.
        structure: what `discover` found in the model; found now if it is not given.
        inputs: a small batch for the checks; made up for models that read tokens.
        progress: whether to show a bar.

    Returns: the smaller model, and plain values that say how it came about.

    Raises:
        ValueError: if the stream cannot be rotated or have this width; nothing was changed.
        RuntimeError: if the narrow model computes something else than the rotated one without its last directions.
    """
    check_whole(model)
    inputs = probe_inputs(model) if inputs is None else inputs
    structure = discover(model, inputs) if structure is None else structure
    group = structure.of_kind("hidden")[0]
    _check_request(model, structure, group, hidden_size, batches, signal)
    norms = norm_of_readers(model, group, inputs)
    moments_DD, num_tokens = stream_moments(model, group, batches, signal=signal, progress=progress)
    rotation_DD, energy_D = principal_directions(moments_DD)
    rotated, group, was_tied = _rotated(model, structure, group, norms, rotation_DD, inputs)
    if hidden_size < group.num_units:
        structure = dataclasses.replace(structure, groups={**structure.groups, group.key: group})
        first = Plan(cuts=(Cut(group.key, tuple(range(hidden_size))),))
        rotated = shrink(rotated, first, structure=structure, inputs=inputs, consume=True)
    description = {
        "format": 1,
        "method": {"name": "rotation", "signal": signal, "calibration": fingerprint(batches), "num_tokens": num_tokens},
        "parent_hidden_size": group.num_units,
        "hidden_size": hidden_size,
        "was_tied": was_tied,
        "kept_energy": float(energy_D[:hidden_size].sum() / energy_D.sum()),
    }
    return rotated, description


def stream_moments(
    model: nn.Module, group: Group, batches: Sequence[Batch], *, signal: Signal, progress: bool = False
) -> tuple[Tensor, int]:
    """Return the sum of x x^T over the inputs of all norms over the stream, and of how many tokens; padding left out.

    Args:
        model: unchanged.
        group: its residual channels.
        batches: calibration data.
        signal: `normalised` divides each x by its root mean square.
        progress: whether to show a bar.

    Returns:
        moments_DD in float64, and the number of tokens, each counted once for every norm.
    """
    norms = [bind_weight(model, member.name) for member in group.members if member.role == "norm"]
    gram = (_NormalisedGram if signal == "normalised" else Gram)(norms[0].parameter.detach(), group.num_units)
    feed(model, [(norm, gram) for norm in norms], batches, title="finding directions", progress=progress)
    gram_JJ = gram.compute()
    return gram_JJ[:-1, :-1], int(gram_JJ[-1, -1])


def principal_directions(moments_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions as columns of an orthogonal matrix, strongest first, and their energies; float64.

    Raises:
        ValueError: if the moments are not finite.
    """
    if not bool(moments_DD.isfinite().all()):
        raise ValueError("the residual stream has infinite or undefined values; check the model and the batches")
    energy_D, directions_DD = torch.linalg.eigh(moments_DD.double())
    return directions_DD.flip(1), energy_D.flip(0).clamp(min=0)


@torch.no_grad()
def rotate(model: nn.Module, group: Group, norms: Mapping[str, str], rotation_DD: Tensor) -> None:
    """Rotate the residual stream of a model in place; what it computes stays the same.

    Args:
        model: its output head must not be tied to its embedding.
        group: its residual channels.
        norms: reader -> the norm it reads, see `norm_of_readers`; the norms' weights become one.
        rotation_DD: orthogonal; its columns are the new channels.

    Raises:
        ValueError: if a vector along the stream is not in a place where it is added to it.
    """
    with undone_on_error(model) as undo:
        _rotate_(model, group, norms, rotation_DD, undo.keep)


def _rotate_(
    model: nn.Module,
    group: Group,
    norms: Mapping[str, str],
    rotation_DD: Tensor,
    keep: Callable[[Tensor], None] = lambda data: None,
) -> None:
    """Rotate in place; `keep` is told each tensor before it is overwritten."""
    tensors = model.state_dict(keep_vars=True)
    members = {member.name: member for member in group.members if member.role == "norm"}
    weights = {name: tensors[name].data.double() + members[name].offset for name in members}
    rotation_DD = rotation_DD.to(next(iter(weights.values())))
    for member in group.members:
        data = tensors[member.name].data
        if member.role == "vector" and not member.name.endswith("bias"):
            raise ValueError(f"{member.name} acts on channels one by one, which does not commute with a rotation")
        keep(data)
        if member.role == "norm":
            data.fill_(1 - member.offset)
            continue
        whole = data.double().movedim(member.dim, -1)
        if member.role == "in" and member.name in norms:
            whole = whole * weights[norms[member.name]]
        data.copy_((whole @ rotation_DD).movedim(-1, member.dim))


def _check_request(
    model: nn.Module, structure: Structure, group: Group, hidden_size: int, batches: Sequence[Batch], signal: Signal
) -> None:
    if signal not in get_args(Signal):
        raise ValueError(f"signal must be normalised or raw, got {signal!r}")
    if not 1 <= hidden_size <= group.num_units:
        raise ValueError(f"hidden_size must be from 1 to the model's own {group.num_units}, got {hidden_size}")
    if not batches:
        raise ValueError("the directions come from calibration batches, got none; pass tokenised batches")
    blueprint = Blueprint(model)
    edits = field_edits(structure, {group.key: Cut(group.key, tuple(range(hidden_size)))}, None, blueprint.values)
    if blueprint.shapes_with(edits) is None:
        raise ValueError(f"{type(model).__name__} cannot have hidden_size={hidden_size}: {blueprint.why_not(edits)}")


def _rotated(
    model: nn.Module,
    structure: Structure,
    group: Group,
    norms: Mapping[str, str],
    rotation_DD: Tensor,
    inputs: Mapping[str, Tensor],
) -> tuple[nn.Module, Group, bool]:
    """Return a rotated copy, its residual channels, and whether its head was tied.

    Raises:
        ValueError: if the copy computes something else.
    """
    copy = build_smaller(model, structure, Plan())
    was_tied = _untie(copy)
    with torch.no_grad():
        _rotate_(copy, group, norms, rotation_DD)
    expected = outputs(model, inputs)
    gap = difference(outputs(copy, inputs), expected)
    tolerance = _TOLERANCE if expected.dtype.itemsize >= 4 else _TOLERANCE_HALF
    if not gap <= tolerance:
        raise ValueError(
            f"{type(model).__name__} computes something else when its residual stream is rotated (by {gap:.2g} of the "
            f"largest output, allowed is {tolerance:g}); something on the stream acts on channels one by one; the "
            "model is unchanged: select channels instead, or cut heads and FFN units"
        )
    return copy, _untied(group) if was_tied else group, was_tied


def _untie(model: nn.Module) -> bool:
    """Give the output head a weight of its own; return whether it had none."""
    getters: list[Any] = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    embedding, head = (getter() if callable(getter) else None for getter in getters)
    if embedding is None or head is None or embedding.weight is not head.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    config: Any = model.config
    for part in (config, config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config):
        part.tie_word_embeddings = False
    return True


def _untied(group: Group) -> Group:
    """Return the channels of a model whose head is no longer tied.

    Where readers, and not norms, make up for the narrower stream, the last norm stood in for the tied head.
    """
    if not any(member.power for member in group.readers):
        return group
    members = (dataclasses.replace(m, power=0) if m.role == "norm" else m for m in group.members)
    return dataclasses.replace(group, members=tuple(members))
