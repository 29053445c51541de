"""Calibration text becomes windows, and one-shot runs evaluate, prune, export and report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lightning_prune.base.types import Report
from lightning_prune.integrations.folders import hf_oneshot
from lightning_prune.integrations.folders.hf_oneshot import export_model, run_oneshot
from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.integrations.text import calibration_text
from tests.model_folders import TEXT, character_tokenizer, write_model_folder


def test_evaluations_frame_the_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model_folder(tmp_path / "model")
    zeros: list[int] = []

    class Harness:
        @staticmethod
        def check_tasks(tasks: list[str], include_path: str | None) -> None:
            assert (tasks, include_path) == (["fox"], None)

        @staticmethod
        def evaluate_model(model: torch.nn.Module, tokenizer: object, **options: object) -> dict[str, dict[str, float]]:
            zeros.append(sum(int((weight == 0).sum()) for name, weight in model.named_parameters() if "proj" in name))
            return {"fox": {"acc": 1.0 / len(zeros)}}

    monkeypatch.setattr(PruningRun, "_harness", staticmethod(lambda: Harness))
    report = run_oneshot(
        "oneshot/magnitude_half",
        model=str(folder),
        out=str(tmp_path / "out"),
        overrides=["evaluate.tasks=[fox]", f"report.dir={tmp_path / 'page'}"],
        device="cpu",
    )
    total = sum(target.num_weights for target in report.targets)
    assert zeros == [0, total // 2]
    written = json.loads((tmp_path / "page" / "report.json").read_text())
    assert [(entry["label"], entry["results"]) for entry in written["evaluations"]] == [
        ("before", {"fox": {"acc": 1.0}}),
        ("after", {"fox": {"acc": 0.5}}),
    ]


def test_the_recipes_form_is_kept(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    out = tmp_path / "out"
    overrides = ["export.format=dense"]
    run_oneshot("oneshot/magnitude_half", model=str(folder), out=str(out), overrides=overrides, device="cpu")
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "sparsity.json"]


def test_another_form_carries_the_note_along(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    sparse = tmp_path / "sparse"
    overrides = ['prune.targets.include=["*.mlp.*.weight"]']
    run_oneshot("oneshot/magnitude_half", model=str(folder), out=str(sparse), overrides=overrides, device="cpu")
    note = json.loads((sparse / "sparsity.json").read_text())
    expected = AutoModelForCausalLM.from_pretrained(sparse).state_dict()
    for form in ("dense", "huggingface"):
        export_model(str(sparse), str(tmp_path / form), form=form)
        assert json.loads((tmp_path / form / "sparsity.json").read_text()) == note
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == ["model.safetensors", "sparsity.json"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface").state_dict()
    assert all(torch.equal(opened[name], value) for name, value in expected.items())
    assert set(note["targets"].values()) == {0.5}
    assert len(note["targets"]) == 2 * 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sparsity.json", b"{", r"sparsity\.json is damaged: Expecting property name"),
        ("sparsity.json", b"\xff\xfe", r"sparsity\.json is damaged: .*; take it from the folder .*, or delete it"),
        ("sparsity.json", b"[1]", r"sparsity\.json is damaged: the whole must be a mapping, got list"),
        ("sparsity.json", b'{"targets": 3}', r"sparsity\.json is damaged: targets must be a mapping, got int"),
        ("sparsity.json", b'{"targets": {}, "recipe": 7}', r"sparsity\.json is damaged: recipe must be a mapping"),
        ("sparsity.json", b'{"targets": {"x": 1}}', r"sparsity\.json is not of this model: target pattern 'x'"),
        ("lightning_prune.json", b"[]", r"lightning_prune\.json holds no plan"),
    ],
)
def test_a_damaged_note_is_told_and_nothing_is_written(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / file).write_bytes(content)
    for form in ("dense", "huggingface"):
        with pytest.raises(ValueError, match=message):
            export_model(str(folder), str(tmp_path / "out"), form=form)
    assert (folder / file).read_bytes() == content
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["report.dir", "out"])
def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_opened(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = str(tmp_path / "file" / "inside")
    overrides = [f"report.dir={wrong}"] if place == "report.dir" else []
    out = wrong if place == "out" else str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"cannot write into the folder .*/file"):
        run_oneshot("oneshot/magnitude_half", model="no/model", out=out, overrides=overrides)


@pytest.mark.parametrize("name", ["./missing", "/missing/model"])
def test_missing_folders_are_not_taken_for_hub_ids(name: str) -> None:
    with pytest.raises(ValueError, match="there is no model folder"):
        hf_oneshot.load_model(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        hf_oneshot.load_model(str(tmp_path))


def test_text_is_read_from_the_file_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model_folder(tmp_path / "model")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in (TEXT, TEXT)))
    seen: list[torch.Tensor] = []

    def remember(model: object, ids_NT: torch.Tensor, **options: object) -> list[dict[str, torch.Tensor]]:
        seen.append(ids_NT)
        return [{"input_ids": ids_NT}]

    monkeypatch.setattr(calibration_text, "text_batches", remember)
    options = {"num_sequences": 2, "sequence_length": 9, "device": "cpu"}
    data = str(tmp_path / "lines.jsonl")
    run_oneshot("oneshot/wanda_half", model=str(folder), out=str(tmp_path / "out"), data=data, **options)  # type: ignore[arg-type]
    tokenizer = character_tokenizer()
    assert [tokenizer.decode(ids).replace(" ", "") for ids in seen[0]] == ["thequick", "brownfo"]


REFIT = {
    "prune": {"scorer": "Wanda", "schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5}}},
    "recover": {"reconstruct": {}},
    "export": {"format": "huggingface"},
}


def refit(folder: Path, out: Path, text: Path, **sections: Any) -> Report:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(REFIT | sections))
    options: dict[str, Any] = {"num_sequences": 16, "sequence_length": 16, "device": "cpu", "data": str(text)}
    return run_oneshot(str(recipe), model=str(folder), out=str(out), **options)


def test_kept_weights_are_refitted_whether_the_model_is_pruned_here_or_came_so(tmp_path: Path) -> None:
    dense = write_model_folder(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    refit(dense, tmp_path / "pruned", text, recover=None)
    refit(dense, tmp_path / "here", text)
    parent = {"reconstruct": {"parent": str(dense)}}
    report = refit(tmp_path / "pruned", tmp_path / "came", text, prune=None, recover=parent)
    pruned, here, came = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("pruned", "here", "came")
    )
    names = [name for name in pruned if "proj" in name]
    assert all(torch.equal(here[name] != 0, pruned[name] != 0) for name in names)
    assert all(torch.equal(here[name], came[name]) for name in here)
    assert not any(torch.equal(here[name], pruned[name]) for name in names)
    share = next(note for note in report.notes if note.startswith("refitted"))
    assert float(share.removeprefix("refitted: squared output error ").removesuffix(" of that before")) < 1


def test_a_refit_that_cannot_work_is_refused(tmp_path: Path) -> None:
    dense = write_model_folder(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    parent = {"reconstruct": {"parent": str(dense)}}
    for name, sections, message in (
        ("a", {"prune": None}, "set recover.reconstruct.parent to its folder"),
        ("b", {"recover": parent}, "parent has no effect"),
        ("c", {"recover": parent, "prune": None}, "needs the masks of a pruned model, got none"),
        ("d", {"recover": {"retrain": ["norms"]}}, "need a training"),
    ):
        with pytest.raises(ValueError, match=message):
            refit(dense, tmp_path / name, text, **sections)
