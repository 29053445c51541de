"""What the hooks on the student see, ask for, and give back to the caller."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.recovery.student_call import StudentCall, StudentCalls
from tests.tiny_models import tiny_family, tiny_llama, token_windows

IDS = token_windows(2)
HIDDEN = {"hidden_states": "output_hidden_states"}


def one(call: StudentCall, output: Any) -> Tensor:
    return output.logits.sum() * 0 + 1


def test_a_training_call_is_taken_once() -> None:
    model = tiny_llama().train()
    calls = StudentCalls(model, wanted={}, replace_loss=None)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, num_items_in_batch=3)
    call = calls.take()
    assert call.inputs.keys() == {"input_ids", "attention_mask"}
    assert call.labels is IDS
    with pytest.raises(ValueError, match="was not called with gradients"):
        calls.take()


def test_evaluation_and_passes_without_gradients_are_not_training_calls() -> None:
    model = tiny_llama()
    calls = StudentCalls(model, wanted=HIDDEN, replace_loss=one)
    assert model.eval()(input_ids=IDS).get("hidden_states") is None
    with torch.no_grad():
        model.train()(input_ids=IDS)
    with pytest.raises(ValueError, match="was not called with gradients"):
        calls.take()


def test_hidden_states_are_taken_along_and_shown_only_if_asked_for() -> None:
    model = tiny_llama().train()
    calls = StudentCalls(model, wanted=HIDDEN, replace_loss=None)
    output = model(input_ids=IDS)
    assert "hidden_states" not in output
    assert len(calls.take().outputs["hidden_states"]) == 3
    output = model(input_ids=IDS, output_hidden_states=True)
    assert len(output.hidden_states) == 3


def test_the_loss_is_replaced_and_stands_first() -> None:
    model = tiny_llama().train()
    calls = StudentCalls(model, wanted=HIDDEN, replace_loss=one)
    asked: list[set[str]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: asked.append(set(kwargs)), with_kwargs=True)
    output = model(IDS, labels=IDS)
    assert asked == [{"input_ids", "output_hidden_states"}]  # without labels: its own loss would be for nothing
    assert next(iter(output)) == "loss"
    assert output[0].item() == output.loss.item() == 1
    calls.remove()
    assert model(input_ids=IDS, labels=IDS).loss.item() > 1


def test_an_encoder_decoder_gets_the_decoder_inputs_that_its_labels_give() -> None:
    model = tiny_family("t5").train()
    calls = StudentCalls(model, wanted={}, replace_loss=None)
    model(input_ids=IDS, labels=IDS)
    decoder_ids = calls.take().inputs["decoder_input_ids"]
    assert isinstance(decoder_ids, Tensor)
    assert torch.equal(decoder_ids[:, 1:], IDS[:, :-1])


def test_bad_calls_are_refused() -> None:
    model = tiny_llama().train()
    calls = StudentCalls(model, wanted={}, replace_loss=one)
    with pytest.raises(ValueError, match="with gradients but without labels; pass labels"):
        model(input_ids=IDS)
    embeddings = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=embeddings, labels=IDS)
    with pytest.raises(ValueError, match="call it with return_dict=True"):
        model(input_ids=IDS, labels=IDS, return_dict=False)
    with pytest.raises(ValueError, match="checkpoint its blocks instead"):
        torch.utils.checkpoint.checkpoint(
            lambda ids: model(input_ids=ids, labels=ids).loss, IDS, use_reentrant=False
        ).backward()
    calls.remove()
