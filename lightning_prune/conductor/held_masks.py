"""Masks in force on a model: on its weights, on their gradients, and on what optimizers remember of them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.base import distributed, masks
from lightning_prune.calibration import hooks
from lightning_prune.conductor import optimizer_steps, promised_zeros, saved_state
from lightning_prune.conductor.guard import GoodMasks
from lightning_prune.targets.binding import check_trained_once
from lightning_prune.targets.targets import Binding

__all__ = ["HeldMasks", "OnStep"]


class OnStep(Protocol):
    """What is called after an optimizer step, with the targets stepped and whether it was the clock's."""

    def __call__(self, stepped: list[Binding], *, is_clock: bool) -> None:
        """Take note of the step."""
        ...


class HeldMasks:
    """The masks of one model by target name, bool, True = keep, shaped like this process's part of the weight."""

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.bindings: list[Binding] = []
        self.aliases: dict[str, tuple[str, ...]] = {}
        self._averages: list[nn.Module] = []
        self.clock: torch.optim.Optimizer | None = None
        self._steppers: list[torch.optim.Optimizer] = []
        self.levels: list[torch.optim.Optimizer] = []
        self._others: list[torch.optim.Optimizer] = []
        self._name_of: dict[int, str] = {}
        self._with_gradient_hook: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._on_step: OnStep | None = None

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
        self._averages = promised_zeros.averages_in(model)
        self._name_of = {id(binding.parameter): binding.name for binding in bindings}

    def own(self, optimizers: Sequence[object]) -> None:
        """Take the optimizers, and make the first that steps any target the clock.

        Args:
            optimizers: of the training, in whatever a trainer wraps them.

        Raises:
            ValueError: if one of them cannot be followed, they step none of the trainable targets, but perhaps copies
                of them, or one weight is two parameters.
        """
        check_trained_once(self.bindings)
        found = [optimizer_steps.levels(optimizer) for optimizer in optimizers]
        self._steppers = [inner[-1] for inner in found]
        self.levels = [optimizer for inner in found for optimizer in inner]
        self.clock = next((each for each in self._steppers if self._stepped_by(each)), self._steppers[0])
        unowned = self._unowned()
        if unowned and not self._stepped_by(self.clock):
            raise ValueError(
                f"the optimizers step none of the targets, not even {unowned[0].name}: they hold other tensors, "
                "such as flat copies (DeepSpeed) or weights from before sharding; make them from this "
                "model's parameters and train with DDP or FSDP2"
            )

    def hold(self, on_step: OnStep, *, dense_grad: bool) -> None:
        """Apply the masks after every step of every torch optimizer from now on, until `let_go`.

        Args:
            on_step: called after a step of an optimizer that was given to `own`.
            dense_grad: whether the gradients of pruned weights are left as they are.
        """
        self._on_step = on_step
        if not dense_grad:
            self._mask_gradients()
            self._handles.append(optimizer_steps.before_any_step(self._before_any_step))
        self._handles += [each.register_step_post_hook(self._after_step) for each in self.levels]
        self._handles.append(optimizer_steps.after_any_step(self._after_other_step))

    def let_go(self) -> None:
        """Remove the hooks and forget the optimizers; the masks stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._with_gradient_hook.clear()
        self.clock, self._steppers, self.levels, self._others, self._on_step = None, [], [], [], None

    def _before_any_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        self._mask_gradients()

    def _after_other_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """Hold the masks also under an optimizer that the training did not name."""
        if all(optimizer is not level for level in self.levels):
            self.apply(self._owned_by(optimizer))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if optimizer_steps.was_skipped(optimizer):
            return
        own = self._owned_by(optimizer)
        self.apply(own)
        moves_weights = any(optimizer is stepper for stepper in self._steppers)
        if moves_weights and self._on_step is not None and not optimizer_steps.is_inside_own_step(optimizer):
            self._on_step(own, is_clock=optimizer is self.clock)

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> list[Binding]:
        """Return the targets that an optimizer holds now; groups may have been added since it was made."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [binding for binding in self.bindings if id(binding.parameter) in held]

    def _unowned(self) -> list[Binding]:
        """Return the trainable targets that no optimizer holds."""
        owned = {binding.name for optimizer in [*self.levels, *self._others] for binding in self._stepped_by(optimizer)}
        return [b for b in self.bindings if b.parameter.requires_grad and b.name not in owned]

    def _owned_by(self, optimizer: torch.optim.Optimizer) -> list[Binding]:
        """Return the targets to mask after a step of any optimizer; with the clock also those that no one holds."""
        stepped = self._stepped_by(optimizer)
        if stepped and all(optimizer is not known for known in [*self.levels, *self._others]):
            self._others.append(optimizer)
        return stepped + self._unowned() if optimizer is self.clock else stepped

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

    def _mask_gradients(self) -> None:
        """Zero the gradients of pruned weights from now on; those of targets unfrozen since, as they stand."""
        for binding in self.bindings:
            if binding.parameter.requires_grad and binding.name not in self._with_gradient_hook:
                self._with_gradient_hook.add(binding.name)
                hooks.zero_pruned_gradient(binding.parameter, self.masks, binding.name)
                self._handles.append(hooks.mask_gradient(binding.parameter, self.masks, binding.name))

    @torch.no_grad()
    def set(self, binding: Binding, mask: Tensor) -> None:
        """Put a new mask in force: on the weight, and on what the optimizers remember of changed weights."""
        before = self.masks.get(binding.name)
        changed = ~mask if before is None else before != mask
        for optimizer in [*self.levels, *self._others]:
            hooks.clear_state(optimizer, binding.parameter, changed)
        self.masks[binding.name] = mask = binding.spare_norms(mask)
        with binding.steady():
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

    def differences(self, model: nn.Module | Mapping[str, object] | None = None) -> tuple[str, ...]:
        """Return how a model, or the tensors of one, differs from the masks; the trainable targets where none is given.

        Frozen targets are left out there: a checkpoint of adapters alone does not hold them.
        """
        if model is not None:
            weights, bindings = promised_zeros.weights_of(model), self.bindings
        else:
            bindings = [binding for binding in self.bindings if binding.parameter.requires_grad]
            weights = {binding.name: binding.parameter.detach() for binding in bindings}
        return tuple(promised_zeros.differences(weights, self.masks, bindings, self.aliases))

    def apply_everywhere(self) -> None:
        """Zero the pruned weights, and those in the averages inside the model: a mean of zeros then stays zero."""
        self.apply(self.bindings)
        for average in self._averages:
            self.apply_to(promised_zeros.weights_of(average))

    @torch.no_grad()
    def apply_to(self, weights: Mapping[str, Tensor]) -> int:
        """Zero the pruned weights in tensors of another model, such as an average; return how many targets it has."""
        num_masked = 0
        for binding, weight in promised_zeros.pairs(weights, self.bindings, self.aliases):
            if weight is not None and binding.name in self.masks:
                mask = promised_zeros.mask_for(weight, self.masks[binding.name], binding)
                if distributed.local(weight).shape == mask.shape:
                    distributed.local(weight).masked_fill_(~mask, 0)
                    num_masked += 1
        return num_masked

    def zero_share(self) -> Tensor:
        """Return the share of zeros among the weights of the targets, as they are now; collective when sharded."""
        zeros = torch.zeros((), dtype=torch.float64)
        for binding in self.bindings:
            count = (distributed.local(binding.parameter.detach()) == 0).sum()
            zeros = zeros.to(count.device) + distributed.all_reduce_sum(count, binding.parameter)
        return zeros / sum(binding.parameter.numel() for binding in self.bindings)

    @torch.no_grad()
    def go_back(self, good: GoodMasks) -> None:
        """Put earlier masks in force; weights that return take the value they had then."""
        for binding in self.bindings:
            now = self.masks[binding.name]
            mask = good.masks.get(binding.name, torch.ones_like(now))
            returning = mask & ~now
            self.set(binding, mask.clone())
            weight = distributed.local(binding.parameter)
            with binding.steady():
                weight.copy_(torch.where(returning, good.weights[binding.name], weight))

    def check_restored(self) -> None:
        """Check that restored masks are those of the weights.

        Raises:
            ValueError: if they are not; the masks are forgotten then.
        """
        found = self.differences()
        if found:
            self.masks.clear()
        saved_state.check_zeros(found)

    def fit(self) -> bool:
        """Return whether the masks are those of this model: its targets, of which every pruned weight is zero.

        The model may have been wrapped since, or be a part of what it was: masks then take the names of now.
        """
        found = {b.name: mask for b, mask in promised_zeros.pairs(self.masks, self.bindings, self.aliases)}
        masks_now = {name: mask for name, mask in found.items() if mask is not None}
        weights = {binding.name: distributed.local(binding.parameter.detach()) for binding in self.bindings}
        ours = len(masks_now) == len(self.masks) and all(
            mask.shape == weights[name].shape and not bool(weights[name][~mask].any())
            for name, mask in masks_now.items()
        )
        is_ours = distributed.agree(ours, self.device)
        if is_ours:
            self.masks.clear()
            self.masks.update(masks_now)
        return is_ours

    def check_agreement(self) -> None:
        """Check that ranks with copies of the same weights hold the same masks.

        Raises:
            RuntimeError: naming the first that differs.
        """
        held = [b for b in self.bindings if b.name in self.masks and distributed.has_copies(b.parameter)]
        if held:
            hashes = [distributed.all_reduce_sum(masks.content_hash(self.masks[b.name]), b.parameter) for b in held]
            distributed.check_same_everywhere(torch.stack(hashes), [b.name for b in held])
