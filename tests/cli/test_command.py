"""The command line: what it prints, what it returns, and what it says about wrong input."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_prune.base import registry
from lightning_prune.cli import command as cli
from lightning_prune.recipe.recipe import Recipe, packaged_recipes
from tests.model_folders import TEXT, write_model_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_methods_lists_every_choice_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    for room in registry.rooms():
        for entry in registry.entries(room):
            assert f"  {entry.cls.__name__}" in printed
            assert entry.summary in printed
    assert "arXiv 2306.11695" in printed
    for name in packaged_recipes():
        assert name in printed


def test_print_config_is_the_whole_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--print_config", "--prune.schedule.sparsity=0.75", "--prune.scorer", "Magnitude", "--seed", "4"]
    assert cli.main(["oneshot", "--config", "oneshot/wanda_half", *arguments]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    overrides = ["prune.schedule.sparsity=0.75", "prune.scorer=Magnitude", "seed=4"]
    assert Recipe.load(path) == Recipe.load("oneshot/wanda_half", overrides=overrides)


def test_oneshot_writes_a_sparse_model_and_a_report(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "page"
    options = ["--data", str(text_file), "--num_sequences", "4", "--sequence_length", "16", "--device", "cpu"]
    overrides = ["--prune.schedule.sparsity=0.25", f"--report.dir={page}"]
    arguments = ["--config", "oneshot/wanda_half", "--model", str(model_folder), "--out", str(out)]
    assert cli.main(["oneshot", *arguments, *options, *overrides]) == 0
    before = load_file(model_folder / "model.safetensors")
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    targets = json.loads((out / "sparsity.json").read_text())["targets"]
    assert len(targets) == 2 * 7
    for name in targets:
        zeros_per_row = (after[name] == 0).sum(1)
        assert torch.equal(zeros_per_row, torch.full_like(zeros_per_row, after[name].shape[1] // 4)), name
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert (page / "index.html").is_file()
    assert (out / "tokenizer.json").is_file()
    assert "sparsity 0.2500 of 14 targets" in capsys.readouterr().err


SHORT_TEXT = ["--num_sequences", "4", "--sequence_length", "16", "--device", "cpu"]


def test_oneshot_shrinks_and_repeats_a_plan(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["oneshot", "--model", str(model_folder), "--data", str(text_file), *SHORT_TEXT]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*start, "--config", "structured/minitron_width", "--out", str(one)]) == 0
    said = capsys.readouterr().err
    small = AutoModelForCausalLM.from_pretrained(one)
    assert small.config.intermediate_size == 36
    before = sum(tensor.numel() for tensor in load_file(model_folder / "model.safetensors").values())
    assert f"parameters: {before} -> {before - 2 * 3 * 12 * 32}" in said
    assert "loss on 16 held-out sequences of " in said
    for bar in ("loss before", "pruning blocks", "loss after"):
        assert f"{bar}: 100%" in said
    assert cli.main([*start, "--plan", str(one / "lightning_prune.json"), "--out", str(two)]) == 0
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    wrong = ["--plan", str(one), "--out", str(tmp_path / "no")]
    for options, message in {
        ("--seed=1",): "--seed=1 has no effect with --plan",
        ("--state_file", "x"): "--state_file has no effect with --plan",
        ("--config", "structured/sleb"): "--plan repeats a cut without a recipe; leave out --config",
    }.items():
        assert cli.main([*start, *wrong, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_search_goes_on_from_its_state_file(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    start = ["oneshot", "--model", str(model_folder), "--data", str(text_file), *SHORT_TEXT]
    search = ["--config", "structured/sleb", "--shrink.method.stop.count=1", "--shrink.method.protect_first=0"]
    state = tmp_path / "state.json"
    assert cli.main([*start, *search, "--state_file", str(state), "--out", str(tmp_path / "one")]) == 0
    assert state.is_file()
    assert cli.main([*start, *search, "--state_file", str(state), "--out", str(tmp_path / "two")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two").config.num_hidden_layers == 1


def test_inspect_prints_what_can_be_cut(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--model", str(model_folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "kind       groups  units  parts  fields",
        "kv_groups  2       2      1      num_key_value_heads, num_attention_heads",
        "heads      2       4      2      num_attention_heads",
        "ffn        2       48     1      intermediate_size",
        "hidden     1       32     1      hidden_size",
        "layers     1       2      1      num_hidden_layers",
    ]


def test_inspect_lists_what_a_recipe_would_prune(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["inspect", "--model", str(model_folder)]
    options = ["--recipe", "train/gradual_magnitude", "--prune.targets.include=['*.q_proj.weight']"]
    assert cli.main([*start, *options, "--total_steps", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["target", "shape", "read", "as", "out", "x", "in"]
    assert lines[1].startswith("model.layers.0.self_attn.q_proj.weight  ")
    assert any(line.startswith("model.layers.0.mlp.up_proj.weight") and "not included" in line for line in lines)
    assert "of 100 of 2 weights of " in lines[-1]
    assert cli.main([*start, "--total_steps", "100"]) == 2
    assert "--total_steps has no effect without --recipe" in capsys.readouterr().err


def test_export_writes_the_other_form(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--model", str(model_folder), "--out", str(tmp_path / "dense")]) == 0
    path = tmp_path / "dense" / "model.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_file(path)[name], load_file(model_folder / "model.safetensors")[name])


def test_eval_prints_a_table_and_writes_json(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval_harness = importlib.import_module("lightning_prune.integrations.evaluation.lm_eval_harness")
    seen: dict[str, object] = {}

    def evaluate_model(model: object, tokenizer: object, **options: object) -> dict[str, dict[str, float]]:
        seen.update(options)
        return {"fox": {"acc": 0.5, "perplexity": 12.25}}

    monkeypatch.setattr(lm_eval_harness, "evaluate_model", evaluate_model)
    monkeypatch.setattr(lm_eval_harness, "check_tasks", lambda *names: None)
    (tmp_path / "tasks").mkdir()
    options = ["--limit", "3", "--include_path", str(tmp_path / "tasks"), "--out", str(tmp_path / "r.json")]
    assert cli.main(["eval", "--model", str(model_folder), "--tasks", "fox,dog", "cat", *options]) == 0
    assert (seen["tasks"], seen["limit"]) == (["fox", "dog", "cat"], 3)
    assert seen["include_path"] == str(tmp_path / "tasks")
    assert capsys.readouterr().out.splitlines() == [
        "task  metric      value",
        "fox   acc         0.5000",
        "fox   perplexity  12.2500",
    ]
    assert json.loads((tmp_path / "r.json").read_text()) == {"fox": {"acc": 0.5, "perplexity": 12.25}}


def test_exec_passes_the_recipe_with_its_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.integrations.programs import exec_inject

    seen: list[tuple[Recipe, str, list[str]]] = []

    def run_exec(recipe: str, command: list[str]) -> int:
        seen.append((Recipe.load(recipe), Path(recipe).stem, command))
        return 7

    monkeypatch.setattr(exec_inject, "run_exec", run_exec)
    program = ["train.py", "--seed", "5", "--", "x"]
    assert cli.main(["exec", "--recipe", "train/taylor", "--prune.schedule.sparsity=0.3", "--", *program]) == 7
    assert cli.main(["exec", "--recipe", "train/taylor", "--", "-m", "mine"]) == 7
    changed = Recipe.load("train/taylor", overrides=["prune.schedule.sparsity=0.3"])
    assert seen == [(changed, "taylor", program), (Recipe.load("train/taylor"), "taylor", ["-m", "mine"])]


def test_quickstart_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.integrations.demo import quickstart

    seen: list[object] = []

    def run_quickstart(config: str, *, model: str | None, out: str, overrides: list[str]) -> int:
        seen.append((config, model, out, overrides))
        return 0

    monkeypatch.setattr(quickstart, "run_quickstart", run_quickstart)
    arguments = ["--model", "m", "--out", "o", "--trainer.max_steps=5", "--prune.schedule.sparsity", "0.7"]
    assert cli.main(["quickstart", *arguments]) == 0
    assert seen == [("train/quickstart", "m", "o", ["trainer.max_steps=5", "prune.schedule.sparsity=0.7"])]


WRONG = [
    ([], "the following arguments are required: COMMAND"),
    (["oneshto"], "invalid choice: 'oneshto'"),
    (["methods", "extra"], "unexpected argument 'extra'"),
    (["oneshot", "--model", "m"], "the following arguments are required: --config"),
    (["oneshot", "--config", "oneshot/wanda_half"], "oneshot needs --model and --out"),
    (["oneshot", "--config", "structured/sleb"], "oneshot needs --model and --out"),
    (
        ["oneshot", "--config", "oneshot/wanda_half", "--model", "m", "--out", "o", "--state_file", "s"],
        "--state_file has no effect: this recipe does not search",
    ),
    (["inspect"], "the following arguments are required: --model"),
    (["inspect", "--model", "/no/such"], "there is no model folder /no/such"),
    (["oneshot", "--config", "oneshot/wanda_hlf", "--model", "m", "--out", "o"], "did you mean 'oneshot/wanda_half'"),
    (
        ["oneshot", "--config", "oneshot/wanda_half", "--prine.seed=1"],
        "unknown option '--prine'; did you mean '--prune'",
    ),
    (["oneshot", "--config", "oneshot/wanda_half", "--trainer.max_steps=1"], "unknown option '--trainer'"),
    (["oneshot", "--config", "oneshot/wanda_half", "--prune.seed"], "--prune.seed needs a value"),
    (
        ["oneshot", "--config", "oneshot/wanda_half", "--num_sequences", "x"],
        "--num_sequences: must be 1 or more, got x",
    ),
    (["oneshot", "--config", "oneshot/wanda_half", "--", "x"], "only exec takes a program after --"),
    (["exec", "--recipe", "train/taylor", "train.py"], "unexpected argument 'train.py'"),
    (["exec", "--recipe", "train/taylor"], "exec needs a command after --"),
    (["eval", "--model", "/no/such", "--tasks", "x"], "there is no model folder /no/such"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_usage_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_wrong_input_to_oneshot_leaves_nothing_behind(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    start = ["oneshot", "--model", str(model_folder), "--out", str(out), "--config"]
    cases = {
        ("oneshot/wanda_half", "--data", str(tmp_path / "none.txt")): "no text found at",
        (
            "oneshot/wanda_half",
            "--data",
            str(text_file),
            "--num_sequences",
            "500",
        ): "give more text, or --num_sequences",
        ("oneshot/wanda_half", "--data", str(text_file), "--num_sequences", "0"): "must be 1 or more",
        ("oneshot/magnitude_half", "--data", str(tmp_path / "none.txt")): "no text found at",
        ("oneshot/magnitude_half", '--prune.targets.include=["*.nope.*"]'): "matches no weight",
        ("oneshot/magnitude_half", "--prune.granularity=NM", "--prune.granularity.m=5"): "final sparsity of 0.6",
    }
    for arguments, message in cases.items():
        assert cli.main([*start, *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    (out / "old").write_text("x")
    assert cli.main([*start, "oneshot/magnitude_half"]) == 2
    assert "is not empty; nothing was overwritten" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["old"]


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path / "model", has_tokenizer=False)
    start = ["oneshot", "--model", str(folder), "--out", str(tmp_path / "out"), "--config"]
    assert cli.main([*start, "oneshot/wanda_half", "--data", "python"]) == 2
    assert "calibration needs a tokenizer, and the model has none" in capsys.readouterr().err
    assert cli.main([*start, "oneshot/magnitude_half"]) == 0
    assert "that the model wrote: " in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_traceback_on_request() -> None:
    with pytest.raises(ValueError, match="oneshot needs --model"):
        cli.main(["oneshot", "--config", "oneshot/wanda_half", "--traceback"])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in [name for name in sys.modules if name.startswith("lightning_prune.integrations.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["oneshot", "--config", "oneshot/wanda_half", "--model", "m", "--out", "o"]) == 2
    assert capsys.readouterr().err == (
        'error: lightning-prune oneshot needs transformers: pip install "lightning_prune[hf]"\n'
    )


def test_the_program_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_prune"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def run(argument: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, argument], capture_output=True, text=True, cwd=tmp_path, env=environment)

    good = run("--help")
    assert good.returncode == 0
    for name in ("run", "oneshot", "inspect", "exec", "eval", "export", "methods", "quickstart"):
        assert f"    {name}" in good.stdout
    bad = run("nope")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")


def test_a_closed_pipe_ends_the_program_quietly(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "lightning_prune", "methods"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **streams) as started:  # type: ignore[call-overload]
        started.stdout.close()  # before anything is written
        assert started.stderr.read() == b""
        assert started.wait() == 141
    full = Path("/dev/full")
    if full.exists():
        with full.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, env=environment, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1
        assert b"No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nonsense"], "there is no device 'nonsense' here"),
        (["--device", "meta"], "device 'meta' holds no values"),
        (["--batch_size", "0"], "argument --batch_size: must be 1 or more, got 0"),
        (["--num_sequences", "x"], "argument --num_sequences: must be 1 or more, got x"),
        (["--sequence_length", "-1"], "argument --sequence_length: must be 1 or more, got -1"),
    ],
)
def test_a_wrong_device_or_number_is_told_in_one_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    start = ["oneshot", "--config", "oneshot/wanda_half", "--model", str(model_folder), "--out", str(tmp_path / "out")]
    assert cli.main([*start, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "config", "config_list", "tokenizer"])
def test_a_damaged_model_is_told_in_one_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    content = {
        "cut": (weights, weights.read_bytes()[:-100]),
        "empty": (weights, b""),
        "noise": (weights, bytes(range(256)) * 9),
        "config": (folder / "config.json", b"{"),
        "config_list": (folder / "config.json", b"[]"),
        "tokenizer": (folder / "tokenizer.json", b"{"),
    }
    path, damaged = content[damage]
    path.write_bytes(damaged)
    start = ["oneshot", "--config", "oneshot/magnitude_half", "--model", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main(start) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(folder) in line or damage == "config_list"
    assert not (tmp_path / "out").exists()


def test_a_folder_below_a_file_cannot_be_written(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert cli.main(["export", "--model", str(model_folder), "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_what_no_one_foresaw_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(cli, "_print_recipe", fail)
    arguments = ["oneshot", "--config", "oneshot/wanda_half", "--print_config"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == ("error: RuntimeError: first second; --traceback shows where it came from\n")
    with pytest.raises(RuntimeError, match="first"):
        cli.main([*arguments, "--traceback"])


def test_a_field_that_a_lora_does_not_have_is_told_at_load(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "recovery/mask_lora", "--recover.lora.config.rnk=4", "--print_config", "--", "x.py"]
    assert cli.main(["exec", *arguments]) == 2
    assert "unknown key 'recover.lora.config.rnk'; did you mean" in capsys.readouterr().err


def test_results_cannot_go_where_a_folder_is_and_that_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--model", "no/model", "--tasks", "x", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is a folder; name a file for the results, for example {tmp_path / 'results.json'}\n"
    )
