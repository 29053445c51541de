"""From a model folder to a smaller one: by each packaged recipe, by a stored plan, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_prune.export.plan_note import num_parameters
from lightning_prune.integrations.folders import hf_shrink
from lightning_prune.integrations.folders.hf_oneshot import load_model
from lightning_prune.integrations.folders.hf_shrink import inspect_model, replay_plan, run_shrink
from lightning_prune.integrations.text.calibration_text import Passages, Text
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.depth.search import fingerprint_batches
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Plan, zeroed
from lightning_prune.structured.width.options import fingerprint
from tests.model_folders import TEXT, character_tokenizer
from tests.structured.discovery.test_probe_inputs import tiny_llava
from tests.tiny_models import tiny_family, tiny_llama, token_windows

SECTIONS = {"format", "form", "plan", "repaired", "parent", "metrics", "recipe"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    torch.manual_seed(0)
    model = tiny_llama(layers=4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return Text(data=str(path), num_sequences=8, sequence_length=16, batch_size=4)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "lightning_prune.json").read_text())
    return content


def loss_by_hand(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.stack([model(**batch).loss for batch in batches]).mean())


def passages_of(folder: Path, text: Text) -> Passages:
    return text.passages(*load_model(str(folder), device="cpu"), text.read())


STOCK = [  # recipe, overrides, changed fields of the configuration
    (
        "width_quarter",
        ["shrink.method.sparsity={ffn: 0.25, heads: 0.5}"],
        {"intermediate_size": 36, "num_attention_heads": 2},
    ),
    ("minitron_width", [], {"intermediate_size": 36}),
    ("sleb", ["shrink.method.stop.count=1"], {"num_hidden_layers": 3}),
    ("shortgpt", [], {"num_hidden_layers": 2}),
    ("replaceme", ["shrink.method.num_blocks=1"], {"num_hidden_layers": 3}),
]


@pytest.mark.parametrize(("name", "overrides", "fields"), STOCK, ids=[name for name, _, _ in STOCK])
def test_recipes_write_stock_folders(
    parent: Path, text: Text, tmp_path: Path, name: str, overrides: list[str], fields: dict[str, int]
) -> None:
    out = tmp_path / "out"
    recipe = Recipe.load(f"structured/{name}", overrides=overrides)
    metrics = run_shrink(recipe, model=str(parent), out=str(out), text=text, device="cpu")
    small, whole, note = load(out), load(parent), read(out)
    assert type(small) is type(whole)
    differing = {key for key in fields if getattr(small.config, key) != getattr(whole.config, key)}
    assert {key: getattr(small.config, key) for key in differing} == fields
    assert note.keys() >= SECTIONS
    assert note["metrics"] == metrics
    passages = passages_of(parent, text)
    for model, when in ((whole, "before"), (small, "after")):
        assert metrics["parameters"][when] == sum(weight.numel() for weight in model.parameters())
        assert metrics["loss"][when] == pytest.approx(loss_by_hand(model, passages.held_out), rel=1e-5)
    calibration = note["plan"]["method"]["calibration"]
    batches = passages.calibration
    hashes = (fingerprint(batches), {"fingerprint": fingerprint_batches(batches), "num_batches": 2})
    assert calibration in hashes
    assert note["recipe"] == recipe.as_dict()
    assert (out / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stored_plan_is_repeated_on_a_fresh_parent(parent: Path, text: Text, tmp_path: Path) -> None:
    recipe = Recipe.load("structured/minitron_width")
    run_shrink(recipe, model=str(parent), out=str(tmp_path / "one"), text=text, device="cpu")
    note = read(tmp_path / "one")
    bare = tmp_path / "plan.json"
    bare.write_text(json.dumps(note["plan"]))
    for name, source in (
        ("two", tmp_path / "one"),
        ("three", tmp_path / "one" / "lightning_prune.json"),
        ("four", bare),
    ):
        replay_plan(str(source), model=str(parent), out=str(tmp_path / name), text=text, device="cpu")
        assert read(tmp_path / name)["plan"] == note["plan"]
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            tmp_path / "one" / "model.safetensors"
        ).read_bytes()


def test_a_plan_with_repair_repeats_the_cut_and_says_so(
    parent: Path, text: Text, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe.load("structured/width_quarter", overrides=["shrink.method.sparsity={ffn: 0.25}"])
    run_shrink(recipe, model=str(parent), out=str(tmp_path / "one"), text=text, device="cpu")
    assert read(tmp_path / "one")["repaired"]
    replay_plan(str(tmp_path / "one"), model=str(parent), out=str(tmp_path / "two"), text=text, device="cpu")
    assert "its cut is repeated, the repair is not" in caplog.text
    assert not read(tmp_path / "two")["repaired"]
    model, ids_NT = load(parent), token_windows(2, 8)
    groups = discover(model).groups
    with torch.no_grad(), zeroed(model, groups, Plan.from_dict(read(tmp_path / "one")["plan"]).cuts):
        expected = model(input_ids=ids_NT).logits
    torch.testing.assert_close(load(tmp_path / "two")(input_ids=ids_NT).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(load(tmp_path / "one")(input_ids=ids_NT).logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("blockpruner", ["shrink.method.stop.count=1"]), ("flap", ["shrink.method.sparsity.ffn=0.3"])],
)
def test_blocks_of_different_shapes(
    parent: Path, text: Text, tmp_path: Path, name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    recipe = Recipe.load(f"structured/{name}", overrides=overrides)
    out = tmp_path / "out"
    metrics = run_shrink(recipe, model=str(parent), out=str(out), text=text, device="cpu")
    small = load(out, trust_remote_code=True)
    assert metrics["loss"]["after"] == pytest.approx(loss_by_hand(small, passages_of(parent, text).held_out), rel=1e-5)
    assert metrics["parameters"]["after"] == sum(weight.numel() for weight in small.parameters())
    assert read(out).keys() >= SECTIONS
    assert read(out)["form"] != "stock"
    with pytest.raises(
        ValueError, match=r"comes with a modelling file of its own; .* give --trust_remote_code to run it"
    ):
        load_model(str(out), device="cpu")
    opened, tokenizer = load_model(str(out), device="cpu", trust_remote_code=True)
    passages = text.passages(opened, tokenizer, text.read())
    assert passages.loss(opened, title="loss") == pytest.approx(metrics["loss"]["after"])
    stock = Recipe.load(f"structured/{name}", overrides=[*overrides, "export.format=huggingface"])
    with pytest.raises(
        ValueError, match=r"per-layer shapes.*; no model was written, the plan is kept in .*\.plan\.json"
    ):
        run_shrink(stock, model=str(parent), out=str(tmp_path / "stock"), text=text, device="cpu")
    assert not (tmp_path / "stock").exists()
    kept = tmp_path / "stock.plan.json"
    assert json.loads(kept.read_text()) == read(out)["plan"]


@pytest.mark.parametrize("form", ["stock", "per_layer"])
def test_a_folder_that_opens_as_something_else_does_not_stay(
    parent: Path, text: Text, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    opened: list[str] = []

    def load_another(name: str, **options: Any) -> Any:
        model, tokenizer = load_model(name, **options)
        if name == str(tmp_path / "out"):
            opened.append(name)
            with torch.no_grad():
                model.lm_head.weight += 0.1
        return model, tokenizer

    monkeypatch.setattr(hf_shrink, "load_model", load_another)
    name = "minitron_width" if form == "stock" else "flap"
    with pytest.raises(ValueError, match=r"differs from the masked one .*; no model was written, the plan is kept"):
        run_shrink(Recipe.load(f"structured/{name}"), model=str(parent), out=str(tmp_path / "out"), text=text)
    assert len(opened) == 1
    assert not (tmp_path / "out").exists()


def test_a_cut_must_be_exact_on_the_calibration_text(
    parent: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does otherwise from the tenth token on, which no configuration says, is not cut."""
    code = (
        "from transformers import LlamaForCausalLM\n"
        "class Late(LlamaForCausalLM):\n"
        "    def forward(self, input_ids=None, **kwargs):\n"
        "        result = super().forward(input_ids, **kwargs)\n"
        "        if input_ids.shape[1] > 9:\n"
        "            result.logits = result.logits * len(self.model.layers)\n"
        "        return result\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(parent, model)
    (model / "late.py").write_text(code)
    values = json.loads((model / "config.json").read_text())
    values |= {"architectures": ["Late"], "auto_map": {"AutoModelForCausalLM": "late.Late"}}
    (model / "config.json").write_text(json.dumps(values))
    recipe = Recipe.load("structured/shortgpt", overrides=["shrink.method.num_blocks=1"])
    with pytest.raises(ValueError, match=r"differs from the masked one by .* over 16 tokens.*no model was written"):
        run_shrink(recipe, model=str(model), out=str(tmp_path / "out"), text=text, trust_remote_code=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["width_quarter", "shortgpt"])
def test_the_text_part_of_a_model_of_images_is_cut(name: str, text: Text, tmp_path: Path) -> None:
    whole = tiny_llava()
    whole.save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    recipe = Recipe.load(f"structured/{name}")
    metrics = run_shrink(recipe, model=str(tmp_path / "model"), out=str(tmp_path / "out"), text=text, device="cpu")
    small, _ = load_model(str(tmp_path / "out"), device="cpu")
    assert type(small) is type(whole)
    assert metrics["loss"]["after"] is not None
    assert num_parameters(small.model.language_model) < num_parameters(whole.model.language_model)
    tower = whole.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[key]) for key, value in small.model.vision_tower.state_dict().items())


def test_without_a_tokenizer_the_model_writes_the_text(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    shrink = {"shrink": {"method": {"class_path": "RemoveTail", "init_args": {"num_blocks": 1}}}}
    text = Text(num_sequences=2, sequence_length=8)
    metrics = run_shrink(Recipe.load(shrink), model=str(folder), out=str(tmp_path / "out"), text=text, device="cpu")
    assert all(isinstance(loss, float) for loss in metrics["loss"].values())
    assert load(tmp_path / "out").config.num_hidden_layers == 1
    sleb = Recipe.load("structured/sleb", overrides=["shrink.method.stop.count=1", "shrink.method.protect_first=0"])
    run_shrink(sleb, model=str(folder), out=str(tmp_path / "sleb"), text=text, device="cpu")
    with pytest.raises(ValueError, match="calibration needs a tokenizer, and the model has none"):
        run_shrink(sleb, model=str(folder), out=str(tmp_path / "no"), text=Text(data="python"), device="cpu")


def test_inspection_shows_what_cannot_be_cut(tmp_path: Path) -> None:
    tiny_family("gpt2").save_pretrained(tmp_path)
    rows, refused = inspect_model(str(tmp_path), device="cpu")
    assert [row[0] for row in rows] == ["kind", "ffn", "layers"]
    assert refused[0].startswith("heads: no shape follows n_head alone")


def _with_quantized_weight(model: PreTrainedModel) -> PreTrainedModel:
    weight = model.model.layers[0].mlp.down_proj
    weight.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    return model


REFUSED = {
    "quantized": (_with_quantized_weight, r"down_proj.weight is quantized \(torch.int8\); shrink the model before"),
    "adapters": (lambda model: get_peft_model(model, LoraConfig(r=2)), "merge them first"),
    "meta": (lambda model: model.to("meta"), "is on the meta device and has no values"),
    "sharded": (lambda model: model, "is sharded; gather the model on one process and shrink it there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_cut(
    case: str, parent: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = REFUSED[case]
    model, tokenizer = load_model(str(parent), device="cpu")
    model = change(model)
    if case == "sharded":
        monkeypatch.setattr("lightning_prune.base.distributed.is_sharded", lambda tensor: True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(hf_shrink, "load_model", lambda name, **options: (model, tokenizer))
    with pytest.raises(ValueError, match=message):
        run_shrink(Recipe.load("structured/minitron_width"), model="m", out=str(tmp_path / "out"), text=text)
    assert list(tmp_path.iterdir()) == []
    if case != "meta":
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrong_input_is_refused_and_nothing_is_left(parent: Path, text: Text, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"model": str(parent), "out": str(out), "text": text, "device": "cpu"}
    with pytest.raises(ValueError, match=r"has no shrink\.method; it masks"):
        run_shrink(Recipe.load("oneshot/wanda_half"), **options)
    with pytest.raises(ValueError, match="num_blocks must be between 1 and 3 for 4 blocks, got 4"):
        run_shrink(Recipe.load("structured/shortgpt", overrides=["shrink.method.num_blocks=4"]), **options)
    with pytest.raises(
        ValueError, match="channels cannot be cut: the model has none; what can be cut: kv_groups, heads"
    ):
        run_shrink(
            Recipe.load("structured/minitron_width", overrides=["shrink.method.sparsity={channels: 0.5}"]), **options
        )
    with pytest.raises(ValueError, match="there is no plan"):
        replay_plan(str(tmp_path / "none.json"), **options)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"bad\.json holds no plan"):
        replay_plan(str(tmp_path / "bad.json"), **options)
    (tmp_path / "bad.json").unlink()
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(ValueError, match="is not empty; nothing was overwritten"):
        run_shrink(Recipe.load("structured/minitron_width"), **options)
    assert [path.name for path in out.iterdir()] == ["old"]


def test_a_plan_of_another_model_is_refused(parent: Path, text: Text, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    cuts = {"model.layers.7.mlp:ffn": [0, 1]}
    plan.write_text(json.dumps({"format": 1, "method": {}, "cuts": cuts, "layers": None, "skip": []}))
    with pytest.raises(ValueError, match=r"the model has no group 'model\.layers\.7\.mlp:ffn'"):
        replay_plan(str(plan), model=str(parent), out=str(tmp_path / "out"), text=text, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_interruption_leaves_no_folder(
    parent: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    tokenizer = load_model(str(parent), device="cpu")[1]
    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)  # the weights are in the folder by then
    with pytest.raises(KeyboardInterrupt):
        run_shrink(
            Recipe.load("structured/minitron_width"),
            model=str(parent),
            out=str(tmp_path / "out"),
            text=text,
            device="cpu",
        )
    assert list(tmp_path.iterdir()) == []
