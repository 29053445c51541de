"""The small language model: its size, its learning, its numbers, its resume."""

import math
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from lightning_prune.integrations.demo.causal_lm import CausalLM, LlamaSize, TextData, learning_rate_factor

SIZE = LlamaSize(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_key_value_heads=1, context=16
)


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    for number in range(8):
        names = ["width", "height", "depth", "colour", "number", "letter", "weight", "speed"]
        text = "".join(f"def {name}_{number}({name}):\n    return {name} * {number}\n\n" for name in names) * 3
        (tmp_path / f"module_{number}.py").write_text(text)
    return TextData(path=str(tmp_path), vocab_size=300, window=16, batch_size=4, hold_out=4)


def _trainer(max_steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )


def test_the_default_size_is_as_documented() -> None:
    model = LlamaSize().build()
    embedding = 2048 * 128
    attention = 128 * 128 * 2 + 128 * 64 * 2
    block = attention + 3 * 128 * 384 + 2 * 128
    assert sum(parameter.numel() for parameter in model.parameters()) == embedding + 4 * block + 128 == 1_049_728


@pytest.mark.parametrize(
    ("step", "decay", "expected"),
    [
        (0, "linear", 0.25),
        (3, "linear", 1.0),
        (4, "linear", 1.0),
        (9, "linear", 0.5),
        (13, "linear", 0.1),
        (14, "linear", 0.0),
        (15, "linear", 0.0),
        (4, "cosine", 1.0),
        (9, "cosine", 0.5),
        (6, "cosine", 0.5 + 0.5 * math.cos(0.2 * math.pi)),
        (15, "cosine", 0.0),
    ],
)
def test_the_learning_rate_rises_and_falls(step: int, decay: Any, expected: float) -> None:
    assert learning_rate_factor(step, warmup=4, total=14, decay=decay) == pytest.approx(expected, abs=1e-12)


def test_no_warmup_and_no_decay_left_are_defined() -> None:
    assert learning_rate_factor(0, warmup=0, total=10, decay="linear") == 1.0
    assert learning_rate_factor(5, warmup=5, total=5, decay="linear") == 1.0


def test_training_learns_and_reports_the_true_loss(data: TextData) -> None:
    seed_everything(0, verbose=False)
    module = CausalLM(size=SIZE, learning_rate=1e-2, warmup_steps=2)
    data.setup()
    windows_BT = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])

    def loss_by_hand() -> float:
        with torch.no_grad():
            logits_BTV = module.model(input_ids=windows_BT).logits  # there is no dropout
        picked = torch.log_softmax(logits_BTV[:, :-1], -1).gather(-1, windows_BT[:, 1:, None])
        return -float(picked.mean())

    before = loss_by_hand()
    assert before == pytest.approx(math.log(300), rel=0.05)
    trainer = _trainer(40)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train_loss"] < before
    values = trainer.validate(module, datamodule=data, verbose=False)[0]
    assert values["val_loss"] == pytest.approx(loss_by_hand(), rel=1e-5)
    assert values["val_ppl"] == pytest.approx(math.exp(loss_by_hand()), rel=1e-5)
    assert values["val_loss"] < before / 2


def test_the_learning_rate_of_every_step_follows_the_plan(data: TextData) -> None:
    used = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            used.append([group["lr"] for group in optimizer.param_groups])

    _trainer(6, Watch()).fit(CausalLM(size=SIZE, learning_rate=0.5, warmup_steps=2), datamodule=data)
    assert used == [[rate, rate] for rate in (0.25, 0.5, 0.5, 0.375, 0.25, 0.125)]


def test_only_matrices_decay() -> None:
    module = CausalLM(size=SIZE, weight_decay=0.3)
    module.trainer = _trainer(5)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(parameter.dim() >= 2 for parameter in groups[0]["params"])
    assert [parameter.dim() for parameter in groups[1]["params"]] == [1, 1, 1]
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_muon_steps_the_linear_layers_and_adamw_the_rest() -> None:
    module = CausalLM(size=SIZE, weight_decay=0.3, optimizer="muon")
    module.trainer = _trainer(5)
    muon, adamw = module.configure_optimizers()["optimizer"].param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [names[id(parameter)].split(".")[-2] for parameter in muon["params"]] == linear
    rest = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
    assert [names[id(parameter)].split(".")[-2] for parameter in adamw["params"]] == rest
    assert (muon["weight_decay"], adamw["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(("stop", "optimizer"), [(3, "adamw"), (7, "adamw"), (7, "muon")])
def test_a_resumed_training_equals_an_uninterrupted_one(
    data: TextData, tmp_path: Path, stop: int, optimizer: Any
) -> None:
    def new() -> CausalLM:
        seed_everything(0, verbose=False)
        return CausalLM(size=SIZE, warmup_steps=2, optimizer=optimizer)

    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["input_ids"].clone())

    data.setup()
    assert len(data.train_dataloader()) > stop
    whole = new()

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    _trainer(12, Save(), Watch()).fit(whole, datamodule=data)
    expected, seen = seen, []
    resumed = new()
    safely = {"weights_only": True} if "weights_only" in signature(Trainer.fit).parameters else {}  # lightning 2.6
    _trainer(12, Watch()).fit(resumed, datamodule=data, ckpt_path=str(tmp_path / "saved.ckpt"), **safely)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected[stop:], strict=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_saved_model_is_opened(tmp_path: Path) -> None:
    built = SIZE.build()
    built.save_pretrained(tmp_path / "saved")
    opened = CausalLM(model=str(tmp_path / "saved"))
    assert all(torch.equal(opened.model.state_dict()[name], tensor) for name, tensor in built.state_dict().items())
    assert opened.model.training
    with pytest.raises(ValueError, match="size has no effect on the model loaded from"):
        CausalLM(model=str(tmp_path / "saved"), size=SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 280}, "a vocabulary of 300, the model takes 280"),
        ({"context": 8}, "a window of 16, the model takes 8"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_training(
    data: TextData, options: dict[str, int], message: str
) -> None:
    values = {name: getattr(SIZE, name) for name in SIZE.__dataclass_fields__}
    module = CausalLM(size=LlamaSize(**(values | options)))
    with pytest.raises(ValueError, match=message):
        _trainer(2).fit(module, datamodule=data)


def test_both_are_described_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    built = parser.instantiate(
        parser.parse_object(
            {
                "model": {
                    "class_path": "lightning_prune.integrations.demo.causal_lm.CausalLM",
                    "init_args": {"size": {"vocab_size": 300, "hidden_size": 32, "num_layers": 1}, "decay": "cosine"},
                },
                "data": {
                    "class_path": "lightning_prune.integrations.demo.causal_lm.TextData",
                    "init_args": {"window": 64},
                },
            }
        )
    )
    assert isinstance(built.model, CausalLM)
    assert built.model.model.config.hidden_size == 32
    assert built.model.decay == "cosine"
    assert isinstance(built.data, TextData)
    assert built.data.window == 64
