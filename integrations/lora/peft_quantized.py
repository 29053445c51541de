"""MaskLoRA over a frozen quantized weight: the update is computed inside the mask, beside the quantized product.

The mask is read once from the dequantized weight, since a weight that is zero stays an exact zero in NF4 and in int8,
and is kept as one byte per weight. Merging is refused: it would round the update to the quantization levels and could
fill zeros. Open the adapter on the unquantized pruned model and merge there.

Source: the update, Zimmer et al., PERP, arXiv 2312.15230; training beside a 4-bit weight, Dettmers et al., QLoRA,
    arXiv 2305.14314. The order (infer the mask once, never from quantized values later) is ours.
Limits: layers of PEFT that quantize and can be dequantized by it (bitsandbytes, HQQ, torchao).

Shapes: O output features, I input features.
"""

import copy
from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lightning_prune.recovery.low_rank import low_rank_linear

__all__ = ["is_quantized", "mask_quantized"]

_MASK = "lightning_prune_mask"


def is_quantized(base: nn.Module) -> bool:
    """Return whether a layer's weight is stored in fewer values than it has."""
    weight = getattr(base, "weight", None)
    return hasattr(base, "W_q") or not isinstance(weight, Tensor) or not weight.is_floating_point()


@torch.no_grad()
def mask_quantized(layer: LoraLayer, *, adapter: str) -> None:
    """Keep the update of a LoRA layer inside the zeros of its quantized weight.

    Args:
        layer: changed in place.
        adapter: the adapter's name.

    Raises:
        ValueError: if the layer is a variant of LoRA already, such as DoRA, or its weight cannot be read any more.
    """
    if layer.lora_variant:
        raise ValueError("a quantized layer with DoRA or another variant cannot be masked; use plain LoRA options")
    base, down_RI = layer.get_base_layer(), _factor(layer, "A", adapter)
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has packed the weights for inference on this processor, and their zeros cannot be read any "
            "more; add the LoRA before the first forward pass in evaluation mode"
        )
    keep_OI = dequantize_module_weight(copy.deepcopy(base)) != 0  # reading int8 would drop its scales
    base.register_buffer(_MASK, keep_OI.to(down_RI.device), persistent=False)
    layer.lora_variant[adapter] = _MaskedBesideQuantized()


class _MaskedBesideQuantized(LoraVariant):
    """What PEFT calls in place of its own update."""

    def supports_lora_conversion(self) -> bool:
        """Return False: the update is of full rank."""
        return False

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the masked update to the product with the quantized weight.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            x: (..., I).
            result: (..., O), of the quantized weight.
            kwargs: not used.
        """
        keep_OI: Tensor = getattr(module.get_base_layer(), _MASK)
        update = low_rank_linear(
            x,
            None,
            keep_OI,
            _factor(module, "A", active_adapter),
            _factor(module, "B", active_adapter),
            form="masked",
            scale=module.scaling[active_adapter],
        )
        return result + update.to(result.dtype)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refuse."""
        _refuse()

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Refuse."""
        _refuse()


def _factor(layer: LoraLayer, side: str, adapter: str) -> Tensor:
    weight: Tensor = getattr(layer, f"lora_{side}")[adapter].weight
    return weight


def _refuse() -> NoReturn:
    raise ValueError(
        "merging into a quantized weight would round the update and could fill zeros; save the adapter, open the "
        "unquantized pruned model, and merge there: peft_merge.merge(peft_lora.open_adapter(model, folder))"
    )
