"""Which layers read the same input: attention, feed-forward, encoder-decoder blocks, experts in a list."""

import functools

import torch
from torch import Tensor, nn

from lightning_prune.recovery.reading_order import Stage, reading_order
from lightning_prune.targets.targets import find_blocks
from tests.tiny_models import tiny_family, token_windows


def order(name: str, block_number: int = 0) -> list[Stage]:
    model = tiny_family(name).eval()
    block = find_blocks(model)[block_number]
    layers = {path: layer for path, layer in block.named_modules() if hasattr(layer, "weight") and "norm" not in path}
    layers = {path: layer for path, layer in layers.items() if layer.weight.ndim == 2}
    ids = token_windows(2, 8)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    return reading_order(block, layers, functools.partial(model, **inputs))


def test_llama_has_four_stages() -> None:
    assert order("llama") == [
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]],
        [["self_attn.o_proj"]],
        [["mlp.gate_proj", "mlp.up_proj"]],
        [["mlp.down_proj"]],
    ]


def test_layers_of_another_parent_come_later() -> None:
    assert order("bert") == [
        [["attention.self.query", "attention.self.key", "attention.self.value"]],
        [["attention.output.dense"]],
        [["intermediate.dense"]],
        [["output.dense"]],
    ]


def test_cross_attention_reads_two_inputs() -> None:
    stages = order("t5", 2)  # the first block of the decoder
    assert [["layer.1.EncDecAttention.q"]] in stages
    assert [["layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"]] in stages
    assert stages[0] == [["layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"]]


class Expert(nn.Module):
    """Two layers in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.gate(inputs) * self.up(inputs))


class Experts(nn.Module):
    """Tokens go to expert 2 first, and to no expert 1."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.experts[2](inputs[:3]), self.experts[0](inputs[3:])])


def test_all_experts_share_two_stages_in_the_order_of_their_names() -> None:
    block = Experts()
    layers = {path: layer for path, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    assert reading_order(block, layers, functools.partial(block, torch.randn(5, 4))) == [
        [["experts.0.gate", "experts.0.up"], ["experts.2.gate", "experts.2.up"]],
        [["experts.0.down"], ["experts.2.down"]],
    ]


def test_a_block_may_be_the_layer_itself() -> None:
    layer = nn.Linear(4, 4)
    assert reading_order(layer, {"": layer}, functools.partial(layer, torch.randn(2, 4))) == [[[""]]]
