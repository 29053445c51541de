"""Whose tokens decide the mask under which lm-eval scores a request."""

from typing import Any

import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.instance import Instance
from torch import Tensor, nn

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.integrations.evaluation.lm_eval_harness import _check_masks, _Scored
from lightning_prune.integrations.instruction.lm_eval_masks import ConditionedHFLM, condition_of, instructions_of
from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.predictors.budget import Budget
from lightning_prune.structured.structure import Stack
from tests.model_folders import character_tokenizer
from tests.tiny_models import tiny_llama

Pair = tuple[str, str]


@pytest.fixture
def served() -> InstructionModel:
    torch.manual_seed(0)
    model = tiny_llama().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    condition = Instruction(budget=Budget(keep=0.5)).insert(model, Stack((), "", (), 2))
    nn.init.normal_(condition.predictor.head.outer.bias)
    condition.predictor.head.outer.weight.data.mul_(20)
    condition.predictor.num_steps.fill_(7)
    return InstructionModel(condition, character_tokenizer())


def scorer(served: InstructionModel, instructions: dict[str, str] | None = None, batch_size: int = 3) -> Any:
    return ConditionedHFLM(
        condition=served.condition,
        instructions=instructions,
        pretrained=_Scored(served.model),
        tokenizer=served.tokenizer,
        batch_size=batch_size,
    )


def requests(pairs: list[Pair], task: str = "sums") -> list[Instance]:
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=idx, metadata=(task, idx, 1))
        for idx, pair in enumerate(pairs)
    ]


@torch.no_grad()
def expected(served: InstructionModel, pair: Pair, instruction: str | None = None) -> float:
    """Score a continuation with the sub-model of its context, or of an instruction."""
    small = served.select(pair[0] if instruction is None else instruction)
    ids: Tensor = served.tokenizer("".join(pair), return_tensors="pt")["input_ids"]
    start = len(served.tokenizer(pair[0])["input_ids"])
    log_probs = torch.log_softmax(small(ids).logits[0], -1)
    return float(sum(log_probs[place - 1, ids[0, place]] for place in range(start, ids.shape[1])))


PAIRS = [
    ("1 + 1 =", " 2"),
    ("1 + 1 =", " 3"),  # one token apart, so one row of the batch answers both
    ("the dog", " runs over the fox"),
    ("the dog", " is lazy"),
    ("abc", "def"),
    ("abcd", "ef"),  # the same text, another context
    ("a", "bcdef"),
]


def test_a_continuation_is_scored_by_the_sub_model_of_its_context(served: InstructionModel) -> None:
    found = scorer(served).loglikelihood(requests(PAIRS), disable_tqdm=True)
    for pair, (value, _) in zip(PAIRS, found, strict=True):
        assert value == pytest.approx(expected(served, pair), abs=1e-4), pair
    others = [expected(served, pair, "".join(pair)) for pair in PAIRS]  # what a peek at the continuation would give
    assert all(abs(value - other) > 1e-2 for (value, _), other in zip(found, others, strict=True))


def test_the_continuation_does_not_influence_the_mask(
    served: InstructionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    plain = served.condition.predictor.scores

    def seen(ids: Tensor, there: Tensor) -> list[Tensor]:
        read.extend(row[here.bool()].tolist() for row, here in zip(ids, there, strict=True))
        return plain(ids, there)

    monkeypatch.setattr(served.condition.predictor, "scores", seen)
    scorer(served).loglikelihood(requests(PAIRS), disable_tqdm=True)
    contexts = {tuple(served.tokenizer(context)["input_ids"]) for context, _ in PAIRS}
    assert {tuple(row) for row in read} == contexts


def test_one_mask_per_task_is_read_from_its_text(served: InstructionModel) -> None:
    texts = {"sums": "add up", "prose": "tell a story"}
    mixed = [*requests(PAIRS[:3]), *requests(PAIRS[3:5], task="prose")]
    mixed = mixed[::2] + mixed[1::2]
    found = scorer(served, texts).loglikelihood(mixed, disable_tqdm=True)
    for request, (value, _) in zip(mixed, found, strict=True):
        assert value == pytest.approx(expected(served, request.args, texts[str(request.task_name)]), abs=1e-4)


def test_whole_texts_are_scored_under_the_mask_of_their_beginning(served: InstructionModel) -> None:
    texts = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=("the dog runs",), idx=0)]
    tokenizer = served.tokenizer
    lm = scorer(served)
    (found,) = lm.loglikelihood_rolling(texts, disable_tqdm=True)
    small = served.select([lm.prefix_token_id])
    ids = torch.tensor([[lm.prefix_token_id, *tokenizer("the dog runs")["input_ids"]]])
    log_probs = torch.log_softmax(small(ids).logits[0], -1)
    assert found == pytest.approx(float(log_probs[:-1].gather(1, ids[0, 1:, None]).sum()), abs=1e-4)


def test_generation_runs_under_the_mask_of_each_context(served: InstructionModel) -> None:
    contexts = ["1 + 1 =", "the quick brown", "abc"]
    asked = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(context, {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}),
            idx=idx,
        )
        for idx, context in enumerate(contexts)
    ]
    found = scorer(served).generate_until(asked, disable_tqdm=True)
    alone = served.generate(contexts, max_new_tokens=5, do_sample=False)
    assert [text.strip() for text in found] == [text.strip() for text in alone]


def test_the_condition_is_found_below_wrappers(served: InstructionModel) -> None:
    assert condition_of(served.model) is served.condition
    assert condition_of(nn.Sequential(served.model)) is served.condition
    assert condition_of(tiny_llama()) is None


class Task:
    def __init__(self, description: str | None) -> None:
        self.description = description

    def get_config(self, key: str) -> Any:
        return getattr(self, key)


def test_a_task_without_a_description_needs_a_text() -> None:
    tasks = {"sums": Task("Add up.\n\n"), "prose": Task(None)}
    assert instructions_of({"sums": tasks["sums"]}, None) == {"sums": "Add up.\n\n"}
    assert instructions_of(tasks, "do it") == {"sums": "do it", "prose": "do it"}
    with pytest.raises(ValueError, match="the task prose has no description"):
        instructions_of(tasks, None)


def test_options_of_masks_without_effect_are_refused(served: InstructionModel) -> None:
    with pytest.raises(ValueError, match="has no predictor of masks"):
        _check_masks(tiny_llama(), "task", None)
    with pytest.raises(ValueError, match="set mask_from: task"):
        _check_masks(served.model, "request", "abc")
    _check_masks(served.model, "task", "abc")
