"""Criteria against values by hand, loops written out, and the loss of Transformers."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from lightning_prune.structured.depth.bypass import bypassed
from lightning_prune.structured.depth.criteria import (
    Criterion,
    Divergence,
    JensenShannon,
    KullbackLeibler,
    LogitAngle,
    LogitDistance,
    NextTokenLoss,
    SequencePerplexity,
    intact,
    js_divergence,
    kl_divergence,
    logit_angle,
    logit_distance,
    next_token_targets,
    sequence_losses,
    sequence_mean,
    token_mean,
)
from tests.structured.depth_models import padded_batches, tiny_model

DIVERGENCES: list[type[Divergence]] = [JensenShannon, KullbackLeibler, LogitAngle, LogitDistance]


def test_padding_and_ignored_labels_are_left_out() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [0, 0, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    targets, chosen = next_token_targets({"input_ids": ids, "attention_mask": mask})
    assert targets[chosen].tolist() == [6, 7, 8, 10, 12]
    labels = torch.tensor([[5, -100, 7, 1], [9, 10, -100, -100], [-100, -100, 11, -100]])
    targets, chosen = next_token_targets({"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert targets[chosen].tolist() == [7, 1, 10]
    assert next_token_targets({"input_ids": ids})[1].all()


def test_mean_over_tokens_and_over_sequences_by_hand() -> None:
    # p(target) is 1/2 at each of three positions of the first sequence, 1/8 at the one position of the second
    logits = torch.zeros(2, 3, 2)
    logits[1, 0] = torch.tensor([0.0, math.log(7)])
    targets = torch.zeros(2, 3, dtype=torch.long)
    chosen = torch.tensor([[True, True, True], [True, False, False]])
    for chunk in (1, 2, 100):
        sum_B, count_B = sequence_losses(logits, targets, chosen, chunk=chunk)
        assert sum_B.tolist() == pytest.approx([3 * math.log(2), math.log(8)], rel=1e-6)
        assert count_B.tolist() == [3, 1]
    total, number = token_mean(sum_B, count_B).tolist()
    assert total / number == pytest.approx(6 * math.log(2) / 4, rel=1e-6)
    total, number = sequence_mean(sum_B, count_B).tolist()
    assert math.exp(total / number) == pytest.approx(math.exp((math.log(2) + math.log(8)) / 2), rel=1e-6)


def test_sequence_without_tokens_is_left_out_of_the_mean() -> None:
    assert sequence_mean(torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0])).tolist() == [2, 1]


def test_divergences_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(q.log(), p.log()).item() == pytest.approx(kl, rel=1e-5)
    side_p = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)
    side_q = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    assert js_divergence(q.log(), p.log()).item() == pytest.approx((side_p + side_q) / 2, rel=1e-5)
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert logit_angle(a, b).item() == pytest.approx(math.pi / 4, rel=1e-6)
    assert logit_angle(a, -3 * a).item() == pytest.approx(math.pi, rel=1e-6)
    assert logit_distance(torch.tensor([[3.0, 5.0]]), torch.tensor([[0.0, 1.0]])).item() == 5


def test_js_lies_between_zero_and_ln_2() -> None:
    far = js_divergence(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]]))
    assert far.item() == pytest.approx(math.log(2), rel=1e-6)
    logits = 10 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    values = js_divergence(logits, logits.roll(1, 0))
    assert values.min() > 0
    assert values.max() <= math.log(2)
    assert torch.equal(values, js_divergence(logits.roll(1, 0), logits))
    assert torch.equal(js_divergence(logits, logits), torch.zeros(50))


@pytest.mark.parametrize("function", [js_divergence, kl_divergence, logit_angle, logit_distance])
def test_equal_logits_give_zero(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert function(logits, logits.clone()).tolist() == [0] * 5


def test_loss_equals_that_of_transformers() -> None:
    model, batches = tiny_model("llama"), padded_batches(1)
    labels = batches[0]["input_ids"].masked_fill(batches[0]["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**batches[0], labels=labels).loss.item()
    assert NextTokenLoss().prepare(model, batches)(intact) == pytest.approx(expected, rel=1e-6)


def test_perplexity_takes_the_mean_per_sequence_first() -> None:
    model, batches = tiny_model("llama"), padded_batches(2)
    means = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            alone = ids[: int(mask.sum())][None]
            with torch.no_grad():
                means.append(model(input_ids=alone, labels=alone).loss.item())
    expected = math.exp(sum(means) / 4)
    assert SequencePerplexity().prepare(model, batches)(intact) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_divergence_of_a_changed_model(criterion: type[Divergence], keep_logits: bool) -> None:
    model, batches = tiny_model("llama"), padded_batches(2)
    chosen = criterion(keep_logits=keep_logits, chunk=5)
    evaluate = chosen.prepare(model, batches)
    assert evaluate(intact) == 0
    value = evaluate(lambda: bypassed(model, [], layers=[1]))
    parts = []
    with torch.no_grad():
        for batch in batches:
            before = model(**batch).logits[batch["attention_mask"].bool()]
            with bypassed(model, [], layers=[1]):
                after = model(**batch).logits[batch["attention_mask"].bool()]
            parts.append(chosen.compare(after, before))
    assert value == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)
    assert value > 0
    assert evaluate(intact) == 0


@pytest.mark.parametrize("criterion", [NextTokenLoss(), SequencePerplexity(), JensenShannon()])
def test_model_is_left_as_it_was(criterion: Criterion) -> None:
    model, batches = tiny_model("llama"), padded_batches(1)
    model.train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    criterion.prepare(model, batches)(nullcontext)
    assert model.training
    assert not model.model.layers[0].training
    assert model.config.use_cache
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_measure_is_refused() -> None:
    model, batches = tiny_model("llama"), padded_batches(1)
    for criterion in (NextTokenLoss(), SequencePerplexity(), JensenShannon()):
        with pytest.raises(ValueError, match="got no calibration batches"):
            criterion.prepare(model, [])
    batches[0]["labels"] = torch.full_like(batches[0]["input_ids"], -100)
    with pytest.raises(ValueError, match="no token counts"):
        NextTokenLoss().prepare(model, batches)(intact)
