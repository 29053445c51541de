"""What a training writes: probed at its start, compared at its end, and never the loss of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_prune.export import folder as folders
from lightning_prune.integrations.runs import run_export
from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.report import page as report_page
from tests.loops import NUM_STEPS, adamw, assert_same_weights, recipe, train
from tests.tiny_models import tiny_llama

RECOVER = {"recover": {"lora": {"form": "masked", "config": {"r": 4}}}}


def job(out: Path | None, **sections: Any) -> dict[str, Any]:
    return recipe() | ({} if out is None else {"export": {"format": "huggingface", "dir": str(out)}}) | sections


def start(run: PruningRun, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    settings: dict[str, Any] = {"total_steps": NUM_STEPS, "tokenizer": None, "log": lambda metrics: None}
    run.start(model, [optimizer], **settings | options)
    return optimizer


def finished(run: PruningRun, model: Any = None, **options: Any) -> Any:
    """Train a model to the end of a run and return it."""
    model = tiny_llama() if model is None else model
    optimizer = start(run, model, **options)
    train(model, optimizer, after_step=lambda step: run.after_step())
    run.finish()
    return model


COVERED = ("q_proj.weight", "down_proj.weight")  # by the adapters, and therefore pruned


def with_lora() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def share_of_zeros(model: nn.Module) -> float:
    weights = [p for name, p in model.named_parameters() if name.endswith(COVERED)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# Adapters over pruned weights


def test_adapters_that_alone_reach_the_disk_are_refused() -> None:
    run = PruningRun(job(None))
    with pytest.raises(ValueError, match=r"the pruned weights would be lost\. Set export\.dir, to which the pruned"):
        start(run, with_lora(), saves_whole=False)
    assert not run.sparsifier.is_attached


def test_checkpoints_that_hold_everything_are_told_what_save_pretrained_leaves_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    start(PruningRun(job(None)), with_lora(), saves_whole=True)
    assert "the save_pretrained of this model writes the adapter alone; set export.dir" in caplog.text


def test_the_pruned_base_is_written_and_the_adapter_beside_it(tmp_path: Path) -> None:
    run = PruningRun(job(tmp_path / "out"))
    trained = finished(run, with_lora(), saves_whole=False)
    assert run.broken == ()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert share_of_zeros(base) == 0.5
    found = dict(base.named_parameters())
    wrapped = dict(trained.get_base_model().named_parameters())
    assert all(torch.equal(weight, found[name]) for name, weight in wrapped.items() if name in found)
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "out")
    assert trained.peft_config["default"].base_model_name_or_path != str(tmp_path / "out")
    ids_BT = torch.arange(8)[None]
    opened = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(opened(ids_BT).logits, trained.eval()(ids_BT).logits)
    note = next(note for note in run.report().notes if "not merged" in note)
    assert f'from_pretrained("{tmp_path / "out"}")' in note


def test_masked_adapters_without_a_folder_are_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    run = PruningRun(job(None, **RECOVER))
    start(run, run.prepare(tiny_llama()), saves_whole=False)
    assert "what the trainer saves is the adapter alone, and the model below it" in caplog.text
    assert "opens on the pruned model with lightning_prune.integrations.peft_lora.open_adapter" in caplog.text
    run.abort()


def test_masked_adapters_with_a_folder_are_told_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = PruningRun(job(tmp_path / "out", **RECOVER))
    start(run, run.prepare(tiny_llama()), saves_whole=False)
    assert "adapter alone" not in caplog.text
    run.abort()


def test_masked_adapters_are_merged_or_written_alone_as_the_recipe_says(tmp_path: Path) -> None:
    for form in ("huggingface", "adapter"):
        out = tmp_path / form
        run = PruningRun(job(None, **RECOVER, export={"format": form, "dir": str(out)}))
        finished(run, run.prepare(tiny_llama()))
        assert (out / "adapter_config.json").exists() == (form == "adapter")
        assert (out / "model.safetensors").exists() == (form == "huggingface")


def test_units_that_masks_left_are_all_that_is_written(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"granularity": "Channel", "targets": {"include": ["*.mlp.down_proj.weight"]}}
    source = recipe(0.25, scorer={"class_path": "Magnitude", "init_args": {"scope": "tensor"}}, **parts)
    out = tmp_path / "out"
    finished(PruningRun(source | {"shrink": {"zeros": True}, "export": {"format": "huggingface", "dir": str(out)}}))
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == 36


# Folders


@pytest.mark.parametrize("section", ["export", "report"])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    sections = {section: {"dir": str(tmp_path / "in_a_file" / "out")}}
    (tmp_path / "in_a_file").write_text("x")
    run = PruningRun(job(None, **sections))
    with pytest.raises(ValueError, match=r"cannot write into the folder .*in_a_file"):
        start(run, tiny_llama())
    assert not run.sparsifier.is_attached


def test_a_finished_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_PROGRAM", "another")
        finished(PruningRun(job(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"there is nothing left to do: set export\.overwrite: true to make it again"):
        start(PruningRun(job(tmp_path / "out")), tiny_llama())
    source = job(tmp_path / "out")
    source["export"]["overwrite"] = True
    model = finished(PruningRun(source), tiny_llama(seed=3))
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_the_second_of_two_folds_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = PruningRun(job(tmp_path / "out"))
    finished(run)
    assert "holds an earlier export" not in caplog.text
    second = finished(run, tiny_llama(seed=3))
    assert "holds an earlier export, which the one of this training will replace" in caplog.text
    assert run.broken == ()
    assert_same_weights(second, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_an_export_that_the_disk_refuses_goes_to_the_trainers_folder(tmp_path: Path) -> None:
    run = PruningRun(job(tmp_path / "out"))
    model = tiny_llama()
    optimizer = start(run, model, spare=tmp_path / "run")
    train(model, optimizer)
    (tmp_path / "out").write_text("filled while it trained")
    run.finish()
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lightning_prune_export"))
    assert (tmp_path / "out").read_text() == "filled while it trained"
    assert [sentence.split(str(tmp_path))[0] for sentence in run.broken] == [
        "the export could not be written to ",
        "the export was written to ",
    ]


def test_without_such_a_folder_the_model_stays_in_memory(tmp_path: Path) -> None:
    run = PruningRun(job(tmp_path / "out"))
    model = tiny_llama()
    train(model, start(run, model))
    (tmp_path / "out").write_text("filled while it trained")
    run.finish()
    assert "in memory alone: save them with the trainer or the model" in run.broken[-1]


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Path:
        raise OSError(28, "No space left on device")

    run = PruningRun(job(tmp_path / "out", report={"dir": str(tmp_path / "page")}))
    monkeypatch.setattr(report_page, "write_report", fail)
    finished(run)
    assert run.broken == (
        f"the report could not be written to {tmp_path / 'page'}: [Errno 28] No space left on device",
    )
    assert share_of_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == 0.5


# What was written is what was trained


def test_an_export_that_lost_zeros_is_said_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = run_export.export_huggingface

    def fills(model: nn.Module, out: str, *, state_dict: dict[str, Any], **options: Any) -> Path:
        name = "model.layers.1.mlp.up_proj.weight"
        return write(model, out, state_dict=state_dict | {name: state_dict[name] + 1.0}, **options)

    monkeypatch.setattr(run_export, "export_huggingface", fills)
    run = PruningRun(job(tmp_path / "out"))
    finished(run)
    assert len(run.broken) == 1
    assert run.broken[0].endswith("of 1 targets, first model.layers.1.mlp.up_proj.weight")
    assert run.broken[0] in run.report().notes


@pytest.mark.parametrize("form", ["dense", "huggingface"])
def test_an_export_as_promised_breaks_nothing(tmp_path: Path, form: str) -> None:
    run = PruningRun(recipe() | {"export": {"format": form, "dir": str(tmp_path / "out")}})
    finished(run)
    assert run.broken == ()


def test_a_clock_that_never_ran_is_an_error(tmp_path: Path) -> None:
    run = PruningRun(job(tmp_path / "out", report={"dir": str(tmp_path / "page")}))
    start(run, tiny_llama())
    with pytest.raises(ValueError, match="nothing was pruned: no optimizer step was seen"):
        run.finish()
    assert not run.sparsifier.is_attached
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "page" / "report.json").exists()


def test_a_stream_that_ended_early_is_broken(tmp_path: Path) -> None:
    run = PruningRun(job(tmp_path / "out"))
    model = tiny_llama()
    train(model, start(run, model), last=4)
    run.finish()
    assert "training ended at step 4 of a schedule that ends at step 8" in run.broken[0]
