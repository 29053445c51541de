"""Blocks that run alone give what they give in the model."""

import pytest
import torch
from torch import nn

from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.depth.bypass import bypassed
from lightning_prune.structured.depth.group_replay import check_replay, record, replay
from lightning_prune.structured.depth.influence import block_streams
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import padded_batches, tiny_model
from tests.tiny_models import tiny_family, token_windows

BATCH = padded_batches(1)[0]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom"])
def test_replayed_streams_are_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model)
    with evaluating(model), torch.no_grad():
        inputs, outputs, mask_BT = block_streams(model, BATCH)
        recording = record(model, blocks, BATCH)
        assert torch.equal(recording.input_BTD, inputs[0])
        assert torch.equal(recording.mask_BT, mask_BT)
        assert torch.equal(replay(recording, dict(enumerate(blocks)), CPU), outputs[1])
        assert torch.equal(replay(recording, {0: blocks[0]}, CPU), outputs[0])
        with bypassed(model, (), layers=[0]):
            without = block_streams(model, BATCH)[1][1]
        assert torch.equal(replay(recording, {1: blocks[1]}, CPU), without)
        check_replay(model, blocks, (0, 0), BATCH)


def test_hidden_states_that_do_not_pass_from_block_to_block_are_noticed() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, input_ids: torch.Tensor) -> object:
            stream = self.embed(input_ids)
            stream = self.layers[1](2 * self.layers[0](stream))
            return type("Output", (), {"logits": stream})()

    model = Detour()
    batch = {"input_ids": torch.arange(8).reshape(2, 4)}
    with pytest.raises(ValueError, match="block 0 give something else alone than in the model"):
        check_replay(model, list(model.layers), (0, 0), batch)
    other = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="calls 2 of 3 blocks"):
        record(model, [*model.layers, other], batch)


def test_encoder_and_decoder_blocks_are_no_group() -> None:
    model = tiny_family("t5").eval()
    blocks = find_blocks(model)
    ids = token_windows(2, 8, seed=1)
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    with evaluating(model), pytest.raises(ValueError, match="something else alone"):
        check_replay(model, blocks, (1, 1), batch)
