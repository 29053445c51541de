"""Check the options of LoRA adapters before PEFT, or a model, is loaded.

Source: the fields of `peft.LoraConfig` in PEFT 0.17 to 0.21, and the ranges that its layers demand.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from lightning_prune.base.names import unknown
from lightning_prune.base.plain_values import read

__all__ = ["FIELDS", "LoraForm", "check_lora"]

LoraForm = Literal["masked", "scaled", "plain"]

_PLACE = "recover.lora.config"
_TASKS = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
FIELDS: Mapping[str, Any] = {
    "r": int,
    "lora_alpha": int | float,
    "lora_dropout": float,
    "target_modules": str | list[str] | None,
    "exclude_modules": str | list[str] | None,
    "target_parameters": list[str] | None,
    "modules_to_save": list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, int | float] | None,
    "bias": Literal["none", "all", "lora_only"],
    "task_type": _TASKS | None,
    "init_lora_weights": bool | str,
    "ensure_weight_tying": bool,
    "fan_in_fan_out": bool,
    "inference_mode": bool,
    "lora_bias": bool,
    "use_dora": bool,
    "use_qalora": bool,
    "use_rslora": bool,
    # What has classes of its own in PEFT, which checks it when a training starts.
    "alora_invocation_tokens": Any,
    "arrow_config": Any,
    "auto_mapping": Any,
    "base_model_name_or_path": Any,
    "corda_config": Any,
    "eva_config": Any,
    "kasa_config": Any,
    "layer_replication": Any,
    "loftq_config": Any,
    "lora_ga_config": Any,
    "megatron_config": Any,
    "megatron_core": Any,
    "monteclora_config": Any,
    "peft_type": Any,
    "peft_version": Any,
    "qalora_group_size": Any,
    "revision": Any,
    "runtime_config": Any,
    "trainable_token_indices": Any,
    "use_bdlora": Any,
    "velora_config": Any,
}


def check_lora(form: str, config: Mapping[str, Any]) -> None:
    """Check what can be checked without PEFT and without a model.

    Args:
        form: `masked`, `scaled` or `plain`.
        config: fields of PEFT's LoraConfig.

    Raises:
        ValueError: if the form or a field is unknown, a value is out of its range, or the form has no use for a field.
    """
    if form not in get_args(LoraForm):
        raise ValueError(f"recover.lora.form must be one of {', '.join(get_args(LoraForm))}, got {form!r}")
    for name, value in config.items():
        if name not in FIELDS:
            raise ValueError(unknown("key", f"{_PLACE}.{name}", [f"{_PLACE}.{one}" for one in FIELDS]))
        read(FIELDS[name], value, f"{_PLACE}.{name}")
    _check_ranges(config)
    if form == "plain":
        return
    for name in ("lora_dropout", "use_dora", "lora_bias"):
        if config.get(name):
            raise ValueError(
                f"form {form} multiplies by one finished weight, which leaves no place for {name}; remove it from "
                f"{_PLACE}"
            )
    if config.get("init_lora_weights", True) is not True:
        raise ValueError(f"form {form} has a start of its own; remove init_lora_weights from {_PLACE}")


def _check_ranges(config: Mapping[str, Any]) -> None:
    ranks = {"r": config.get("r", 1), **_by_module(config, "rank_pattern")}
    for name, rank in ranks.items():
        if rank < 1:
            raise ValueError(f"{_PLACE}.{name} must be 1 or more, got {rank}")
    alphas = {"lora_alpha": config.get("lora_alpha", 1), **_by_module(config, "alpha_pattern")}
    for name, alpha in alphas.items():
        if alpha <= 0:
            raise ValueError(f"{_PLACE}.{name} must be above 0, got {alpha}; at 0 nothing is learned")
    if not 0 <= config.get("lora_dropout", 0) < 1:
        raise ValueError(f"{_PLACE}.lora_dropout must be in [0, 1), got {config['lora_dropout']}")
    if not config.get("target_modules", True) and not config.get("target_parameters"):
        raise ValueError(
            f"{_PLACE}.target_modules is empty, so no layer would get an adapter; name some, or leave it out for the "
            "layers that are pruned"
        )


def _by_module(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {f"{field}.{module}": value for module, value in (config.get(field) or {}).items()}
