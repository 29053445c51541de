"""Gradients of sequences: what counts, what is put back, and what must be taken whole."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Targets
from lightning_prune.calibration.loss_gradients import gradients, observe_gradients, token_labels
from lightning_prune.scorers.taylor import Taylor
from tests.tiny_models import tiny_llama, token_windows


@dataclass
class Output:
    """What models with a loss return."""

    loss: Tensor


class Regression(nn.Module):
    """A loss that is a mean over rows, a sum of them, or one of the whole batch."""

    def __init__(self, kind: str = "mean") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False)])

    def forward(self, inputs: Tensor, labels: Tensor | None = None, images: Any = None) -> Output:
        errors = self.blocks[0](inputs).square().sum(-1)
        if self.kind == "mean":
            return Output(errors.mean())
        if self.kind == "per sequence":  # of unequal lengths, said by labels that do not count
            assert labels is not None
            counts_NT = labels != -100
            return Output(((errors * counts_NT).sum(-1) / counts_NT.sum(-1)).mean())
        return Output(errors.sum() if self.kind == "sum" else errors.logsumexp(0) * 10)


def observed(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[str]]:
    bindings = Targets().resolve(model)
    observation, notes = observe_gradients(model, Taylor(), bindings, batches, progress=False)
    return {b.name: observation.read(b, whole=True)["weight_grad"] for b in bindings}, notes


def test_every_row_counts_for_itself() -> None:
    model, inputs = Regression(), torch.rand(5, 4)
    found, notes = observed(model, [{"inputs": inputs, "labels": torch.zeros(5)}])
    weight = model.blocks[0].weight.detach()
    wanted = torch.stack([(weight * torch.outer(2 * weight @ row, row)).abs() for row in inputs]).mean(0)
    torch.testing.assert_close(found["blocks.0.weight"], wanted)
    assert notes == []


def test_rows_count_by_their_labels() -> None:
    ids = token_windows(2, 8)
    labels = ids.clone()
    labels[1, 2:] = -100
    whole, _ = observed(tiny_llama(), [{"input_ids": ids, "labels": labels}])
    first, _ = observed(tiny_llama(), [{"input_ids": ids[:1], "labels": labels[:1]}])
    second, _ = observed(tiny_llama(), [{"input_ids": ids[1:], "labels": labels[1:]}])
    for name, score in whole.items():
        torch.testing.assert_close(score, (8 * first[name] + 2 * second[name]) / 10, rtol=1e-4, atol=1e-9)


def test_rows_without_a_label_that_counts_are_left_out() -> None:
    ids = token_windows(3, 8)
    labels = ids.clone()
    labels[1] = -100
    whole, _ = observed(tiny_llama(), [{"input_ids": ids, "labels": labels}])
    rest, _ = observed(tiny_llama(), [{"input_ids": ids[[0, 2]]}])
    for name, score in whole.items():
        torch.testing.assert_close(score, rest[name])


@pytest.mark.parametrize(
    ("kind", "batch"),
    [("sum", {}), ("whole", {}), ("mean", {"images": torch.rand(7, 3)}), ("mean", {"images": [1] * 4})],
)
def test_what_cannot_be_taken_by_rows_is_taken_whole_and_said(kind: str, batch: dict[str, Any]) -> None:
    inputs = torch.rand(4, 4)
    found, [note] = observed(Regression(kind), [{"inputs": inputs, "labels": torch.zeros(4)} | batch])
    assert "taken whole" in note
    twin = Regression(kind)
    twin(inputs).loss.backward()
    weight = twin.blocks[0].weight
    assert weight.grad is not None
    torch.testing.assert_close(found["blocks.0.weight"], (weight.detach() * weight.grad).abs())


def test_a_loss_that_only_a_later_batch_shows_to_be_no_mean_is_taken_whole() -> None:
    even, uneven = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    uneven[1, 1:] = -100
    torch.manual_seed(1)
    inputs = torch.rand(2, 6, 4) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    model, batches = Regression("per sequence"), [{"inputs": inputs, "labels": labels} for labels in (even, uneven)]
    _, notes = observed(model, batches[:1])
    assert notes == []
    found, [note] = observed(model, batches)
    assert "no mean over sequences" in note
    weight, scores = model.blocks[0].weight, []
    for batch, share in zip(
        batches, (12 / 9.5, 7 / 9.5), strict=True
    ):  # of the labels that count in a batch on average
        [grad] = torch.autograd.grad(model(**batch).loss, [weight])
        scores.append((weight * grad).abs().detach() * share)
    torch.testing.assert_close(found["blocks.0.weight"], torch.stack(scores).mean(0))


def test_the_first_label_of_short_sequences_is_predicted_by_none() -> None:
    class Next(nn.Module):
        """A loss per predicted token that is the token itself."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False)])

        def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
            counts_NT = labels[:, 1:] != -100
            losses_NT = self.blocks[0](labels[:, 1:, None].float()).squeeze(-1) * counts_NT
            return Output(losses_NT.sum() / counts_NT.sum())

    labels = torch.full((2, 8), 2)
    labels[0, :2] = 90
    labels[0, 2:] = -100
    _, notes = observed(Next(), [{"input_ids": labels.clamp_min(0), "labels": labels}])
    assert notes == []


def test_a_model_without_a_loss_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Taylor needs a loss, but the model returns none; add labels"):
        observed(model, [{"input": torch.rand(2, 4)}])


def test_padding_has_no_labels() -> None:
    ids, attention_mask = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 0]])
    assert token_labels({"input_ids": ids, "attention_mask": attention_mask})["labels"].tolist() == [[5, 6, -100]]
    assert token_labels({"input_ids": ids})["labels"].tolist() == [[5, 6, 7]]
    assert token_labels({"pixels": torch.rand(2)}) == {}


def test_gradients_flags_and_modes_are_put_back_after_an_error() -> None:
    model = tiny_llama().train()
    bindings = Targets().resolve(model)
    head = model.get_parameter("model.embed_tokens.weight")
    head.grad = torch.ones_like(head)
    model.get_parameter("model.norm.weight").requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="stop"), gradients(model, bindings):
        targets = {id(binding.parameter) for binding in bindings}
        assert all(parameter.requires_grad == (id(parameter) in targets) for parameter in model.parameters())
        assert head.grad is None
        assert not model.training
        raise RuntimeError("stop")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert head.grad is not None
    assert model.training
