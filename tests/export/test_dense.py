"""Dense exports load with plain torch and hold every value."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_prune import Once, Sparsifier
from lightning_prune.export import dense
from lightning_prune.export.dense import export_dense
from tests.tiny_models import tiny_llama


def test_safetensors_file_loads_strictly_and_keeps_zeros(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    report = Sparsifier(schedule=Once(sparsity=0.5)).prune_once(model, progress=False)
    path = export_dense(model, tmp_path / "out", report=report, recipe={"seed": 0})
    assert path == tmp_path / "out" / "model.safetensors"
    fresh = tiny_llama(tied=True, seed=1)
    fresh.load_state_dict(load_file(path), strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    note = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert note["sparsity"] == 0.5
    assert set(note["targets"]) == {target.name for target in report.targets}


def test_without_safetensors_a_torch_file_that_holds_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None)
    model = torch.nn.Linear(3, 2)
    path = export_dense(model, tmp_path / "out")
    assert path.name == "model.pt"
    loaded = torch.load(path, weights_only=True)
    assert {name: value.tolist() for name, value in loaded.items()} == {
        "weight": model.weight.tolist(),
        "bias": model.bias.tolist(),
    }
    assert not (tmp_path / "out" / "sparsity.json").exists()


def test_given_tensors_take_the_place_of_the_models_own(tmp_path: Path) -> None:
    path = export_dense(torch.nn.Linear(2, 1), tmp_path / "out", state_dict={"weight": torch.tensor([[1.0, 0.0]])})
    assert {name: value.tolist() for name, value in load_file(path).items()} == {"weight": [[1.0, 0.0]]}


def test_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        export_dense(torch.nn.Linear(2, 1), tmp_path)
