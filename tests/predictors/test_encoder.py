"""What reads an instruction with the model's own lowest blocks."""

import pytest
import torch

from lightning_prune.predictors.encoder import OwnLayers
from tests.tiny_models import tiny_llama, token_windows


def test_as_many_blocks_as_the_model_has_leave_none_to_stop_at() -> None:
    for number in (2, 3):
        with pytest.raises(ValueError, match=f"reads {number} layers of the model's own, which has 2; take fewer"):
            OwnLayers(num_layers=number).build(tiny_llama())


def test_its_state_is_the_mean_over_the_tokens_that_come_into_the_next_block() -> None:
    model, ids = tiny_llama().eval(), token_windows(2, 6)
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=attention, output_hidden_states=True).hidden_states[1]
        found = OwnLayers(num_layers=1).build(model)(ids, attention)
    torch.testing.assert_close(found, torch.stack([states[0].mean(0), states[1, :4].mean(0)]))
