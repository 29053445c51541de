"""What a conditioned training keeps for its report: measurements by step, counts of units, and one prompt served."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.conditional.instruction import NAME, Instruction, InstructionCondition
from lightning_prune.integrations.instruction.condition_run import ConditionRun
from lightning_prune.integrations.instruction.first_token import first_token
from lightning_prune.integrations.instruction.record import ConditionRecord, num_activated
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.collapse import Conditioning, overlaps
from lightning_prune.predictors.prompt import Reads
from lightning_prune.predictors.sub_model import Selection, SubModels
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.structure import Stack
from tests.integrations.instruction.test_condition_run import recipe, train_hf
from tests.loops import NUM_STEPS
from tests.tiny_models import tiny_llama, token_windows


def conditioned(**options: Any) -> InstructionCondition:
    torch.manual_seed(3)
    method = Instruction(budget=Budget(keep=0.5), **options)
    condition = method.insert(tiny_llama().eval(), Stack((), "", (), 2))
    torch.nn.init.normal_(condition.predictor.head.outer.weight)
    return condition


def measured(step: float) -> Conditioning:
    chosen = torch.tensor([[True, True, False, False], [True, False, True, False]])
    return Conditioning(0.5, (0.5,), 0.1, 0.25, 2.0 + step, 1.5, choices=(chosen,))


def test_a_measurement_takes_the_place_of_those_that_a_resume_repeats() -> None:
    record = ConditionRecord()
    assert record.last_step == -1
    for step in (5, 10, 15):
        record.add(step, measured(step), ["say  this\n", "that"])
    again = ConditionRecord()
    again.load_state_dict(json.loads(json.dumps(record.state_dict())))
    again.add(10, measured(0), ["x", "y"])
    assert [entry["step"] for entry in again.measurements] == [5, 10]
    assert again.measurements[0] == {
        "step": 5,
        "overlap": 0.5,
        "score_spread": 0.1,
        "swap_cost": 0.25,
        "own_loss": 7.0,
        "whole_loss": 1.5,
        "by_group": [0.5],
        "swapped_loss": 7.25,
    }
    assert record.instructions == ["say this", "that"]
    # by hand: one of three units is in both; it is in every choice, and three are in any
    assert record.between[0] == pytest.approx([1.0, 1 / 3])
    assert record.usage == [{"always": 1, "ever": 3}]


def test_overlaps_are_the_mean_over_groups() -> None:
    first = torch.tensor([[True, False], [True, False]])
    second = torch.tensor([[True, False], [False, True]])
    assert overlaps([first, second]) == [[1.0, 0.5], [0.5, 1.0]]


def test_activated_parameters_are_those_of_the_small_model() -> None:
    condition = conditioned()
    groups, keep = condition.predictor.units.groups, condition.predictor.keep
    masks = condition.predictor.masks([torch.randn(1, group.num_units) for group in groups])
    small = SubModels(condition.model, groups, without=NAME).gather(Selection.of(masks, keep))
    assert num_activated(condition.model, groups, keep) == sum(p.numel() for p in small.parameters())
    everything = [group.num_units for group in groups]
    assert num_activated(condition.model, groups, everything) == sum(p.numel() for p in tiny_llama().parameters())


def test_a_served_prompt_is_timed_and_equals_the_masked_model() -> None:
    condition = conditioned()
    found = first_token(condition, token_windows(1))
    assert found["difference"] < 1e-5
    assert all(found[part] > 0 for part in ("predicting", "gathering", "prefill", "whole_prefill"))
    assert (found["num_tokens"], found["device"]) == (token_windows(1).shape[1], "cpu")


def test_what_cannot_be_served_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    record, condition = ConditionRecord(), conditioned()
    monkeypatch.setattr("lightning_prune.base.distributed.is_sharded", lambda tensor: True)
    record.serve(condition, token_windows(1))
    assert record.as_dict(condition)["first_token"]["note"].startswith("the model is sharded")
    assert "serving was not timed" in caplog.text


def test_losses_under_masks_are_of_the_same_tokens() -> None:
    condition = conditioned(reads=Reads(source="chunk", chunk=4, dropout=0.0))
    ids = token_windows(4)
    found = condition.measure({"input_ids": ids, "labels": ids})
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad(), condition.whole():
        assert found.whole_loss == pytest.approx(float(condition.model(input_ids=ids, labels=labels).loss), abs=1e-5)
    with torch.no_grad():
        assert found.own_loss == pytest.approx(float(condition.model(input_ids=ids, labels=labels).loss), abs=1e-5)


def test_the_report_of_a_training_holds_its_measurements(tmp_path: Path) -> None:
    train_hf(Recipe.load(recipe(), overrides=[f"report.dir={tmp_path / 'report'}"]), tmp_path / "run")
    condition = json.loads((tmp_path / "report" / "report.json").read_text())["condition"]
    steps = [entry["step"] for entry in condition["measurements"]]
    assert steps[0] == 5
    assert steps[-1] == NUM_STEPS
    assert len(condition["between"]) == len(condition["instructions"]) == 4
    assert condition["first_token"]["difference"] < 1e-4
    assert all(group["keep"] * 2 == group["num_units"] for group in condition["groups"])
    assert (tmp_path / "report" / "overlaps.png").is_file()


def test_a_resumed_training_keeps_what_was_measured(tmp_path: Path) -> None:
    given = recipe()
    callback = PruningCallback(given)
    run = callback.run.condition
    assert isinstance(run, ConditionRun)
    run._record.add(5, measured(0), ["a", "b"])
    other = ConditionRun(run.method)
    other.load_state_dict(run.state_dict())
    assert other._record.measurements == run._record.measurements
