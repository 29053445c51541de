from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.conditional.block_calls import Padding, blocks_with_calls, is_causal, noting
from lightning_prune.conditional.routed_ffn import ffn_parts
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.stack import candidate_stacks
from tests.conditional.routed_models import stack_of
from tests.tiny_models import tiny_family, token_windows


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gpt2", True), ("bert", False), ("t5", False)])
def test_a_block_tells_by_what_it_computes_whether_it_looks_ahead(family: str, expected: bool) -> None:
    model = tiny_family(family).eval()
    for block in blocks_with_calls(model, stack_of(model)):
        assert is_causal(block.call, block.module.forward) is expected


def test_the_decoder_of_two_sides_is_causal() -> None:
    model = tiny_family("t5").eval()
    stack = next(s for s in candidate_stacks(model, Blueprint(model)) if s.containers == ("decoder.block",))
    assert all(is_causal(block.call, block.module.forward) for block in blocks_with_calls(model, stack))


def test_a_part_of_several_modules_is_found_as_their_chain() -> None:
    model = tiny_family("bert").eval()
    parts, _, _ = ffn_parts(model, stack_of(model), None)
    layer = model.bert.encoder.layer[1]
    assert parts[1].modules == (layer.intermediate, layer.output.dense)
    llama = tiny_family("llama").eval()
    assert ffn_parts(llama, stack_of(llama), (1,))[0][0].modules == (llama.model.layers[1].mlp,)


def seen_by_ffn(family: str, name: str, **inputs: Tensor) -> Tensor | None:
    """Return the padding that is known when a feed-forward part runs."""
    model = tiny_family(family).eval()
    container = name.split(".")[0]
    stack = next(s for s in candidate_stacks(model, Blueprint(model)) if s.containers[0].startswith(container))
    found: list[Tensor | None] = []
    with ExitStack() as undo:
        known = noting(blocks_with_calls(model, stack), undo)
        part: nn.Module = model.get_submodule(name)
        part.register_forward_pre_hook(lambda _, args: found.append(known.keep(args[0])))
        with torch.no_grad():
            model(**inputs)
    return found[0]


KEEP = torch.arange(9) < torch.tensor([[9], [4]])
IDS = token_windows(2, 9)


def test_padding_of_each_side_is_that_of_its_own_tokens() -> None:
    both = {"input_ids": IDS, "attention_mask": KEEP.long(), "decoder_input_ids": IDS[:, :6]}
    decoder_keep = torch.arange(6) < torch.tensor([[3], [6]])
    both["decoder_attention_mask"] = decoder_keep.long()
    encoder = seen_by_ffn("t5", "encoder.block.1.layer.1.DenseReluDense", **both)
    decoder = seen_by_ffn("t5", "decoder.block.1.layer.2.DenseReluDense", **both)
    assert encoder is not None
    assert decoder is not None
    assert torch.equal(encoder, KEEP)
    assert torch.equal(decoder, decoder_keep)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_a_decoder_is_read_from_its_masks_of_pairs(side: str) -> None:
    keep = KEEP if side == "right" else KEEP.flip(1)
    found = seen_by_ffn("llama", "model.layers.1.mlp", input_ids=IDS, attention_mask=keep.long())
    assert found is not None
    assert torch.equal(found, keep)


def test_flat_tokens_get_their_sequences_back() -> None:
    known = Padding()
    known.shape = (2, 3)
    assert known.tokens(torch.zeros(6, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_mask_that_is_added_to_scores_hides_nothing_where_it_is_zero(is_padded: bool) -> None:
    added = torch.zeros(2, 1, 1, 9).masked_fill(~KEEP[:, None, None] & is_padded, -1e9)
    known = Padding()
    known.note({"attention_mask": added})
    keep = known.keep(torch.zeros(2, 9, 4))
    assert keep is not None if is_padded else keep is None
    if keep is not None:
        assert torch.equal(keep, KEEP)
