"""The main job at the smallest size: files, numbers, and errors before time is spent."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lightning_prune.integrations.demo import quickstart
from lightning_prune.integrations.demo.quickstart import run_quickstart
from lightning_prune.integrations.demo.quickstart_table import Row, format_table
from lightning_prune.integrations.text.text_data import TextData

NAMES = ["dense", "dense, trained further", "pruned, not trained", "pruned while trained"]
SIZE = "{vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_heads: 2, context: 48}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ["width", "height", "depth", "colour", "number", "letter", "weight", "speed"]
    for number in range(8):
        lines = [
            f"def {a}_{number}_{b}({a}, {b}):\n    result = {a} * {b} + {number}\n    return result\n\n"
            for a in words
            for b in words
            if a != b
        ]
        (folder / f"module_{number}.py").write_text("".join(lines))
    return folder


def _overrides(text: Path) -> list[str]:
    return [
        "trainer.max_steps=12",
        "trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=1",
        f"data.path={text}",
        "data.vocab_size=320",
        "data.window=48",
        "data.hold_out=4",
        "evaluate.limit=20",
        "prune.schedule.interval=1",
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def out(text: Path, tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    """Run the whole job once, with a new model."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert run_quickstart(out=str(out), overrides=[*_overrides(text), f"model.size={SIZE}"]) == 0
    return out


def _results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def test_the_table_has_the_three_baselines(out: Path) -> None:
    rows = _results(out)["rows"]
    assert [row["model"] for row in rows] == NAMES
    assert [row["sparsity"] > 0 for row in rows] == [False, False, True, True]
    embedding, attention, mlp = 320 * 32, 4 * 32 * 32, 3 * 32 * 48
    number = embedding + 2 * (attention + mlp + 2 * 32) + 32
    assert [row["num_parameters"] for row in rows] == [number] * 4
    assert [row["num_nonzeros"] for row in rows[:2]] == [number] * 2
    assert all(0 <= row["accuracy"] <= 1 and row["bits_per_byte"] > 0 for row in rows)


def test_exactly_the_recipes_share_of_the_linear_weights_is_zero(out: Path) -> None:
    rows, recipe = _results(out)["rows"], _results(out)["recipe"]
    wanted = recipe["prune"]["schedule"]["init_args"]["sparsity"]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    linear = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    zeros = sum(int((parameter == 0).sum()) for parameter in linear)
    assert zeros / sum(parameter.numel() for parameter in linear) == pytest.approx(wanted, abs=1e-3)
    assert sum(int(parameter.count_nonzero()) for parameter in model.parameters()) == rows[3]["num_nonzeros"]
    assert rows[2]["sparsity"] == pytest.approx(wanted, abs=1e-3)
    assert rows[3]["num_nonzeros"] == rows[3]["num_parameters"] - zeros


def test_the_exported_folder_is_the_model_of_the_last_row(out: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    data = TextData(path=str(text), vocab_size=320, window=48, hold_out=4)
    data.setup()
    code = data.val_documents[0].text
    assert tokenizer.encode(code) == data.tokenizer.encode(code)
    windows_BT = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    with torch.no_grad():
        loss = model(input_ids=windows_BT, labels=windows_BT).loss
    assert _results(out)["rows"][3]["val_ppl"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_report_logs_and_tasks_lie_beside_it(out: Path) -> None:
    assert "html" in (out / "report" / "index.html").read_text()[:100]
    assert {path.name for path in (out / "logs").iterdir()} == {"dense", "trained_further", "pruned_while_trained"}
    assert (out / "tasks" / "next_line.yaml").is_file()
    assert (out / "sparsity.json").exists() is False
    assert not [path for path in out.parent.iterdir() if path != out]
    results = _results(out)
    assert results["num_questions"] == 20
    assert results["seconds"]["total"] >= sum(results["seconds"].values()) / 2 - 1


def test_a_run_into_a_full_folder_stops_at_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_Job", None)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match="is not empty; nothing was overwritten"):
        run_quickstart(out=str(out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_given_model_is_taken_as_it_is(out: Path, text: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    code = run_quickstart(model=str(out / "model"), out=str(again), overrides=_overrides(text))
    assert code == 0
    first, rows = _results(out)["rows"][3], _results(again)["rows"]
    assert {key: rows[0][key] for key in first if key != "model"} == pytest.approx(
        {key: first[key] for key in first if key != "model"}, rel=1e-5
    )
    assert not (again / "logs" / "dense").exists()
    assert rows[1]["val_ppl"] != rows[0]["val_ppl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.targets.include=[nothing.*]", "nothing"),
        ("prune.schedule.end=500", "schedule.end is step 500, beyond the 12 steps"),
        ("evaluate.tasks=[next_line]", "name both in evaluate.tasks"),
        ("evaluate.at=[end]", r"evaluate.at must be .start, end."),
        ("export=null", "needs the sections evaluate and export"),
        ("export.dir=elsewhere", "leave export.dir, report.dir and evaluate.include_path null"),
        ("trainer.max_steps=null", "needs a number of steps as trainer.max_steps"),
        ("trainer.no_such=1", "section trainer: .*no_such"),
        ("data.window=4000", "section|window"),
        ("model.no_such=1", "section model: .*no_such"),
    ],
)
def test_a_wrong_recipe_is_told_before_anything_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    def fail(self: object, *args: object) -> None:
        raise AssertionError("training started")

    monkeypatch.setattr(quickstart._Job, "_fit", fail)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        run_quickstart(out=str(out), overrides=[*_overrides(text), f"model.size={SIZE}", override])
    assert not out.exists()


def test_a_model_that_is_not_there_is_named(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"cannot open the model .*nowhere"):
        run_quickstart(model=nowhere, out=str(tmp_path / "out"), overrides=_overrides(text))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_no_export(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: None
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupt)
    out = tmp_path / "out"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_quickstart(out=str(out), overrides=[*_overrides(text), f"model.size={SIZE}"])
    assert (out / "logs" / "pruned_while_trained").exists()
    assert not (out / "model").exists()
    assert not (out / "results.json").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_the_table_is_aligned() -> None:
    row = Row(
        model="dense",
        num_parameters=1_049_728,
        num_nonzeros=656_512,
        sparsity=0.5,
        val_ppl=54.321,
        accuracy=0.615,
        bits_per_byte=1.7858,
    )
    header, rule, line = format_table([row]).splitlines()
    assert len(header) == len(rule) == len(line)
    assert line.split() == ["dense", "1,049,728", "656,512", "50.0%", "54.32", "0.615", "1.786"]
    assert header.split("  ")[0] == "model"
