"""A condition in both trainers: the same weights as a bare loop, exact resume, one rate for the model and another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, TrainerCallback

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.integrations.instruction.condition_run import ConditionRun
from lightning_prune.integrations.instruction.folder import open_conditional
from lightning_prune.integrations.instruction.rates import take_in
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as HFCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.structure import Stack
from tests.integrations.trainings import ResumableLoader, TinyModule, hf_trainer, lightning_trainer, resumes_in_place
from tests.loops import BATCH, NUM_STEPS, assert_same_weights
from tests.tiny_models import TokenDataset, tiny_llama, token_windows

PROMPT = 5


class PromptDataset(TokenDataset):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids_NT[index]
        labels = ids.clone()
        labels[:PROMPT] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def dataset() -> PromptDataset:
    return PromptDataset(token_windows(BATCH * NUM_STEPS))


def recipe(**options: Any) -> Recipe:
    init_args = {
        "budget": {"keep": 0.5},
        "predictor": {"hidden": 8},
        "start": {"num_sequences": 8, "num_clusters": 2, "num_steps": 5},
        "guard": {"every": 5, "num_sequences": 4},
        "rate": 0.5,
        **options,
    }
    return Recipe.load({"condition": {"class_path": "Instruction", "init_args": init_args}})


def train_bare(given: Recipe) -> torch.nn.Module:
    """Train in a loop of one's own, with two parameter groups."""
    model, method = tiny_llama().train(), given.condition
    assert isinstance(method, Instruction)
    condition = method.insert(model, Stack((), "", (), 2))
    model.to(torch.float32)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if not n.startswith("mask_predictor")]},
        {"params": list(condition.predictor.parameters()), "lr": 0.5e-2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    condition.begin(total_steps=NUM_STEPS)
    batches = list(DataLoader(dataset(), batch_size=BATCH))
    condition.warm_start(batches[:2])
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    return model


def train_hf(given: Recipe, out: Path, **options: Any) -> torch.nn.Module:
    torch.manual_seed(11)
    trainer = hf_trainer(tiny_llama(), out, [HFCallback(given)], **options)
    trainer.train_dataset = dataset()
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer.model


def train_lightning(given: Recipe, **options: Any) -> torch.nn.Module:
    torch.manual_seed(11)
    module, data = TinyModule(), DataLoader(dataset(), batch_size=BATCH)
    trainer = lightning_trainer([LightningCallback(given)], limit_val_batches=1, **options)
    trainer.fit(module, data, data)
    return module.model


@pytest.fixture
def fixed_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the head's first weights be the same wherever it is made."""
    make = Instruction.insert

    def insert(self: Instruction, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return make(self, *args, **kwargs)

    monkeypatch.setattr(Instruction, "insert", insert)


@pytest.mark.usefixtures("fixed_head")
def test_both_trainers_give_the_weights_of_a_bare_loop(tmp_path: Path) -> None:
    expected = train_bare(recipe())
    assert_same_weights(train_hf(recipe(), tmp_path), expected)
    assert_same_weights(train_lightning(recipe()), expected)


@pytest.mark.usefixtures("fixed_head")
def test_resume_is_exact_under_transformers(tmp_path: Path) -> None:
    expected = train_hf(recipe(), tmp_path / "whole")
    torch.manual_seed(11)
    trainer = hf_trainer(tiny_llama(), tmp_path / "half", [HFCallback(recipe())], save_strategy="steps", save_steps=5)
    trainer.train_dataset = dataset()
    trainer.add_callback(StopAt(5))
    trainer.train()
    again = hf_trainer(tiny_llama(), tmp_path / "half", [HFCallback(recipe())], save_strategy="steps", save_steps=5)
    again.train_dataset = dataset()
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-5"))
    assert_same_weights(again.model, expected)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_looking_at_the_training_data_leaves_no_trace_in_the_random_state() -> None:
    model = tiny_llama()
    run = ConditionRun(recipe().condition)
    run.prepare(model)
    shuffled = DataLoader(dataset(), batch_size=BATCH, shuffle=True)
    before = torch.get_rng_state()
    run.start(
        model,
        [torch.optim.SGD(model.parameters())],
        total_steps=NUM_STEPS,
        is_new=True,
        train_batches=lambda: shuffled,
        tokenizer=None,
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_trained_is_written_and_chooses_the_same_units(tmp_path: Path) -> None:
    given = Recipe.load(recipe(), overrides=["export.format=conditional", f"export.dir={tmp_path / 'out'}"])
    model = train_hf(given, tmp_path / "run").eval()
    opened, _, _ = open_conditional(tmp_path / "out")
    batch = next(iter(DataLoader(dataset(), batch_size=BATCH)))
    torch.testing.assert_close(opened(**batch).logits, model(**batch).logits)
    assert_same_weights(opened.mask_predictor, model.mask_predictor)


def test_a_predictor_gets_a_rate_of_its_own_in_the_users_optimizer_and_schedule() -> None:
    first, second, added = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.AdamW(
        [{"params": [first, added], "weight_decay": 0.1}, {"params": [second], "weight_decay": 0.0}], lr=1.0
    )
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    take_in([optimizer], [warm], [added], rate=0.5)
    held = [([id(p) for p in group["params"]], group["weight_decay"]) for group in optimizer.param_groups]
    assert held == [([id(first)], 0.1), ([id(second)], 0.0), ([id(added)], 0.1)]
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        sum(p.sum() for p in (first, second, added)).backward()
        optimizer.step()
        warm.step()
    assert rates[0] == pytest.approx([0.1, 0.1, 0.05])
    assert rates[2] == pytest.approx([0.3, 0.3, 0.15])


def test_parameters_that_an_optimizer_lacks_join_it_and_several_optimizers_are_told_apart() -> None:
    held, added = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([held], lr=1.0, momentum=0.9)
    take_in([optimizer], [], [added], rate=0.1)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(1.0, 0.9), (0.1, 0.9)]
    with pytest.raises(ValueError, match="2 optimizers and none of them holds the 1 parameters"):
        take_in([optimizer, torch.optim.SGD([held], lr=1.0)], [], [torch.nn.Parameter(torch.ones(1))], rate=0.1)


def test_a_training_whose_model_gets_no_labels_reads_the_mark_of_the_collator(tmp_path: Path) -> None:
    smoothed = train_hf(recipe(guard=None, start=None), tmp_path, label_smoothing_factor=0.1)
    assert int(smoothed.mask_predictor.num_steps) == NUM_STEPS


def test_a_collapse_is_said_and_can_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = {"every": 5, "num_sequences": 4, "max_overlap": 0.1, "min_swap_cost": 10.0}
    train_hf(recipe(guard=guard), tmp_path / "warned")
    assert any("no longer depend on the instruction" in record.message for record in caplog.records)
    with pytest.raises(ValueError, match="no longer depend on the instruction"):
        train_hf(recipe(guard=guard | {"stops": True}), tmp_path / "stopped")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"prune": {"schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5}}}}, "use two recipes"),
        ({"export": {"format": "huggingface"}}, "use conditional"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(sections: dict[str, Any], said: str) -> None:
    condition = {"class_path": "Instruction", "init_args": {"budget": {"keep": 0.5}}}
    with pytest.raises(ValueError, match=said):
        Recipe.load({"condition": condition, **sections})


def with_lora() -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    return get_peft_model(tiny_llama(), config)


def lora_trainer(out: Path, given: Recipe, **options: Any) -> Any:
    trainer = hf_trainer(with_lora(), out, [HFCallback(given)], **options)
    trainer.train_dataset = dataset()
    return trainer


@pytest.mark.usefixtures("fixed_head")
def test_a_model_below_adapters_is_conditioned_resumed_and_written_merged(tmp_path: Path) -> None:
    given = Recipe.load(recipe(), overrides=["export.format=conditional", f"export.dir={tmp_path / 'out'}"])
    whole = lora_trainer(tmp_path / "whole", given, save_strategy="steps", save_steps=5)
    whole.train()
    batch = next(iter(DataLoader(dataset(), batch_size=BATCH)))
    opened, _, _ = open_conditional(tmp_path / "out")
    torch.testing.assert_close(opened(**batch).logits, whole.model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    again = lora_trainer(tmp_path / "whole", recipe())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same_weights(again.model, whole.model)


@resumes_in_place
@pytest.mark.usefixtures("fixed_head")
def test_resume_is_exact_under_lightning_whoever_saves(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    def train(*callbacks: Any, **fit: Any) -> torch.nn.Module:
        torch.manual_seed(11)
        module, data = TinyModule(), ResumableLoader()
        data.loader = DataLoader(dataset(), batch_size=BATCH)
        trainer = lightning_trainer([LightningCallback(recipe()), *callbacks], limit_val_batches=1)
        trainer.fit(module, data, DataLoader(dataset(), batch_size=BATCH), **fit)
        return module.model

    expected = train(Saves())
    assert_same_weights(train(ckpt_path=tmp_path / "five.ckpt"), expected)


def test_a_second_training_keeps_rate_and_predictor(tmp_path: Path) -> None:
    trainer = hf_trainer(tiny_llama(), tmp_path, [HFCallback(recipe())], save_strategy="steps", save_steps=5)
    trainer.train_dataset = dataset()
    trainer.train()
    learned = trainer.model.mask_predictor.head.outer.weight.clone()
    rates = [group["lr"] for group in trainer.optimizer.param_groups if group["params"]]
    seen = []

    class Looks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(trainer.model.mask_predictor.head.outer.weight.clone())

    trainer.add_callback(Looks())
    trainer.train()
    assert torch.equal(seen[0], learned)
    assert [group["lr"] for group in trainer.optimizer.param_groups if group["params"]] == rates
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == NUM_STEPS


def test_schedules_that_hold_others_are_extended_by_name() -> None:
    held, added = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([held, added], lr=1.0)
    parts = [
        torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2),
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    for _ in range(2):  # the second time nothing is left to do
        take_in([optimizer], [schedule], [added], rate=0.1)
    for _ in range(6):
        optimizer.step()
        schedule.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(0.1 * first)


def test_the_labels_of_a_chunk_are_not_counted_by_the_trainer(tmp_path: Path) -> None:
    given = recipe(reads={"source": "chunk", "chunk": 8, "dropout": 0.0}, guard=None, start=None)
    trainer = hf_trainer(tiny_llama(), tmp_path, [HFCallback(given)], learning_rate=0.0)
    trainer.train_dataset = TokenDataset(token_windows(BATCH * NUM_STEPS))
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[idx] for idx in range(BATCH)])
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    with torch.no_grad():
        trainer.model.mask_predictor.num_steps.zero_()
        expected = float(trainer.model.train()(**batch).loss)
    assert logged == pytest.approx(expected, rel=1e-3)


def test_a_model_that_has_a_predictor_or_was_made_anew_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    hf_trainer(model, tmp_path, [HFCallback(recipe())])
    with pytest.raises(ValueError, match="has a mask_predictor already, of another Trainer"):
        hf_trainer(model, tmp_path, [HFCallback(recipe())])
    trainer = hf_trainer(tiny_llama(), tmp_path, [HFCallback(recipe())])
    trainer.train_dataset, trainer.model_init = dataset(), lambda: tiny_llama()
    with pytest.raises(ValueError, match="made another one since"):
        trainer.train()


@pytest.mark.parametrize("opened", ["from_pretrained", "open_conditional"])
@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_a_second_stage_goes_on_with_the_predictor_of_the_first(
    opened: str, trainer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given = Recipe.load(recipe(), overrides=["export.format=conditional", f"export.dir={tmp_path / 'out'}"])
    first = train_hf(given, tmp_path / "run").mask_predictor
    if opened == "from_pretrained":
        model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    else:
        model = open_conditional(tmp_path / "out", device="cpu")[0]
    second = recipe(budget={"num_units": 24})  # of 48, where the first stage had another
    if trainer == "hf":
        going = hf_trainer(model, tmp_path / "second", [HFCallback(second)])
        going.train_dataset = dataset()
        assert_same_weights(model.mask_predictor.head, first.head)
        going.train()
    else:
        module, data = TinyModule(model.train()), DataLoader(dataset(), batch_size=BATCH)
        lightning_trainer([LightningCallback(second)], limit_val_batches=1).fit(module, data, data)
    assert f"trained for {NUM_STEPS} steps" in caplog.text
    assert int(model.mask_predictor.num_steps) == 2 * NUM_STEPS
    assert "the predictor starts from what matters" not in caplog.text.partition("going on with")[2]
    assert model.mask_predictor.keep == (24, 24)


def test_a_predictor_of_another_make_is_told_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = Recipe.load(recipe(), overrides=["export.format=conditional", f"export.dir={tmp_path / 'out'}"])
    train_hf(given, tmp_path / "run")
    other = recipe(predictor={"hidden": 7})
    hf_trainer(LlamaForCausalLM.from_pretrained(tmp_path / "out"), tmp_path, [HFCallback(other)])
    assert "hidden=7" in caplog.text
    assert "starts with a new one" in caplog.text
    with pytest.raises(ValueError, match=r"(?s)was made with predictor .*hidden=7.*\.remove\(\)"):
        hf_trainer(open_conditional(tmp_path / "out", device="cpu")[0], tmp_path, [HFCallback(other)])


def test_a_checkpoint_of_lightning_opens_for_a_test(tmp_path: Path) -> None:
    data = DataLoader(dataset(), batch_size=BATCH)
    trainer = lightning_trainer([LightningCallback(recipe())], limit_val_batches=1)
    trainer.fit(TinyModule(), data, data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = lightning_trainer([LightningCallback(recipe())], limit_val_batches=1)
    (found,) = fresh.validate(TinyModule(), data, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    (expected,) = trainer.validate(trainer.lightning_module, data, verbose=False)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)
