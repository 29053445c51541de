"""The LoRA layers of PEFT over a sparse weight: they compute inside the mask, and merging keeps every zero.

A layer of PEFT is given one of these classes in place of its own; its parameters, names and state stay PEFT's, so
optimizers, checkpoints and `merge_and_unload` go on as they are.

Shapes: O output features, I input features, R rank; ... any leading dimensions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.recovery.lora_options import LoraForm
from lightning_prune.recovery.low_rank import LowRankForm, effective_weight, low_rank_linear, start_low_rank

try:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise ImportError('LoRA recovery needs peft: pip install "lightning_prune[peft]"') from error

__all__ = ["GuardedLoraLinear", "MaskOf", "MaskedLoraLinear", "base_weight", "change_class", "keep_of"]

MaskOf = Callable[[Tensor], Tensor | None]


def keep_of(weight: Tensor, mask_of: MaskOf) -> Tensor:
    """Return the mask of a weight, bool, True = keep: the one held, or where none is held its non-zeros.

    None is held for a sharded weight, whose mask is sharded too while the forward pass sees it whole, nor for an
    adapter opened outside a training. The weight is frozen, so its zeros stay what they are.
    """
    mask = mask_of(weight)
    return weight != 0 if mask is None or mask.shape != weight.shape else mask


def base_weight(layer: Any) -> Tensor:
    """Return the weight below a LoRA layer."""
    weight: Tensor = layer.get_base_layer().weight
    return weight


class GuardedLoraLinear(LoraLinear):
    """A plain LoRA layer that refuses to fill the zeros of a sparse weight."""

    mask_of: MaskOf

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge, unless the weight is sparse.

        Args:
            safe_merge: as in PEFT.
            adapter_names: as in PEFT.

        Raises:
            ValueError: if merging would fill zeros.
        """
        keep = keep_of(base_weight(self), self.mask_of)
        num_zeros = keep.numel() - int(keep.sum())
        if num_zeros > 0.01 * keep.numel() and check_adapters_to_merge(self, adapter_names):
            raise ValueError(
                f"merging a plain LoRA would fill {num_zeros} zeros of a weight of {keep.numel()}; train it with "
                "variant masked or scaled, or keep the adapter separate (export.format adapter)"
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


class MaskedLoraLinear(LoraLinear):
    """A LoRA layer whose update lies inside the mask; one adapter at a time."""

    mask_of: MaskOf
    form: LowRankForm
    _before_merge: dict[str, Tensor]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply by the effective weight.

        Args:
            x: (..., I).
            args: none.
            kwargs: `adapter_names` is refused: one batch has one adapter.
        """
        base: Any = self.get_base_layer()
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"variant {self.form} cannot mix adapters in one batch; leave out adapter_names")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter = None if self.disable_adapters or self.merged else self._adapter()
        output: Tensor
        if adapter is None:
            output = base(x)
            return output
        weight_OI = self._rows_first(base.weight)
        output = low_rank_linear(
            x,
            weight_OI,
            self._rows_first(keep_of(base.weight, self.mask_of)),
            *self._factors(adapter),
            form=self.form,
            scale=self.scaling[adapter],
        )
        return output if base.bias is None else output + base.bias.to(output.dtype)

    def _adapter(self) -> str | None:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) > 1:
            raise ValueError(f"variant {self.form} takes one adapter at a time, got {active}; activate one of them")
        return active[0] if active else None

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return down_RI and up_OR."""
        down_RI, up_OR = (layers[adapter].weight for layers in (self.lora_A, self.lora_B))
        assert isinstance(down_RI, Tensor)
        assert isinstance(up_OR, Tensor)
        return down_RI, up_OR

    def _rows_first(self, weight: Tensor) -> Tensor:
        """Read a weight as (O, I); GPT-2 stores it the other way round."""
        return weight.T if self.fan_in_fan_out else weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what merging adds to the weight, float32.

        Args:
            adapter: its name.
        """
        base: Any = self.get_base_layer()
        return self._merged(adapter) - base.weight

    @torch.no_grad()
    def _merged(self, adapter: str) -> Tensor:
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        effective_OI = effective_weight(
            self._rows_first(weight),
            self._rows_first(keep_of(weight, self.mask_of)),
            *self._factors(adapter),
            form=self.form,
            scale=self.scaling[adapter],
        )
        return self._rows_first(effective_OI)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight, computed in float32, in place of the base weight.

        Args:
            safe_merge: whether to check for NaN first.
            adapter_names: as in PEFT; one at a time.

        Raises:
            ValueError: if there are several adapters, or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(f"variant {self.form} merges one adapter, got {[*self.merged_adapters, *names]}")
        base: Any = self.get_base_layer()
        merged = self._merged(names[0])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight of adapter {names[0]} is not finite; the adapter is broken")
        self._before_merge[names[0]] = base.weight.data.clone()
        base.weight.data = merged.to(base.weight.dtype).contiguous()
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Put the weight from before the merge back, bit for bit."""
        while self.merged_adapters:
            self.get_base_layer().weight.data = self._before_merge.pop(self.merged_adapters.pop())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: the update is of full rank.

        Args:
            adapter_name: not used.
        """
        return False


def change_class(layer: Any, *, form: LoraForm, mask_of: MaskOf, adapter: str, is_new: bool) -> None:
    """Give a LoRA layer of PEFT the class for a form.

    Args:
        layer: a `LoraLinear`, changed in place; its parameters stay the same tensors.
        form: `plain` guards the merge and changes nothing else.
        mask_of: returns the mask held for a parameter, or None.
        adapter: the adapter's name.
        is_new: whether its factors are to be started anew for the form.
    """
    layer.mask_of = mask_of
    if form == "plain":
        layer.__class__ = GuardedLoraLinear
        return
    layer.__class__ = MaskedLoraLinear
    layer.form, layer._before_merge = form, {}
    if form == "scaled" and is_new:
        start_low_rank(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, form=form)
