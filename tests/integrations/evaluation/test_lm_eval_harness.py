"""Evaluation inside a training: the right numbers, and no trace."""

import importlib
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.integrations.demo.causal_lm import LlamaSize
from lightning_prune.integrations.evaluation import lm_eval_harness
from lightning_prune.integrations.evaluation.lm_eval_harness import check_tasks, evaluate_model
from lightning_prune.integrations.text.text_documents import train_tokenizer
from lightning_prune.predictors.budget import Budget
from lightning_prune.structured.structure import Stack

CONTEXT = 32
TEXTS = [
    "def area(width, height):\n    return width * height\n",
    "for number in range(10):\n    print(number, number ** 2)\n",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n" * 4,
]
QUESTIONS = [
    {"context": "def area(w, h):\n", "choices": ["    return w * h", "    class w: h"], "answer": 0},
    {"context": "for n in range(10):\n    ", "choices": ["push(n)", "print(n)", "n"], "answer": 1},
    {"context": "class Stack:", "choices": ["\n    def push", "\n    number", " width"], "answer": 2},
    {"context": "self.items", "choices": [".append(item)", " in range"], "answer": 1},
    {"context": "print(number", "choices": [", number)", " height("], "answer": 0},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    size = LlamaSize(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=1,
        context=CONTEXT,
    )
    model = size.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # far from uniform, so that choices differ
    return model


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    _write(folder, "choose", QUESTIONS, output_type="multiple_choice", doc_to_text="context", doc_to_choice="choices")
    _write(folder, "compress", [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling", doc_to_text="")
    return str(folder)


def _write(folder: Path, name: str, records: list[dict[str, Any]], **task: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    is_choice = task["output_type"] == "multiple_choice"
    task |= {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "doc_to_target": "answer" if is_choice else "text",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}] if is_choice else [{"metric": "bits_per_byte"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@torch.no_grad()
def _log_likelihood(model: nn.Module, ids: list[int], num_scored: int) -> float:
    """Sum the log-probabilities of the last tokens, each given all before it."""
    log_probs_TV = torch.log_softmax(model(input_ids=torch.tensor([ids[:-1]])).logits[0].double(), -1)
    places = range(len(ids) - 1 - num_scored, len(ids) - 1)
    return sum(float(log_probs_TV[place, ids[place + 1]]) for place in places)


def _expected_accuracy(model: nn.Module, tokenizer: Any) -> float:
    model.eval()
    num_right = 0
    for question in QUESTIONS:
        before = len(tokenizer.encode(question["context"].rstrip()))
        scores = []
        for choice in question["choices"]:
            ids = tokenizer.encode(question["context"] + choice)
            assert len(ids) <= CONTEXT
            scores.append(_log_likelihood(model, ids, len(ids) - before))
        num_right += scores.index(max(scores)) == question["answer"]
    return num_right / len(QUESTIONS)


def _expected_bits_per_byte(model: nn.Module, tokenizer: Any) -> float:
    """Score every token once, in windows; the last window looks back as far as the model can."""
    model.eval()
    total = 0.0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        for first in range(1, len(ids), CONTEXT):
            last = min(first + CONTEXT, len(ids))
            total += _log_likelihood(model, ids[max(0, last - CONTEXT - 1) : last], last - first)
    return -total / sum(len(text.encode()) for text in TEXTS) / math.log(2)


def test_scores_equal_plain_torch(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    found = evaluate_model(model, tokenizer, tasks=["choose", "compress"], include_path=tasks, batch_size=2)
    assert found["choose"] == {"acc": _expected_accuracy(model, tokenizer)}
    assert found["compress"]["bits_per_byte"] == pytest.approx(_expected_bits_per_byte(model, tokenizer), rel=1e-5)
    assert max(len(tokenizer.encode(text)) for text in TEXTS) > 2 * CONTEXT


def test_a_model_that_chooses_is_scored_under_the_mask_of_the_task_or_of_each_request(
    model: nn.Module, tokenizer: Any, tasks: str
) -> None:
    condition = Instruction(budget=Budget(keep=0.5)).insert(model.eval(), Stack((), "", (), 2))
    nn.init.normal_(condition.predictor.head.outer.bias)
    text = "complete the program"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with condition.fixed(condition.masks_of(condition.prompt({"input_ids": ids}))):
        expected = _expected_bits_per_byte(model, tokenizer), _expected_accuracy(model, tokenizer)
    names = {"tasks": ["choose", "compress"], "include_path": tasks}
    found = evaluate_model(model, tokenizer, mask_from="task", instruction=text, **names)  # type: ignore[arg-type]
    assert found["compress"]["bits_per_byte"] == pytest.approx(expected[0], rel=1e-5)
    assert found["choose"]["acc"] == expected[1]
    by_request = evaluate_model(model, tokenizer, **names)  # type: ignore[arg-type]
    assert by_request["compress"]["bits_per_byte"] != found["compress"]["bits_per_byte"]
    with pytest.raises(ValueError, match="the task choose has no description"):
        evaluate_model(model, tokenizer, mask_from="task", **names)  # type: ignore[arg-type]


def test_accuracy_follows_the_weights(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    """Over several models the expected accuracy takes several values, so equality above is no accident."""
    pairs = []
    for seed in range(6):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        found = evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks)
        pairs.append((found["choose"]["acc"], _expected_accuracy(model, tokenizer)))
    assert all(found == expected for found, expected in pairs)
    assert len({expected for _, expected in pairs}) > 1


def test_limit_takes_the_first_documents(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    found = evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks, limit=1)
    assert found["choose"]["acc"] in (0.0, 1.0)


def test_a_task_file_is_a_task(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    found = evaluate_model(model, tokenizer, tasks=[f"{tasks}/choose.yaml"])
    assert found["choose"]["acc"] == _expected_accuracy(model, tokenizer)


def test_training_state_is_untouched(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    model.train()
    frozen_layer = model.get_submodule("model.layers.1").eval()
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    tokenizer.pad_token, pad_token = None, tokenizer.pad_token
    modes = [module.training for module in model.modules()]
    weights = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    grads = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.config.use_cache = True
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    states = _random_states()

    evaluate_model(model, tokenizer, tasks=["choose", "compress"], include_path=tasks)

    assert _random_states() == states
    assert [module.training for module in model.modules()] == modes
    assert not frozen_layer.training
    assert tokenizer.pad_token is None
    tokenizer.pad_token = pad_token
    assert model.config.use_cache is True
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert parameter is weights[name][0]
        assert torch.equal(parameter, weights[name][1])
        assert parameter.grad is grads[name][0]
        assert torch.equal(parameter.grad, grads[name][1])
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def _random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


def test_state_returns_after_an_error(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("out of memory")

    model.train()
    model.get_submodule("model.norm").register_forward_pre_hook(fail)
    torch.manual_seed(3)
    states = _random_states()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks)
    assert _random_states() == states
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_evaluation_does_not_depend_on_the_random_state(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    torch.manual_seed(1)
    first = evaluate_model(model, tokenizer, tasks=["compress"], include_path=tasks)
    torch.manual_seed(2)
    assert evaluate_model(model, tokenizer, tasks=["compress"], include_path=tasks) == first


def _refuse_to_compile(graph: Any, inputs: list[Tensor]) -> Any:
    raise AssertionError("evaluation compiled the model")


def test_a_compiled_model_is_scored_without_compiling(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    plain = evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks)
    wrapped = torch.compile(model, backend=_refuse_to_compile)
    assert evaluate_model(wrapped, tokenizer, tasks=["choose"], include_path=tasks) == plain
    model.compile(backend=_refuse_to_compile)
    assert evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks) == plain


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_a_ddp_model_is_scored(model: nn.Module, tokenizer: Any, tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks)
    wrapped = nn.parallel.DistributedDataParallel(model)
    monkeypatch.setenv("LOCAL_RANK", "1")  # lm-eval gives results to local rank 0 only
    assert evaluate_model(wrapped, tokenizer, tasks=["choose"], include_path=tasks) == plain


def test_other_ranks_stay_silent(
    model: nn.Module, tokenizer: Any, tasks: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks)
    assert "100%" in capfd.readouterr().err
    monkeypatch.setattr(lm_eval_harness, "is_first_rank", lambda: False)
    evaluate_model(model, tokenizer, tasks=["choose"], include_path=tasks)
    assert capfd.readouterr().err == ""


def test_a_lora_model_is_scored_with_its_adapter(model: nn.Module, tokenizer: Any, tasks: str) -> None:
    base = evaluate_model(model, tokenizer, tasks=["compress"], include_path=tasks)["compress"]["bits_per_byte"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    adapted.train()
    fresh = evaluate_model(adapted, tokenizer, tasks=["compress"], include_path=tasks)["compress"]["bits_per_byte"]
    assert fresh == pytest.approx(base, rel=1e-6)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    found = evaluate_model(adapted, tokenizer, tasks=["compress"], include_path=tasks)["compress"]["bits_per_byte"]
    assert adapted.training
    assert found == pytest.approx(_expected_bits_per_byte(adapted, tokenizer), rel=1e-5)
    assert found != pytest.approx(base, rel=1e-4)


def test_what_is_no_language_model_is_refused(tokenizer: Any, tasks: str) -> None:
    with pytest.raises(ValueError, match="got Linear without config and generate"):
        evaluate_model(nn.Linear(2, 2), tokenizer, tasks=["choose"], include_path=tasks)


def test_known_tasks_pass(tasks: str) -> None:
    check_tasks(["choose", "compress"], tasks)
    check_tasks([f"{tasks}/choose.yaml"])


def test_an_unknown_task_is_named_with_its_neighbours(tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_own(include_path: str) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_harness, "_full_task_manager", only_own)
    with pytest.raises(ValueError, match=r"unknown lm-eval task 'chose'; nearest known: choose; .* include_path"):
        check_tasks(["compress", "chose"], tasks)
    with pytest.raises(ValueError, match=r"'zzz'; none of the 2 known names is near"):
        check_tasks(["zzz"], tasks)


@pytest.mark.slow
def test_an_unknown_task_is_compared_with_all_of_lm_eval(tasks: str) -> None:
    check_tasks(["choose", "hellaswag"], tasks)
    with pytest.raises(ValueError, match=r"unknown lm-eval task 'helaswag'; nearest known: hellaswag"):
        check_tasks(["helaswag"], tasks)


def test_a_missing_folder_and_no_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        check_tasks(["choose"], str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no task to evaluate"):
        check_tasks([])


def test_missing_lm_eval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'needs lm-eval: pip install "lightning_prune\[eval\]"'):
        check_tasks(["choose"])


def test_importing_the_adapter_imports_no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lightning_prune.integrations.evaluation.lm_eval_harness")
    assert importlib.import_module("lightning_prune.integrations.evaluation.lm_eval_harness").__all__
