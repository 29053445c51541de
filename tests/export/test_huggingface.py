"""Hugging Face exports load with the stock loader."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lightning_prune import Once, Sparsifier
from lightning_prune.export.huggingface import check_huggingface, export_huggingface
from tests.tiny_models import tiny_llama


class FakeTokenizer:
    """Writes one file, as a tokenizer would."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("tied", [True, False])
def test_stock_loader_opens_the_sparse_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    report = Sparsifier(schedule=Once(sparsity=0.5)).prune_once(model, progress=False)
    out = export_huggingface(model, tmp_path / "out", tokenizer=FakeTokenizer(), report=report, recipe={"seed": 0})
    assert out == tmp_path / "out"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert int((loaded.state_dict()[name] == 0).sum()) == loaded.state_dict()[name].numel() // 2
    assert (out / "tokenizer.json").exists()
    assert json.loads((out / "sparsity.json").read_text())["targets"][name] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_given_tensors_take_the_place_of_the_models_own(tmp_path: Path) -> None:
    model = tiny_llama()
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    loaded = AutoModelForCausalLM.from_pretrained(export_huggingface(model, tmp_path / "out", state_dict=zeros))
    assert not any(value.any() for value in loaded.state_dict().values())


def test_what_is_written_beside_the_model_appears_with_it_or_not_at_all(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        assert not (tmp_path / "out").exists()
        (folder / "more").write_text("x")
        if (tmp_path / "whole").exists():
            raise OSError("disk full")

    out = export_huggingface(tiny_llama(), tmp_path / "out", beside=write)
    assert (out / "more").exists()
    out.rename(tmp_path / "whole")
    with pytest.raises(OSError, match="disk full"):
        export_huggingface(tiny_llama(), tmp_path / "out", beside=write)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_failing_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_huggingface(tiny_llama(), tmp_path / "out", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs save_pretrained, which Linear lacks; use format dense"):
        check_huggingface(torch.nn.Linear(2, 2), tmp_path)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="would write the adapters and not the pruned weights"):
        check_huggingface(adapted, tmp_path)
    (tmp_path / "old").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        check_huggingface(tiny_llama(), tmp_path)
