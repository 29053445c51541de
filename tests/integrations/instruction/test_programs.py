"""Programs that know nothing of this library end in a model that is served: TRL's own, and one of Lightning."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_prune.cli import command as cli
from lightning_prune.integrations.instruction.serving import InstructionModel

DATA = os.environ.get("LIGHTNING_PRUNE_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="needs trl"),
    pytest.mark.skipif(DATA is None, reason="needs the folder of models and text that LIGHTNING_PRUNE_DATA names"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="starts a program as Linux does"),
]
RECIPE = """
condition:
  class_path: Instruction
  init_args:
    budget: {keep: 0.33}
    start: {num_sequences: 16, num_clusters: 4, num_steps: 10}
    guard: {every: 4, num_sequences: 8}
export: {format: conditional, dir: OUT}
"""


PROGRAM = """
import json, sys
import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, rows = sys.argv[1:]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


module = Module()


def collate(rows):
    ids = [module.tokenizer(row["prompt"])["input_ids"][:16] for row in rows]
    texts = [one + module.tokenizer(row["completion"], add_special_tokens=False)["input_ids"][: 48 - len(one)]
             for one, row in zip(ids, rows)]
    batch = torch.tensor(texts)
    labels = batch.clone()
    for number, one in enumerate(ids):
        labels[number, : len(one)] = -100
    return {"input_ids": batch, "labels": labels}


data = [json.loads(line) for line in open(rows, encoding="utf-8")]
loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate)
pl.Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False).fit(module, loader)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with prompts, completions and a recipe; the hub is out of reach."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    text = Path(str(DATA), "text", "tinystories_v2_train.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if len(story) > 300][:32]
    (tmp_path / "stories").mkdir()
    rows = [json.dumps({"prompt": story[:80], "completion": story[80:300]}) + "\n" for story in stories]
    (tmp_path / "stories" / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("OUT", str(tmp_path / "served")), encoding="utf-8")
    return tmp_path


@pytest.mark.long
def test_an_unmodified_program_of_lightning_ends_in_a_served_model(folder: Path) -> None:
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    given = [str(Path(str(DATA), "models", "stories260K")), str(folder / "stories" / "train.jsonl")]
    start = ["exec", "--recipe", str(folder / "recipe.yaml"), "--", str(folder / "program.py")]
    assert cli.main([*start, *given]) == 0
    served = InstructionModel.from_pretrained(folder / "served")
    assert served.select("Once upon a time, there was a cat.").config.intermediate_size == 56
    texts = served.generate(["Once upon a time", "The big dog"], max_new_tokens=4)
    assert len(texts) == 2


def test_trls_unmodified_program_ends_in_a_served_model(folder: Path) -> None:
    tmp_path = folder
    parent = Path(str(DATA), "models", "stories260K")
    program = {
        "model_name_or_path": parent,
        "dataset_name": tmp_path / "stories",
        "output_dir": tmp_path / "run",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "max_length": 96,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": True,  # as TRL does where nothing is said
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags = [str(part) for name, value in program.items() for part in (f"--{name}", value)]
    start = ["exec", "--recipe", str(tmp_path / "recipe.yaml"), "--", "-m", "trl.scripts.sft", "--use_cpu"]
    assert cli.main([*start, *flags]) == 0

    served = InstructionModel.from_pretrained(tmp_path / "served")
    small = served.select("Once upon a time, there was a dog.")
    assert small.config.intermediate_size == 56  # a third of 172, in whole eights
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    before = AutoModelForCausalLM.from_pretrained(parent)
    assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    out = tmp_path / "story"
    words = ["--instruction", "Once upon a time, there was a dog.", "--out", str(out)]
    assert cli.main(["select", "--model", str(tmp_path / "served"), *words]) == 0
    plain = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-4)
