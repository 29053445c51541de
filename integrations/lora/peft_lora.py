"""LoRA recovery through PEFT: give a pruned model adapters that keep its zeros, or take over those it has.

`add_lora` wraps a model as `peft.get_peft_model` does; `take_over_lora` changes the layers of a model that a program
has wrapped by itself. What is saved is a PEFT adapter folder. For the forms `masked` and `scaled` its configuration
makes stock PEFT refuse to open it as a plain LoRA, which it is not; `open_adapter` opens it.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.masks import unpack
from lightning_prune.base.names import shorten, unknown
from lightning_prune.conductor.saved_state import load_file
from lightning_prune.integrations.lora.peft_layers import LoraLinear, MaskOf, base_weight, change_class
from lightning_prune.integrations.lora.peft_quantized import is_quantized, mask_quantized
from lightning_prune.recovery.lora_options import LoraForm, check_lora
from lightning_prune.targets.targets import Targets, is_linear

try:
    import peft
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise ImportError('LoRA recovery needs peft: pip install "lightning_prune[peft]"') from error

__all__ = [
    "MASKS_NAME",
    "LoraGradients",
    "PeftModel",
    "add_lora",
    "check_config",
    "lora_layers",
    "masks_by_parameter",
    "open_adapter",
    "take_over_lora",
]

logger = logging.getLogger(__name__)

MASKS_NAME = "lightning_prune_masks.pt"  # beside an adapter: the masks it was trained with, packed to bits
_DEFAULTS = {"r": 16, "lora_alpha": 32, "task_type": "CAUSAL_LM"}  # PERP's defaults; its dropout is 0, as is PEFT's
_OPEN_WITH = "open it with lightning_prune.integrations.peft_lora.open_adapter(model, folder)"
_MARKS = {form: f"lightning_prune, form {form}: this is no plain LoRA; {_OPEN_WITH}" for form in ("masked", "scaled")}


def check_config(form: str, config: Mapping[str, Any]) -> None:
    """Check what can be checked without a model.

    Args:
        form: `masked`, `scaled` or `plain`.
        config: fields of PEFT's LoraConfig.

    Raises:
        ValueError: if the form or a field is unknown, or the form has no use for a field.
    """
    check_lora(form, config)
    known = list(LoraConfig.__dataclass_fields__)
    for name in config:
        if name not in known:  # to an older PEFT
            raise ValueError(
                unknown("key", f"recover.lora.config.{name}", [f"recover.lora.config.{one}" for one in known])
            )
    try:
        LoraConfig(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recover.lora.config: PEFT refuses it: {shorten(str(error), 300)}") from error


def add_lora(
    model: nn.Module,
    *,
    form: LoraForm = "masked",
    config: Mapping[str, Any] | None = None,
    masks: Mapping[str, Tensor] | MaskOf | None = None,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Wrap a pruned model with LoRA layers that keep its zeros.

    Args:
        model: a Hugging Face model, changed in place as PEFT does; its weights are frozen.
        form: `masked` and `scaled` lie inside the masks; `plain` is PEFT's own, with its merge guarded.
        config: fields of PEFT's LoraConfig. Left out: r 16, lora_alpha 32, dropout 0, and as target modules the linear
            layers that are pruned by default.
        masks: by parameter name, bool, True = keep; or a function that returns the mask of a parameter. Left out, what
            is zero in a weight stays zero.
        modules_to_save: further modules trained whole and saved with the adapter, by name.

    Returns:
        the wrapped model.

    Raises:
        ValueError: if the configuration does not fit the model.
    """
    given = {} if config is None else dict(config)
    check_config(form, given)
    options: dict[str, Any] = _DEFAULTS | given
    if "target_modules" not in given and not given.get("target_parameters"):
        is_small = getattr(model, "is_quantized", False)
        options["target_modules"] = "all-linear" if is_small else _default_modules(model)
    # GPT-2 keeps its weights the other way round, which PEFT wants to be told.
    options.setdefault("fan_in_fan_out", any(is_linear(m) and not isinstance(m, nn.Linear) for m in model.modules()))
    if modules_to_save:
        options["modules_to_save"] = [*(options.get("modules_to_save") or ()), *modules_to_save]
    _check_modules(model, options)
    if not callable(getattr(model, "prepare_inputs_for_generation", None)):
        options["task_type"] = given.get("task_type")
    mask_of = masks_by_parameter(model, masks)
    wrapped = get_peft_model(model, LoraConfig(**options))
    _check_ranks(wrapped)
    _convert(wrapped, form=form, mask_of=mask_of, adapter="default", is_new=True)
    return wrapped


def take_over_lora(wrapped: PeftModel, *, form: LoraForm, masks: Mapping[str, Tensor] | MaskOf | None = None) -> None:
    """Let the LoRA layers that a program has made keep zeros; its own configuration stays in force.

    Their dropout is set to 0, which is said in the log: the forms multiply by one finished weight.

    Args:
        wrapped: changed in place, before training starts.
        form: see `add_lora`.
        masks: see `add_lora`.

    Raises:
        ValueError: if the model has no LoRA, or one that cannot be changed.
    """
    adapter = wrapped.active_adapter
    found = wrapped.peft_config.get(adapter) if isinstance(adapter, str) else None
    if not isinstance(found, LoraConfig):
        raise ValueError(
            f"recover.lora takes over the LoRA of this program, but its active adapters are {adapter!r} "
            f"({type(found).__name__}); use one LoRA, or set recover.lora: null"
        )
    _check_ranks(wrapped)
    if form != "plain" and found.lora_dropout:
        distributed.log(
            logger, logging.WARNING, "lora_dropout %s is set to 0: form %s has none", found.lora_dropout, form
        )
        found.lora_dropout = 0.0
        for _, layer in lora_layers(wrapped):
            layer.lora_dropout[adapter] = nn.Identity()
    _convert(wrapped, form=form, mask_of=masks_by_parameter(wrapped, masks), adapter=adapter, is_new=True)


def open_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    is_trainable: bool = False,
    masks: Mapping[str, Tensor] | MaskOf | None = None,
) -> PeftModel:
    """Open an adapter saved from a training with this library, on the pruned model it was trained on.

    Args:
        model: the pruned model, changed in place.
        folder: an adapter folder: a checkpoint, or an export of format adapter.
        is_trainable: whether to train it further.
        masks: see `add_lora`.

    Returns:
        the wrapped model; `merge_and_unload()` keeps its zeros.

    Raises:
        ValueError: if the folder holds no LoRA of PEFT.
    """
    folder = Path(folder).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter_config.json; name a folder that PEFT has saved")
    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} holds a {config.peft_type} adapter; only LoRA keeps zeros")
    marks = {mark: form for form, mark in _MARKS.items()}
    form: Any = marks.get(str(config.init_lora_weights), "plain")
    config.init_lora_weights = True
    mask_of = masks_by_parameter(model, _saved_masks(folder) if masks is None else masks)
    wrapped: PeftModel = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)
    _convert(wrapped, form=form, mask_of=mask_of, adapter="default", is_new=False)
    return wrapped


def _saved_masks(folder: Path) -> dict[str, Tensor] | None:
    """Return the masks saved beside an adapter, if there are any."""
    path = folder / MASKS_NAME
    if not path.is_file():
        return None
    saved = load_file(str(path))
    return {name: unpack(entry["bits"], entry["shape"]) for name, entry in saved.items()}


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the LoRA layers of a model by their name in it."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _is_sparse(weight: Tensor) -> bool:
    return bool((weight == 0).float().mean() > 0.01)


class LoraGradients:
    """Estimates the gradients of frozen weights from those of the LoRA over them; called with a weight.

    With the gradients dA and dB of the factors the estimate is dB A + B dA - dB dA.

    Args:
        wrapped: the model; looked through once.

    Source: LoRAPrune, arXiv 2305.18403, the approximated gradient; aim-uofa/LoRAPrune. A ranking heuristic: in the
        first step B and dA are zero.
    """

    def __init__(self, wrapped: PeftModel) -> None:
        self._adapter = wrapped.active_adapter
        self._layers: dict[int, Any] = {
            id(base_weight(layer)): layer for _, layer in lora_layers(wrapped) if isinstance(layer, LoraLinear)
        }

    def covers(self, parameter: Tensor) -> bool:
        """Return whether a weight has a LoRA."""
        return id(parameter) in self._layers

    def __call__(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (weight with its update, estimate of its gradient), both shaped like the weight."""
        layer = self._layers.get(id(parameter))
        if layer is None:
            return None
        down_RI, up_OR = layer.lora_A[self._adapter].weight, layer.lora_B[self._adapter].weight
        if down_RI.grad is None or up_OR.grad is None:
            return None
        grad_OI = up_OR.grad @ down_RI + up_OR @ down_RI.grad - up_OR.grad @ down_RI.grad
        grad = grad_OI.T if layer.fan_in_fan_out else grad_OI
        return parameter + layer.get_delta_weight(self._adapter), grad


def masks_by_parameter(model: nn.Module, masks: Mapping[str, Tensor] | MaskOf | None) -> MaskOf:
    """Return a function from a parameter to its mask.

    Raises:
        ValueError: if a mask belongs to no parameter of the model.
    """
    if masks is None:
        return lambda parameter: None
    if callable(masks):
        return masks
    bindings = Targets(include=tuple(masks)).resolve(model) if masks else []
    held = {id(binding.parameter): masks[binding.name] for binding in bindings}

    def mask_of(parameter: Tensor) -> Tensor | None:
        mask = held.get(id(parameter))
        if mask is not None and mask.device != parameter.device:  # the model was moved since
            mask = held[id(parameter)] = mask.to(parameter.device)
        return mask

    return mask_of


def _default_modules(model: nn.Module) -> list[str]:
    """Return the linear layers that are pruned by default."""
    targets = {id(binding.module) for binding in Targets().resolve(model)}
    found = [name for name, module in model.named_modules() if id(module) in targets and is_linear(module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in its blocks; set recover.lora.config.target_modules"
        )
    return found


def _check_modules(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse target modules that do not exist; PEFT itself only minds if none of them does."""
    wanted = options.get("target_modules")
    if wanted is None or isinstance(wanted, str):
        return
    names = [name for name, _ in model.named_modules()]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)}
            raise ValueError(unknown("target module", target, sorted(leaves)))


def _check_ranks(wrapped: PeftModel) -> None:
    """Refuse a rank larger than a layer.

    Raises:
        ValueError: naming the first such layer.
    """
    for name, layer in lora_layers(wrapped):
        for rank in layer.r.values():
            if rank > min(layer.in_features, layer.out_features):
                raise ValueError(
                    f"rank r = {rank} is larger than {name}, which is {layer.out_features} x {layer.in_features}; use "
                    f"at most {min(layer.in_features, layer.out_features)}, or leave the layer out of target_modules"
                )


def _convert(wrapped: PeftModel, *, form: LoraForm, mask_of: MaskOf, adapter: str, is_new: bool) -> None:
    for name, layer in lora_layers(wrapped):
        if isinstance(layer, LoraLinear) and not layer.lora_variant:
            change_class(layer, form=form, mask_of=mask_of, adapter=adapter, is_new=is_new)
            continue
        base = layer.get_base_layer()
        if is_quantized(base) and form == "masked":
            mask_quantized(layer, adapter=adapter)
            continue
        is_pruned = is_quantized(base) or mask_of(base.weight) is not None or _is_sparse(base.weight)
        if form != "plain" and is_pruned:
            kind = type(base).__name__
            raise ValueError(
                f"{name} is a {kind} under {type(layer).__module__}.{type(layer).__name__}, whose zeros form {form} "
                "cannot keep; use linear layers without use_dora, form masked if they are quantized, or form plain"
            )
    if form != "plain":
        config: Any = wrapped.peft_config[adapter]
        config.init_lora_weights = _MARKS[form]
