"""The held-out loss against a sum over tokens written out, and the traces it must not leave."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lightning_prune.recovery.held_out import measure_loss


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=13, attention_dropout=0.5, **sizes | changes)
    return LlamaForCausalLM(config).train()


def padded_batches():
    torch.manual_seed(1)
    short, long = torch.randint(13, (2, 4)), torch.randint(13, (1, 11))
    mask = torch.ones_like(short)
    mask[1, 2:] = 0
    return [{"input_ids": short, "attention_mask": mask}, {"input_ids": long, "attention_mask": torch.ones_like(long)}]


@torch.no_grad()
def token_losses(model, batches):
    """Return the loss of every predicted token, one by one."""
    model.eval()
    losses = []
    for batch in batches:
        logits = model(**batch).logits
        for row, ids in enumerate(batch["input_ids"]):
            for position in range(1, int(batch["attention_mask"][row].sum())):
                losses.append(functional.cross_entropy(logits[row, position - 1], ids[position]))
    return torch.stack(losses).double()


def test_mean_is_over_tokens():
    model, batches = llama(), padded_batches()
    expected = token_losses(llama(), batches)
    nats, num_tokens = measure_loss(model, batches)
    assert num_tokens == len(expected) == 3 + 1 + 10
    assert nats == pytest.approx(float(expected.mean()), abs=1e-6)


def test_labels_left_out_do_not_count():
    model, batch = llama(), padded_batches()[1]
    labels = batch["input_ids"].clone()
    labels[:, 1:8] = -100
    nothing = {**batch, "labels": torch.full_like(labels, -100)}
    nats, num_tokens = measure_loss(model, [nothing, {**batch, "labels": labels}])
    assert num_tokens == 3
    assert nats == pytest.approx(float(token_losses(llama(), [batch])[-3:].mean()), abs=1e-6)


def test_labels_of_an_encoder_decoder_are_all_predicted():
    torch.manual_seed(0)
    config = T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    first = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[6, 7, 8, -100]])}
    second = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[9]])}
    with torch.no_grad():
        losses = [float(model.eval()(**batch).loss) for batch in (first, second)]
    nats, num_tokens = measure_loss(model, [first, second])
    assert num_tokens == 4
    assert nats == pytest.approx((3 * losses[0] + losses[1]) / 4, abs=1e-6)


def test_leaves_no_trace():
    model, batches = llama(), padded_batches()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    def drawing():
        for batch in batches:
            random.random(), torch.rand(1)
            yield batch

    states = torch.get_rng_state(), random.getstate()
    assert measure_loss(model, drawing()) == measure_loss(model, batches)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.use_cache is True


def test_reads_no_more_than_asked():
    read = []

    def counted():
        for batch in padded_batches():
            read.append(batch)
            yield batch

    assert measure_loss(llama(), counted(), max_batches=1)[1] == 4
    assert len(read) == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "predict no token"),
        ([{"input_ids": torch.tensor([[3]])}], "predict no token"),
        ([{"inputs_embeds": torch.zeros(1, 2, 16)}], "batch of inputs_embeds"),
    ],
)
def test_nothing_to_predict_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        measure_loss(llama(), batches)


def test_model_without_a_loss_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 2)

        def forward(self, input_ids, labels):
            return self.head(input_ids[..., None].float())

    with pytest.raises(ValueError, match=r"returns a loss .* got Bare"):
        measure_loss(Bare(), [{"input_ids": torch.tensor([[1, 2]])}])
