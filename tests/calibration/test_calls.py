"""A statistic sees real tokens alone, whichever part of a model they reach, and however much padding there is."""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

from lightning_prune import Once, Sparsifier, Targets
from lightning_prune.calibration import hooks
from lightning_prune.calibration.calls import Calls
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.statistics.input_norm import InputNorm
from tests.tiny_models import tiny_family, tiny_llama, token_windows

Batch = Mapping[str, Any]
Norms = dict[str, tuple[int, Tensor]]  # number of tokens and norms, by target


def norms(model: nn.Module, run: Callable[[], object], *, include: tuple[str, ...] = ()) -> Norms:
    bindings = [b for b in Targets(include=include).resolve(model) if type(b.module) is nn.Linear]
    feeds = [(b, InputNorm(b.parameter.detach(), b.shape_OI[1])) for b in bindings]
    handles = hooks.observe_inputs(model, feeds, only_training=False)
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return {binding.name: (int(statistic.num_tokens), statistic.compute()) for binding, statistic in feeds}


def assert_same(one: Norms, other: Norms) -> None:
    assert one.keys() == other.keys()
    for name, (count, norm) in one.items():
        assert other[name][0] == count, name
        torch.testing.assert_close(other[name][1], norm, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: name + m)


def tiny_bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64}
    layers: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2}
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=64, d_model=16, **sizes, **layers, **heads, **tokens)
    return BartForConditionalGeneration(config)


def two_sides(pad: int, source: int, target: int) -> dict[str, Tensor]:
    """Return a batch padded to the given lengths; three and six real source tokens, five and two target tokens."""
    ids, labels = token_windows(2, 6).clamp(min=3), token_windows(2, 5, seed=1).clamp(min=3)
    attention_mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    labels = labels.masked_fill(torch.tensor([[False] * 5, [False] * 2 + [True] * 3]), -100)
    fill: Callable[..., Tensor] = nn.functional.pad
    return {
        "input_ids": fill(ids.masked_fill(attention_mask == 0, pad), (0, source - 6), value=pad),
        "attention_mask": fill(attention_mask, (0, source - 6)),
        "labels": fill(labels, (0, target - 5), value=-100),
    }


@pytest.mark.parametrize(("make", "pad"), [(lambda: tiny_family("t5"), 0), (tiny_bart, 1)])
@pytest.mark.parametrize("sizes", [(9, 5), (6, 9), (9, 9)])
def test_encoder_and_decoder_tokens_each_have_their_own_mask(
    make: Callable[[], PreTrainedModel], pad: int, sizes: tuple[int, int]
) -> None:
    model = make().double().eval()
    short = norms(model, lambda: model(**two_sides(pad, 6, 5)))
    assert_same(short, norms(model, lambda: model(**two_sides(pad, *sizes))))
    for name, (count, _) in short.items():
        reads_states = any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj"))
        reads_states |= "encoder_attn.v_proj" in name
        of_decoder = "decoder." in name and not reads_states
        assert count == (5 + 2 if of_decoder else 3 + 6), name


@pytest.mark.parametrize(("make", "pad"), [(lambda: tiny_family("t5"), 0), (tiny_bart, 1)])
def test_masks_of_an_encoder_decoder_do_not_depend_on_padding(make: Callable[[], PreTrainedModel], pad: int) -> None:
    def once(source: int, target: int) -> dict[str, Tensor]:
        conductor = Sparsifier(schedule=Once(sparsity=0.5), scorer=Wanda())
        conductor.prune_once(make().double(), [two_sides(pad, source, target)], progress=False)
        return dict(conductor.masks)

    def trained(source: int, target: int) -> dict[str, Tensor]:
        model = make().double().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        conductor = Sparsifier(schedule=Once(sparsity=0.5, at=1), scorer=Wanda())
        conductor.attach(model, [optimizer], total_steps=1)
        model(**two_sides(pad, source, target)).loss.backward()
        optimizer.step()
        conductor.detach()
        return dict(conductor.masks)

    for prune in (once, trained):
        short = prune(6, 5)
        assert all(torch.equal(short[name], mask) for name, mask in prune(13, 8).items())


@pytest.mark.parametrize(("make", "pad"), [(lambda: tiny_family("t5"), 0), (tiny_bart, 1)])
def test_what_follows_the_decoder_reads_its_tokens(make: Callable[[], PreTrainedModel], pad: int) -> None:
    model = make().eval()
    config = model.config
    config.tie_word_embeddings = False
    model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)  # of its own, as a model for new words has
    found = norms(model, lambda: model(**two_sides(pad, 6, 6)), include=("lm_head.weight",))
    assert {name: count for name, (count, _) in found.items()} == {"lm_head.weight": 5 + 2}


def test_a_decoder_mask_is_taken_at_its_word() -> None:
    model = tiny_family("t5").eval()
    decoder_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"input_ids": token_windows(2, 7), "decoder_input_ids": token_windows(2, 4)}
    found = norms(model, lambda: model(**batch, decoder_attention_mask=decoder_mask))
    assert {count for name, (count, _) in found.items() if "decoder" in name and "EncDec" not in name} == {6}
    assert found["encoder.block.0.layer.0.SelfAttention.q.weight"][0] == 14


class Inside(nn.Module):
    """Holds a model and calls it, as a LightningModule does in its training step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Batch, *, by_position: bool = False) -> Tensor:
        if by_position:
            return self.inner(batch["input_ids"], batch["attention_mask"]).logits
        return self.inner(**batch).logits


@pytest.mark.parametrize("by_position", [False, True])
def test_calls_of_an_inner_model_are_seen_as_those_of_the_outer_one(by_position: bool) -> None:
    model = Inside(tiny_llama().double())
    batch = {"input_ids": token_windows(2, 8), "attention_mask": torch.tensor([[1] * 8, [1] * 3 + [0] * 5])}
    longer = {name: nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    short = norms(model, lambda: model(batch, by_position=by_position))
    assert {count for count, _ in short.values()} == {11}
    assert_same(short, norms(model, lambda: model(longer, by_position=by_position)))
    assert_same(short, norms(model, lambda: model.inner(**longer)))  # without a call of the outer one at all


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_norms_do_not_depend_on_padding_at_either_side(name: str, side: str) -> None:
    model = tiny_family(name).double().eval()
    ids = token_windows(2, 6).clamp(min=3)
    attention_mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] if side == "right" else [[1] * 6, [0] * 2 + [1] * 4])
    if side == "left" and name == "bert":
        pytest.skip("its positions are absolute, so padding on the left changes the model's own output")

    def wider(by: int) -> dict[str, Tensor]:
        widths = (0, by) if side == "right" else (by, 0)
        return {
            "input_ids": nn.functional.pad(ids, widths),
            "attention_mask": nn.functional.pad(attention_mask, widths),
        }

    assert_same(norms(model, lambda: model(**wider(0))), norms(model, lambda: model(**wider(7))))


@pytest.mark.parametrize("is_added", [False, True])
def test_a_mask_of_pairs_tells_padding_as_well(is_added: bool) -> None:
    model = tiny_llama().double().eval()
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    pairs = (torch.ones(5, 5).tril().bool() & keep[:, None, :] & keep[:, :, None])[:, None]
    mask = torch.zeros(pairs.shape).double().masked_fill(~pairs, -1e300) if is_added else pairs
    ids = token_windows(2, 5)
    flat = norms(model, lambda: model(input_ids=ids, attention_mask=keep.long()))
    assert {count for count, _ in flat.values()} == {8}
    found = norms(model, lambda: model(input_ids=ids, attention_mask=mask))
    assert {count for count, _ in found.values()} == {8}


def test_masks_of_torchs_own_transformer_are_read() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
    model = nn.Transformer(16, 2, 2, 2, **options)
    source, target = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    is_padding = torch.tensor([[False] * 6, [False] * 2 + [True] * 4])
    of_target = torch.tensor([[False] * 4, [False] + [True] * 3])
    masks = {"src_key_padding_mask": is_padding, "memory_key_padding_mask": is_padding}
    found = norms(model, lambda: model(source, target, **masks, tgt_key_padding_mask=of_target))
    counts = {name: count for name, (count, _) in found.items() if "linear1" in name}
    assert counts == {
        "encoder.layers.0.linear1.weight": 8,
        "encoder.layers.1.linear1.weight": 8,
        "decoder.layers.0.linear1.weight": 5,
        "decoder.layers.1.linear1.weight": 5,
    }


class Experts(nn.Module):
    """Sends every token to one of two experts, as rows of a flat tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        is_first = flat[:, 0] > 0
        out = torch.empty_like(flat)
        out[is_first], out[~is_first] = self.experts[0](flat[is_first]), self.experts[1](flat[~is_first])
        return out.reshape(hidden.shape)


class Routed(nn.Module):
    """Two layers of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(64, 8), nn.ModuleList([Experts(), Experts()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


def test_a_mask_by_position_reaches_layers_that_get_none() -> None:
    attention_mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    model = Routed()
    found = norms(model, lambda: model(token_windows(2, 6), attention_mask))
    assert sum(count for count, _ in found.values()) == 2 * (6 + 3)


def test_rows_that_a_router_picked_are_told_from_padding() -> None:
    model, ids = Routed(), token_windows(2, 6).clamp(min=3)
    ids[1, 3:] = 0
    attention_mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    found = norms(model, lambda: model(ids, attention_mask))
    for layer in range(2):
        assert sum(found[f"layers.{layer}.experts.{expert}.weight"][0] for expert in range(2)) == 9
    wider = norms(model, lambda: model(nn.functional.pad(ids, (0, 4)), nn.functional.pad(attention_mask, (0, 4))))
    assert_same(found, wider)


def test_a_hook_is_shared_by_copies_and_left_behind_by_pickles() -> None:
    model = tiny_llama()
    with Calls(model):
        copy.deepcopy(model)(token_windows(1, 4))
        twin = pickle.loads(pickle.dumps(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert twin(token_windows(1, 4)).logits.shape == (1, 4, 64)


def test_an_interrupted_pass_leaves_nothing_for_the_next() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fails = tiny_llama(), True

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
            if self.fails:
                raise RuntimeError("no memory left")
            return logits

    model = Failing()
    ids, attention_mask = token_windows(1, 4), torch.tensor([[1, 0, 0, 0]])

    def run() -> None:
        with pytest.raises(RuntimeError, match="no memory left"):
            model(ids, attention_mask)
        model.fails = False
        model(ids)

    assert {count for count, _ in norms(model, run).values()} == {1 + 4}
