"""Masks in force on a model: on its weights, on their gradients, and on what optimizers remember of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune import distributed, hooks, masks, promised_zeros
from lightning_prune.guard import GoodMasks
from lightning_prune.targets import Binding

__all__ = ["HeldMasks"]


class HeldMasks:
    """The masks of one model by target name, bool, True = keep, shaped like this process's part of the weight."""

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.bindings: list[Binding] = []
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self._owned: dict[int, list[Binding]] = {}
        self._name_of: dict[int, str] = {}

    @property
    def device(self) -> torch.device:
        """Return where the targets lie."""
        return self.bindings[0].parameter.device

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Return the targets' parameters by name."""
        return {binding.name: binding.parameter for binding in self.bindings}

    def shapes(self) -> dict[str, list[int]]:
        """Return the targets' shapes by name."""
        return {binding.name: list(binding.parameter.shape) for binding in self.bindings}

    def take(self, model: nn.Module, bindings: list[Binding]) -> None:
        """Take a model's targets."""
        self.bindings, self.aliases = bindings, promised_zeros.aliases_of(model, bindings)
        self._name_of = {id(binding.parameter): binding.name for binding in bindings}

    def own(self, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Find out which optimizer steps which target, and return the clock: the first that steps any.

        Trainable targets left out of the optimizers, while others are in them, are masked with the clock.

        Raises:
            ValueError: if the optimizers step none of the trainable targets, but perhaps copies of them.
        """
        self.optimizers = list(optimizers)
        self._owned = {id(optimizer): [] for optimizer in optimizers}
        owner_of = {
            id(parameter): id(optimizer)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        unowned = []
        for binding in self.bindings:
            owner = owner_of.get(id(binding.parameter))
            if owner is not None:
                self._owned[owner].append(binding)
            elif binding.parameter.requires_grad:
                unowned.append(binding)
        clock = next((optimizer for optimizer in optimizers if self._owned[id(optimizer)]), optimizers[0])
        if unowned and not self._owned[id(clock)]:
            raise ValueError(
                f"the optimizers step none of the targets, not even {unowned[0].name}: they hold other tensors, "
                "such as flat copies (DeepSpeed) or weights from before sharding; make them from this "
                "model's parameters and train with DDP or FSDP2"
            )
        self._owned[id(clock)] += unowned
        return clock

    def of(self, parameter: Tensor) -> Tensor | None:
        """Return the mask of a target by its parameter; None for a sharded one and for what is no target."""
        if distributed.is_sharded(parameter):
            return None
        name = self._name_of.get(id(parameter))
        return None if name is None else self.masks.get(name)

    def take_existing(self, *, allow_none: bool) -> None:
        """Make the zeros of every target of which a hundredth or more is zero its mask.

        Args:
            allow_none: whether there may be no such target.

        Raises:
            ValueError: if there is no such target.
        """
        for binding in self.bindings:
            keep = distributed.local(binding.parameter.detach()) != 0
            num_zeros = int(distributed.all_reduce_sum((~keep).sum(), binding.parameter))
            if num_zeros >= 0.01 * binding.parameter.numel():
                self.masks[binding.name] = keep
        if not self.masks and not allow_none:
            raise ValueError(
                f"schedule Existing holds the zeros that the model has, but none of its {len(self.bindings)} targets "
                "is sparse; prune it first (lightning-prune oneshot), or give a schedule that prunes"
            )

    def owned_by(self, optimizer: torch.optim.Optimizer) -> list[Binding]:
        """Return the targets to mask after a step of this optimizer."""
        return self._owned[id(optimizer)]

    def mask_gradients(self) -> list[RemovableHandle]:
        """Zero the gradients of pruned weights from now on, until the handles are removed."""
        trainable = [binding for binding in self.bindings if binding.parameter.requires_grad]
        return [hooks.mask_gradient(binding.parameter, self.masks, binding.name) for binding in trainable]

    @torch.no_grad()
    def set(self, binding: Binding, mask: Tensor) -> None:
        """Put a new mask in force: on the weight, and on what the optimizers remember of changed weights."""
        before = self.masks.get(binding.name)
        changed = ~mask if before is None else before != mask
        for optimizer in self.optimizers:
            hooks.clear_state(optimizer, binding.parameter, changed)
        self.masks[binding.name] = mask
        distributed.local(binding.parameter).masked_fill_(~mask, 0)

    @torch.no_grad()
    def apply(self, bindings: Sequence[Binding]) -> None:
        """Zero what an optimizer step has written into pruned weights.

        Multiplying by bytes is many times faster than filling; adding zero turns -0.0 into +0.0, which sparse kernels
        need.
        """
        for binding in bindings:
            if binding.name in self.masks:
                distributed.local(binding.parameter).mul_(self.masks[binding.name].view(torch.uint8)).add_(0.0)

    @torch.no_grad()
    def go_back(self, good: GoodMasks) -> None:
        """Put earlier masks in force; weights that return take the value they had then."""
        for binding in self.bindings:
            now = self.masks[binding.name]
            mask = good.masks.get(binding.name, torch.ones_like(now))
            returning = mask & ~now
            self.set(binding, mask.clone())
            weight = distributed.local(binding.parameter)
            weight.copy_(torch.where(returning, good.weights[binding.name], weight))

    def fit(self) -> bool:
        """Return whether the masks are those of this model: pruned weights are zero, on every rank."""
        ours = all(
            binding.name not in self.masks
            or (
                self.masks[binding.name].shape == distributed.local(binding.parameter).shape
                and not bool(distributed.local(binding.parameter.detach())[~self.masks[binding.name]].any())
            )
            for binding in self.bindings
        )
        return distributed.agree(ours, self.device)

    def check_agreement(self) -> None:
        """Check that ranks with copies of the same weights hold the same masks.

        Raises:
            RuntimeError: naming the first that differs.
        """
        held = [b for b in self.bindings if b.name in self.masks and distributed.has_copies(b.parameter)]
        if held:
            hashes = [distributed.all_reduce_sum(masks.content_hash(self.masks[b.name]), b.parameter) for b in held]
            distributed.check_same_everywhere(torch.stack(hashes), [b.name for b in held])
