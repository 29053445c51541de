import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prune.cli import command as cli
from lightning_prune.conditional.instruction import Instruction
from lightning_prune.integrations.instruction.folder import save_conditional
from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.predictors.budget import Budget
from lightning_prune.structured.structure import Stack
from tests.model_folders import character_tokenizer, write_model_folder
from tests.tiny_models import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    condition = Instruction(budget=Budget(keep=0.75, keep_from=0.25)).insert(tiny_llama().eval(), Stack((), "", (), 2))
    nn.init.normal_(condition.predictor.head.outer.bias)
    condition.predictor.num_steps.fill_(7)
    return save_conditional(condition, tmp_path / "model", tokenizer=character_tokenizer())


def test_the_command_writes_a_plain_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["--model", str(folder), "--out", str(out), "--device", "cpu"]
    assert cli.main(["select", *asked, "--instruction", "add up: ", "--keep", "0.35"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    small, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert small.config.intermediate_size == 16
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("add up: 1 + 1")["input_ids"]])
    expected = InstructionModel.from_pretrained(folder, device="cpu").select("add up: ", keep=0.35)
    torch.testing.assert_close(small(ids).logits, expected(ids).logits)
    note = json.loads((out / "lightning_prune.json").read_text())
    assert note["plan"]["method"] == {"class_path": "Instruction", "instruction": "add up: ", "keep": 0.35}
    assert note["metrics"]["parameters"]["after"] == sum(p.numel() for p in small.parameters())
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert note["metrics"]["parameters"]["before"] == sum(p.numel() for p in whole.parameters())


@pytest.mark.slow
def test_the_folder_opens_in_a_process_without_the_library(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["select", "--model", str(folder), "--out", str(out), "--instruction", "abc", "--device=cpu"]) == 0
    program = (
        "import sys; sys.modules['lightning_prune'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(AutoModelForCausalLM.from_pretrained({str(out)!r}).config.intermediate_size)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "32"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "either --instruction or --task"),
        (["--texts", "somewhere", "--keep", "0.5"], "has a predictor"),
        (["--instruction", "abc", "--task", "sums"], "either --instruction or --task"),
        (["--instruction", " "], "the prompt is empty"),
        (["--task", "sums"], "no task 'sums'"),
        (["--instruction", "abc", "--keep", "0.9"], "0.25 to 0.75, got 0.9"),
    ],
)
def test_what_cannot_be_selected_is_told_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], said: str
) -> None:
    arguments = ["select", "--model", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", *asked]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_predictor_and_a_taken_one_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_model_folder(tmp_path / "plain")
    asked = ["--instruction", "abc", "--device", "cpu"]
    assert cli.main(["select", "--model", str(plain), "--out", str(tmp_path / "out"), *asked]) == 2
    assert "holds no instruction/instruction.json" in capsys.readouterr().err
    assert cli.main(["select", "--model", str(folder), "--out", str(plain), *asked]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_command_chooses_by_texts_of_a_task_without_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, out = write_model_folder(tmp_path / "plain"), tmp_path / "out"
    texts = tmp_path / "sums.txt"
    texts.write_text("1 + 1 = 2\n12 + 3 = 15\n" * 9)
    asked = ["select", "--model", str(plain), "--out", str(out), "--texts", str(texts), "--device", "cpu"]
    assert cli.main(asked) == 2
    assert "--texts needs --keep" in capsys.readouterr().err
    assert cli.main([*asked, "--keep", "0.5"]) == 0
    small = AutoModelForCausalLM.from_pretrained(out)
    assert small.config.intermediate_size == 24
    whole = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    for name, tensor in small.state_dict().items():
        if name.endswith("up_proj.weight"):
            rows = {tuple(row.tolist()) for row in whole[name]}
            assert all(tuple(row.tolist()) in rows for row in tensor)  # nothing was trained
    note = json.loads((out / "lightning_prune.json").read_text())
    assert note["plan"]["method"]["texts"] == str(texts)
