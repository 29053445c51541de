"""The options of LoRA adapters: checked when a recipe is loaded, with neither PEFT nor a model."""

import re
import subprocess
import sys
from typing import Any

import peft
import pytest

from lightning_prune import Recipe
from lightning_prune.recovery.lora_options import FIELDS, check_lora

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r must be 1 or more, got 0"),
    ({"r": -2}, "r must be 1 or more, got -2"),
    ({"r": 2.5}, "r must be a whole number, got 2.5"),
    ({"r": "8"}, "r must be a whole number, got '8'"),
    ({"r": True}, "r must be a whole number, got True"),
    ({"r": None}, "r must not be null"),
    ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a whole number or"),
    ({"lora_alpha": float("inf")}, "lora_alpha must be a whole number or"),
    ({"lora_dropout": 1.0}, r"lora_dropout must be in [0, 1), got 1.0"),
    ({"lora_dropout": -0.1}, r"lora_dropout must be in [0, 1), got -0.1"),
    ({"bias": "both"}, "bias must be one of none, all, lora_only, got 'both'"),
    ({"task_type": "CAUSAL"}, "task_type must be one of CAUSAL_LM, SEQ_2_SEQ_LM"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"),
    ({"fan_in_fan_out": None}, "fan_in_fan_out must not be null"),
    ({"target_modules": 3}, "target_modules must be"),
    ({"target_modules": ["q_proj", 3]}, "target_modules"),
    ({"target_modules": ""}, "target_modules"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"modules_to_save": [None]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj must be 1 or more, got 0"),
    ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.q_proj must be a whole number"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern.q_proj must be above 0, got -1"),
    ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be"),
    ({"init_lora_weights": 2}, "init_lora_weights must be"),
    ({"rank": 4}, "unknown key 'recover.lora.config.rank'"),
    ({"lora_alhpa": 4}, "did you mean 'recover.lora.config.lora_alpha'?"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_bad_value_is_one_line_when_the_recipe_is_loaded(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_lora("masked", config)
    content = {"recover": {"lora": {"form": "plain", "config": config}}, "export": {"format": "adapter"}}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Recipe.load(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["masked", "scaled", "plain"])
def test_what_peft_takes_is_taken(form: str) -> None:
    config = {
        "r": 8,
        "lora_alpha": 0.5,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "modules_to_save": None,
        "rank_pattern": {"q_proj": 2},
        "bias": "lora_only",
        "task_type": None,
        "use_rslora": True,
    }
    check_lora(form, config)
    assert Recipe.load({"recover": {"lora": {"form": form, "config": config}}}).recover.lora.config == config


@pytest.mark.parametrize("form", ["masked", "scaled"])
@pytest.mark.parametrize(
    "config", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_what_a_form_within_masks_has_no_place_for_is_taken_by_plain_alone(form: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"form {form} .*{next(iter(config))}"):
        check_lora(form, config)
    check_lora("plain", config)


def test_every_field_of_the_installed_peft_is_known() -> None:
    assert set(peft.LoraConfig.__dataclass_fields__) <= set(FIELDS)


def test_loading_a_recipe_with_adapters_imports_no_peft() -> None:
    script = (
        "import sys; from lightning_prune import Recipe; Recipe.load({'recover': {'lora': {'config': {'r': 4}}}}); "
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
