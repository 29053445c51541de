"""Refit the kept weights of a pruned model to what the dense weights compute, block by block, without gradients.

Each target is observed on the model as it stands by then: the inputs come from blocks, and from layers of the same
block, that are already refitted. Layers that read the same input are observed and refitted together; a block is run
again for the next ones. The dense model runs along, block by block, so that half of the drift of the inputs is made up
for too.

Source: layer-wise reconstruction as in Frantar and Alistarh, SparseGPT, arXiv 2301.00774, section 3.1; targets of the
    dense weights on the pruned model's inputs and the order over blocks as in Zimmer et al., PERP, arXiv 2312.15230,
    reconstruction mode, here in closed form. Bias alone: An et al., FLAP, arXiv 2312.11983.
    Differences, from our measurement on a 3-million-parameter model at 50 % by magnitude, perplexity 86.9 before: 22.4
    if observed once per block, 18.7 again after every group of layers that share an input; and see
    recovery/refit.py for the share of the dense model.
Cost: for each group of layers in a block (four in a Llama), and twice more, two forward passes of the block, one where
    towards_dense is 0; three Gram matrices for each group, or one; conjugate gradients. Memory beside the model: one
    block's dense weights, its inputs in both models, and the matrices of the widest group.
Limits: linear layers; whole tensors, no shards. At least 2 calibration tokens per kept input, 32 are good. Targets
    outside of blocks, and experts that get other tokens than in the dense model, are refitted on their own inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.calibration import hooks
from lightning_prune.calibration.calls import Calls
from lightning_prune.calibration.walk import Batch, evaluating, forward_all, walk_blocks
from lightning_prune.recovery.reading_order import Stage, reading_order
from lightning_prune.recovery.reconstruct_options import Reconstruct
from lightning_prune.recovery.refit import DenseLayer, TargetError, bias_of, num_kept, refit_
from lightning_prune.recovery.twins import PairedGram, Readings, Twins
from lightning_prune.solvers.least_squares import MIN_TOKENS_PER_INPUT
from lightning_prune.targets.targets import Binding, Targets, clean_name, find_blocks, is_linear

__all__ = ["Reconstruct", "ReconstructionReport", "TargetError", "reconstruct"]

_FEW_TOKENS = 8  # per kept input; below it a refit helps less, or not at all
_LARGE_RESIDUAL = 1e-2
_DEFAULTS = Reconstruct()


@dataclass(frozen=True)
class ReconstructionReport:
    """What the refit did to every target, in the order of the forward pass, and what to be wary of."""

    targets: tuple[TargetError, ...]
    num_tokens: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, ready for JSON."""
        return dataclasses.asdict(self)


def reconstruct(
    model: nn.Module,
    dense: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    options: Reconstruct = _DEFAULTS,
    progress: bool = True,
) -> ReconstructionReport:
    """Refit the kept weights of a pruned model in place; every zero of the masks stays +0.0.

    Args:
        model: pruned by `masks`; called once per batch with its entries as keyword arguments.
        dense: the weights before pruning by clean parameter name, on any device. Other parameters too, such as biases,
            where the model's own are no longer those of the dense model; without them they count as unchanged.
        masks: by target name, bool, True = keep, shaped like the parameter.
        batches: calibration batches, tokenised; padding is left out where they hold a 2-D `attention_mask`.
        options: how.
        progress: whether to show a bar.

    Returns:
        The error of every target's output before and after.

    Raises:
        ValueError: if model, weights, masks and batches do not fit together; nothing is changed then. If tokens are
            enough but a layer sees too few or none of them, as an expert may; other layers are refitted by then.
    """
    return _Pass(model, dense, masks, batches, options).run(progress=progress)


class _Pass:
    """One pass over a model."""

    def __init__(
        self,
        model: nn.Module,
        dense: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        batches: Sequence[Batch],
        options: Reconstruct,
    ) -> None:
        if not masks:
            raise ValueError("reconstruct needs the masks of a pruned model, got none; prune first")
        if not batches:
            raise ValueError("reconstruct needs calibration batches, got none; pass batches of model inputs")
        self.model, self.dense, self.masks, self.batches, self.options = model, dense, masks, batches, options
        self.bindings = Targets(include=tuple(masks), exclude=options.exclude).resolve(model)
        self.names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
        self.bias_names = {b.name: self.names[id(b.module.bias)] for b in self.bindings if bias_of(b) is not None}
        self.device = distributed.local(self.bindings[0].parameter.detach()).device
        self.dtype = torch.float64 if self.device.type == "cpu" else torch.float32  # slow on most accelerators
        self.twins = Twins(batches, self.device) if options.towards_dense else None
        self.errors: list[TargetError] = []
        self.num_tokens = 0
        self._orders: dict[tuple[str, ...], list[Stage]] = {}
        for binding in self.bindings:
            self._check(binding)
        self._check_effect()
        self._check_num_tokens()

    def run(self, *, progress: bool) -> ReconstructionReport:
        """Refit the targets of every block, then those outside of blocks."""
        with evaluating(self.model):
            inside = self._refit_blocks(progress=progress)
            outside = {path: b for path, b in self._paths(self.model).items() if b.name not in inside}
            if outside:
                run = functools.partial(
                    forward_all, self.model, self.batches, self.device, progress=progress, title="refitting the rest"
                )
                self._refit_all(self.model, outside, self.model, run, None)
        refitted = {error.name for error in self.errors}
        _check_reached([binding.name for binding in self.bindings if binding.name not in refitted])
        return ReconstructionReport(tuple(self.errors), self.num_tokens, tuple(self._notes()))

    def _refit_blocks(self, *, progress: bool) -> set[str]:
        """Refit the targets of every block; return which these are."""
        calls, twins = Calls(self.model), self.twins
        blocks = [(block, self._paths(block)) for block in find_blocks(self.model)]
        paths_of = {id(block): paths for block, paths in blocks if paths}

        def visit(block: nn.Module, run: Callable[[], None]) -> None:
            if twins is not None:
                twins.hold(list(self._swaps(block)))
            self._refit_all(block, paths_of[id(block)], calls, run, twins)

        def announce(batch: Mapping[str, object]) -> None:
            if twins is not None:
                twins.announce(batch)
            calls.switch(batch)

        try:
            walk_blocks(
                self.model,
                self.batches if twins is None else twins.batches,
                [block for block, paths in blocks if paths],
                visit,
                device=self.device,
                stop_after_blocks=True,
                progress=progress,
                announce=announce,
            )
        finally:
            calls.remove()
            if twins is not None:
                twins.use_dense(False)
        return {binding.name for paths in paths_of.values() for binding in paths.values()}

    # What is given

    def _check(self, binding: Binding) -> None:
        """Refuse a target that cannot be refitted, before anything is changed."""
        name, parameter = binding.name, binding.parameter
        if distributed.is_sharded(parameter):
            raise ValueError(f"{name} is sharded, and calibration needs whole weights; reconstruct before fully_shard")
        if not is_linear(binding.module):
            raise ValueError(
                f"the inputs of {name} cannot be seen, because it does not belong to a linear layer of its own; leave "
                "it out with reconstruct.exclude, or exclude it from the targets"
            )
        if binding.source is not None:
            raise ValueError(
                f"{name} is only a part of a weight, which a weight norm or spectral norm makes of it; leave it out "
                "with reconstruct.exclude"
            )
        if name not in self.dense:
            raise ValueError(f"the dense weights hold no {name}; give the weights of the model before it was pruned")
        for what, tensor in (("dense weight", self.dense[name]), ("mask", self.masks[name])):
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"the {what} of {name} has shape {tuple(tensor.shape)}, the model's {tuple(parameter.shape)}; "
                    "a model that was cut smaller has another shape than its parent and cannot be refitted to it"
                )
        pruned = ~self.masks[name].to(parameter.device)
        if bool(parameter.detach()[pruned].count_nonzero()):
            raise ValueError(f"{name} is not pruned by its mask: weights outside of it are not zero; apply the masks")
        if self.options.method == "bias" and name not in self.bias_names:
            raise ValueError(
                f"{name} has no bias that could take up the mean; use method: least_squares, which needs none, or "
                "leave it out with reconstruct.exclude"
            )

    def _check_effect(self) -> None:
        """Refuse weights that are pruned already."""
        for binding in self.bindings:
            dense = self.dense[binding.name]
            if bool(dense[~self.masks[binding.name].to(dense.device)].count_nonzero()):
                return
        raise ValueError(
            "the dense weights are zero wherever the masks prune, so there is nothing to make up for; keep a copy from "
            "before pruning, or name the dense model in reconstruct.parent"
        )

    def _check_num_tokens(self) -> None:
        """Refuse batches that cannot hold enough tokens, where they hold tokens at all."""
        counts = [_most_tokens(batch) for batch in self.batches]
        if self.options.method == "bias" or 0 in counts:
            return
        num_tokens = int(distributed.sum_everywhere(torch.tensor(sum(counts), device=self.device)))
        for binding in self.bindings:
            _check_enough(num_tokens, num_kept(binding.to_matrix(self.masks[binding.name])), binding.name)

    # What is done

    def _paths(self, module: nn.Module) -> dict[str, Binding]:
        """Return the targets in a module by the path of their layer."""
        paths = {id(layer): path for path, layer in module.named_modules()}
        return {paths[id(b.module)]: b for b in self.bindings if id(b.module) in paths}

    def _swaps(self, block: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parameters of a block with their dense values, as far as these are given."""
        for parameter in block.parameters():
            other = self.dense.get(self.names[id(parameter)])
            if other is not None and other.shape == parameter.shape:
                yield parameter, other.to(self.device, parameter.dtype)

    def _refit_all(
        self,
        block: nn.Module,
        paths: Mapping[str, Binding],
        called: nn.Module | Calls,
        run: Callable[[], None],
        twins: Twins | None,
    ) -> None:
        """Refit the targets of one block, stage by stage; blocks alike share what was found of their order."""
        key = tuple(paths)
        if key not in self._orders:
            self._orders[key] = reading_order(block, {path: b.module for path, b in paths.items()}, run)
        reached = {path for stage in self._orders[key] for group in stage for path in group}
        _check_reached([binding.name for path, binding in paths.items() if path not in reached])
        for stage in self._orders[key]:
            groups = [[paths[path] for path in group] for group in stage]
            for group, readings in zip(groups, self._observe(groups, called, run, twins), strict=True):
                for binding in group:
                    self.errors.append(self._refit(binding, readings))

    def _observe(
        self,
        groups: Sequence[Sequence[Binding]],
        called: nn.Module | Calls,
        run: Callable[[], None],
        twins: Twins | None,
    ) -> list[Readings]:
        """Return what was read of the input of every group, checked for enough tokens."""
        feeds = [(g[0], PairedGram(g[0].parameter.detach(), g[0].shape_OI[1], twins)) for g in groups]
        handles = hooks.observe_inputs(called, feeds, only_training=False)
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
            if twins is not None:
                twins.use_dense(False)
        found = [statistic.readings() for _, statistic in feeds]
        for group, readings in zip(groups, found, strict=True):
            for binding in group if self.options.method == "least_squares" else ():
                _check_enough(readings.num_tokens, num_kept(binding.to_matrix(self.masks[binding.name])), binding.name)
        return found

    def _refit(self, binding: Binding, readings: Readings) -> TargetError:
        """Refit one target and write it; return what that did to its output."""
        name, bias = binding.name, bias_of(binding)
        self.num_tokens = max(self.num_tokens, readings.num_tokens)
        dense = DenseLayer(
            binding.to_matrix(self.dense[name].to(self.device, self.dtype)),
            None if bias is None else self.dense.get(self.bias_names[name], bias.detach()).to(self.device, self.dtype),
        )
        return refit_(
            binding,
            dense,
            binding.to_matrix(self.masks[name].to(self.device)),
            readings,
            towards_dense=self.options.towards_dense,
            damping=self.options.damping,
            only_bias=self.options.method == "bias",
        )

    def _notes(self) -> list[str]:
        """Say what to be wary of."""
        notes = []
        few = min(self.errors, key=lambda error: error.tokens_per_input)
        if self.options.method == "least_squares" and few.tokens_per_input < _FEW_TOKENS:
            notes.append(
                f"{few.name} saw {few.tokens_per_input:.1f} calibration tokens per kept input; below {_FEW_TOKENS} a "
                "refit may help little, 32 are good"
            )
        worst = max(self.errors, key=lambda error: error.residual)
        if worst.residual > _LARGE_RESIDUAL:
            notes.append(f"the refit of {worst.name} stopped at a residual of {worst.residual:.1e}; raise the damping")
        return notes


def _most_tokens(batch: Batch) -> int:
    """Return how many tokens a layer sees of a batch at most; 0 where the batch holds none."""
    ids = (value for value in batch.values() if isinstance(value, Tensor) and value.ndim == 2)
    return max((value.numel() for value in ids if not value.is_floating_point()), default=0)


def _check_reached(missed: Sequence[str]) -> None:
    if missed:
        raise ValueError(
            f"no calibration token reached {missed[0]} ({len(missed)} targets in all); give batches that do, or leave "
            "them out with reconstruct.exclude"
        )


def _check_enough(num_tokens: int, num_kept: int, name: str) -> None:
    if num_tokens < MIN_TOKENS_PER_INPUT * num_kept:
        raise ValueError(
            f"{name} keeps {num_kept} inputs in a row and sees {num_tokens} calibration tokens; a refit needs at least "
            f"{MIN_TOKENS_PER_INPUT} per kept input and is good from 32 on: give more batches, or leave it out with "
            "reconstruct.exclude"
        )
