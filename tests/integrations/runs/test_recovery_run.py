"""Recover in both trainers from one recipe: the same weights, exact resumes, kept zeros, honest reports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_prune import Once, Sparsifier
from lightning_prune.integrations.lora.peft_lora import LoraGradients, add_lora
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as TransformersCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from lightning_prune.recovery.gap import LOSS_NOISE
from tests.integrations.recoveries import LORA, PRUNE, recipe, same, weights, with_lightning, with_transformers
from tests.integrations.trainings import RECOMPUTE, TinyModule, hf_trainer, lightning_trainer, loader
from tests.loops import BATCH, NUM_STEPS
from tests.tiny_models import TokenDataset, tiny_llama, token_windows

SHORTGPT = {"class_path": "ShortGPT", "init_args": {"num_blocks": 1}}
WAYS: dict[str, dict[str, Any]] = {
    "masked": {"lora": LORA},
    "scaled, norms": {"lora": {"form": "scaled", "config": {"r": 4}}, "retrain": ["norms"]},
    "norms, embeddings": {"retrain": ["norms", "embeddings"]},
    "distillation": {"distill": {"temperature": 2.0, "ce_weight": 0.5}},
    "all at once": {"lora": LORA, "distill": {}, "learning_rate": {"warmup": 2, "final": 0.0}},
}
QUICK = ("masked", "all at once")


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_both_trainers_give_the_same_weights_and_keep_every_zero(way: str, tmp_path: Path) -> None:
    callback, model = with_transformers(recipe(WAYS[way], tmp_path / "hf"), tmp_path / "hf")
    with_lightning(recipe(WAYS[way], tmp_path / "pl"))
    found = weights(tmp_path / "hf")
    assert same(found, weights(tmp_path / "pl"))
    masks = {name.removeprefix("base_model.model."): keep for name, keep in callback.run.sparsifier.masks.items()}
    assert len(masks) == 14
    assert all(torch.equal(found[name] != 0, keep) for name, keep in masks.items())
    for out in ("hf", "pl"):
        note = json.loads((tmp_path / out / "export" / "sparsity.json").read_text())
        assert note["num_parameters"] == sum(p.numel() for p in found.values())
        assert note["num_nonzeros"] == sum(int(p.count_nonzero()) for p in found.values())
        assert {name[name.index("layers.") :] for name in note["targets"]} == {name[len("model.") :] for name in masks}
        assert set(note["targets"].values()) == {0.5}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "export")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(exported(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    way = WAYS["all at once"]
    with_transformers(recipe(way, tmp_path / "kept"), tmp_path / "kept")
    with_transformers(recipe(way, tmp_path / "again"), tmp_path / "again", **{RECOMPUTE: True})
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "again"))


def test_recomputing_by_re_entry_above_frozen_embeddings(tmp_path: Path) -> None:
    content = {"recover": {"lora": LORA, "requires": "any"}}
    re_entry = {RECOMPUTE: True, f"{RECOMPUTE}_kwargs": {"use_reentrant": True}, "max_steps": 1}
    with pytest.raises(ValueError, match=rf"{RECOMPUTE}_kwargs {{'use_reentrant': True}} gives no gradient"):
        with_transformers(content, tmp_path, **re_entry)
    asked = tiny_llama()
    asked.enable_input_require_grads()
    with_transformers(content, tmp_path, model=asked, **re_entry)
    trainer = hf_trainer(tiny_llama(), tmp_path, [TransformersCallback(content)], **{RECOMPUTE: True})
    assert getattr(trainer.args, f"{RECOMPUTE}_kwargs") == {"use_reentrant": False}


@pytest.mark.parametrize("way", [pytest.param("scaled, norms", marks=pytest.mark.slow), "all at once"])
def test_resume_is_exact_in_transformers(way: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    with_transformers(recipe(WAYS[way], tmp_path / "one"), tmp_path / "one", **options)
    checkpoint = tmp_path / "one" / "checkpoint-4"
    with_transformers(recipe(WAYS[way], tmp_path / "two"), tmp_path / "two", resume=checkpoint, **options)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the second run goes on in the folder of the first
@pytest.mark.parametrize("way", ["masked", "all at once"])
def test_resume_is_exact_in_lightning(way: str, tmp_path: Path) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    with_lightning(recipe(WAYS[way], tmp_path / "one"), callbacks=[saving()])
    with_lightning(recipe(WAYS[way], tmp_path / "two"), callbacks=[saving()], resume=tmp_path / "step=4.ckpt")
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_the_report_holds_the_three_moments_and_the_effort(tmp_path: Path) -> None:
    sections = {"report": {"dir": str(tmp_path / "report")}}
    prune = {"schedule": {"class_path": "Once", "init_args": {"sparsity": 0.9}}}
    content = recipe({"retrain": ["norms"]}, tmp_path, prune=prune, **sections)
    learned = tiny_llama()
    hf_trainer(learned, tmp_path, [], max_steps=6 * NUM_STEPS).train()  # a model that knows nothing loses nothing
    callback, model = with_transformers(content, tmp_path, model=learned)
    found = json.loads((tmp_path / "report" / "report.json").read_text())["recovery"]
    losses = {moment: found["moments"][moment]["loss"]["nats"] for moment in ("before", "pruned", "recovered")}
    with torch.no_grad():
        batches = list(callback.run.recovery._eval_batches())
        mean = sum(float(model.eval()(**batch).loss) for batch in batches) / len(batches)
    assert losses["recovered"] == pytest.approx(mean, abs=1e-5)
    gap = next(gap for gap in found["gaps"] if gap["metric"] == "loss")
    damage = losses["pruned"] - losses["before"]
    assert damage > LOSS_NOISE  # else there would be no share
    assert gap["share"] == pytest.approx((losses["pruned"] - losses["recovered"]) / damage)
    effort = found["effort"]
    norms = sum(p.numel() for p in tiny_llama().parameters() if p.ndim == 1)
    assert effort["num_trained"] == norms
    assert effort["num_tokens"] == NUM_STEPS * BATCH * batches[0]["input_ids"].shape[1]
    assert "Recovery" in (tmp_path / "report" / "index.html").read_text()


class TwoSets(TinyModule):
    """Validates on two sets, of which the first counts."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def test_the_losses_under_lightning_are_those_of_the_first_validation_set(tmp_path: Path) -> None:
    callback, module = LightningCallback(recipe({"retrain": ["norms"]}, tmp_path)), TwoSets()
    other = DataLoader(TokenDataset(token_windows(4, seed=5)), batch_size=4)
    lightning_trainer([callback]).fit(module, loader(), [loader(), other])
    moments = callback.run.recovery.report().as_dict()["moments"]
    for moment, model in (("before", tiny_llama()), ("recovered", module.model)):
        with torch.no_grad():
            losses = [float(model.eval()(**batch).loss) for batch in loader()]
        assert moments[moment]["loss"]["nats"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_model_that_comes_pruned_is_recovered_under_its_zeros(tmp_path: Path) -> None:
    dense = tiny_llama()
    Sparsifier(schedule=Once(sparsity=0.5)).prune_once(dense, progress=False)
    masks = {name: parameter != 0 for name, parameter in dense.named_parameters() if "proj" in name}
    content = recipe({"lora": LORA}, tmp_path, prune=None)
    with_transformers(content, tmp_path, model=dense)
    found = weights(tmp_path)
    assert all(torch.equal(found[name] != 0, keep) for name, keep in masks.items())


def test_a_lora_of_the_programs_own_is_made_to_keep_zeros(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    callback, trained = with_transformers(recipe({"lora": {"form": "masked"}}, tmp_path), tmp_path, model=model)
    assert trained is model
    found = weights(tmp_path)
    assert all(torch.equal(found[name] != 0, keep) for name, keep in callback.run.sparsifier.masks.items())


def test_an_adapter_is_exported_alone(tmp_path: Path) -> None:
    export = {"format": "adapter", "dir": str(tmp_path / "adapter")}
    with_lightning(recipe({"lora": {"form": "plain", "config": {"r": 4}}}, tmp_path, export=export))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_units_masked_under_a_lora_are_cut_at_the_end(tmp_path: Path) -> None:
    prune = {
        "targets": {"include": ["*.mlp.down_proj.weight"]},
        "granularity": {"class_path": "Channel", "init_args": {"width": 1}},
        "schedule": {"class_path": "Cubic", "init_args": {"sparsity": 0.5, "start": 2, "end": 8, "interval": 2}},
        "scorer": {"class_path": "Taylor", "init_args": {"beta": 0.9}},
    }
    content = recipe({"lora": LORA}, tmp_path, prune=prune, shrink={"zeros": True})
    _, trained = with_transformers(content, tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert small.config.intermediate_size == tiny_llama().config.intermediate_size // 2
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = trained.eval()(input_ids=ids).logits
        torch.testing.assert_close(small(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)


def test_the_stand_in_for_a_frozen_weights_gradient_is_that_of_loraprune() -> None:
    model: nn.Module = tiny_llama()
    wrapped = add_lora(model, form="masked", config={"r": 4})
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    wrapped(input_ids=ids, labels=ids).loss.backward()
    layer: Any = wrapped.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = LoraGradients(wrapped)(layer.base_layer.weight)
    assert found is not None
    weight, grad = found
    torch.testing.assert_close(weight, layer.base_layer.weight + 8.0 * up @ down)  # alpha 32 over r 4
    torch.testing.assert_close(grad, up.grad @ down + up @ down.grad - up.grad @ down.grad)


def test_a_scorer_that_needs_gradients_needs_a_lora_on_every_target(tmp_path: Path) -> None:
    prune = PRUNE | {"scorer": "Taylor", "schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5, "at": 2}}}
    prune |= {"targets": {"include": ["model.layers.*"]}}
    content = recipe({"lora": {"config": {"r": 4, "target_modules": ["q_proj"]}}}, tmp_path, prune=prune)
    with pytest.raises(
        ValueError, match=r"Taylor needs gradients, but .*k_proj.weight is frozen \(12 targets in all\)"
    ):
        with_transformers(content, tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"recover": {"lora": LORA}, "prune": None}, "recovery needs a pruned model"),
        ({"recover": {"distill": {}}, "prune": None}, "name the folder of the dense model"),
        ({"recover": {"lora": {"form": "plain"}}}, "would fill the zeros that this recipe prunes"),
        ({"recover": {"reconstruct": {}}}, "run it with oneshot"),
        ({"recover": {"retrain": ["head"], "lora": LORA}}, "untie them"),
        ({"recover": {"retrain": ["all"], "lora": LORA}}, "trains every weight"),
        ({"recover": {}}, "names no way to recover"),
        ({"recover": {"retrain": ["norms"], "reconstruct": {}}}, "two recipes"),
        (
            {"recover": {"retrain": ["norms"]}, "export": {"format": "adapter", "dir": "x"}},
            "only recover.lora makes such",
        ),
        ({"recover": {"lora": LORA}, "shrink": {"method": SHORTGPT}, "prune": None}, "recover: null"),
    ],
)
def test_what_cannot_be_recovered_is_refused_before_training(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        with_transformers(recipe({}, tmp_path) | sections, tmp_path)


def test_a_callback_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    trainer = hf_trainer(tiny_llama(), tmp_path, [])
    trainer.add_callback(TransformersCallback(recipe({"lora": LORA}, tmp_path)))
    with pytest.raises(ValueError, match="give the callback to the Trainer's constructor"):
        trainer.train()


@pytest.mark.parametrize("adapter", ["transformers", "lightning"])
def test_a_second_model_is_recovered_anew(tmp_path: Path, adapter: str) -> None:
    content = recipe({"lora": LORA}, tmp_path)
    if adapter == "transformers":
        callback, first = with_transformers(content, tmp_path)
        trainer = hf_trainer(tiny_llama(seed=7), tmp_path, [callback])
        trainer.train()
        second: Any = trainer.model
    else:
        callback, first = with_lightning(content)
        module = TinyModule(tiny_llama(seed=7))
        lightning_trainer([callback], enable_checkpointing=False).fit(module, loader(), loader())
        second = module.model
    assert second is not first
    assert callback.run.broken == ()
    merged = weights(tmp_path)
    base = dict(tiny_llama(seed=7).named_parameters())
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert callback.run.report().sparsity == 0.5


def test_the_same_model_is_prepared_once(tmp_path: Path) -> None:
    callback = TransformersCallback(recipe({"lora": LORA}, tmp_path))
    model = tiny_llama()
    one, two = (hf_trainer(model, tmp_path, [callback]) for _ in range(2))
    assert one.model is two.model
    other = hf_trainer(tiny_llama(seed=7), tmp_path, [callback])
    with pytest.raises(ValueError, match="has prepared another model since; give each Trainer one of its own"):
        one.train()
    other.train()
    assert callback.run.report().sparsity == 0.5


def test_the_report_of_lightning_holds_the_same_moments(tmp_path: Path) -> None:
    content = {"prune": PRUNE, "recover": {"retrain": ["norms"]}}
    moments = []
    for train in (lambda: with_lightning(content), lambda: with_transformers(content, tmp_path)):
        callback, _ = train()
        found = callback.run.recovery.report().as_dict()["moments"]
        moments.append({moment: found[moment]["loss"]["nats"] for moment in ("before", "pruned", "recovered")})
    assert moments[0] == pytest.approx(moments[1], abs=1e-5)
