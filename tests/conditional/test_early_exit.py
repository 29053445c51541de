import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaModel

from lightning_prune.conditional.early_exit import EarlyExit
from tests.conditional.inserted import decoded, insert, model_of, tokens
from tests.conditional.test_sparse_block import rows_of
from tests.tiny_models import recompute_activations, tiny_llama, token_windows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"agreement": 0.0}, r"agreement must lie in \(0, 1\], got 0.0"),
        ({"agreement": 1.1}, "got 1.1"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"confidence": "top"}, "confidence must be learned or entropy, got 'top'"),
        ({"positions": "prompt"}, "positions must be decode or all, got 'prompt'"),
        ({"weight": -1.0}, "weight must be 0.0 or more"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EarlyExit(**options)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (lambda: model_of("t5"), {}, "which has an encoder and a decoder"),
        (lambda: LlamaModel(tiny_llama().config), {}, "LlamaModel has none"),
        (tiny_llama, {"exits": (1,)}, r"exits must be blocks from 0 to 0, at least one, got \[1\]"),
        (tiny_llama, {"exits": ()}, r"at least one, got \[\]"),
    ],
)
def test_what_cannot_be_is_refused_and_left_alone(model: Any, options: dict[str, Any], words: str) -> None:
    model = model()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        insert(EarlyExit(**options), model)
    assert list(model.state_dict()) == before
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "opt"])
def test_at_first_nothing_leaves_and_the_model_can_be_given_back(name: str) -> None:
    model = model_of(name)
    ids, names = tokens(2, 9), list(model.state_dict())
    before, forwards = model(input_ids=ids).logits, [vars(module).get("forward") for module in model.modules()]
    condition = insert(EarlyExit(exits=(0, 1), positions="all"), model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(condition.exits) == 2
    assert all(any(name.startswith(part) for part in condition.added()) for name in set(model.state_dict()) - {*names})
    condition.remove()
    assert list(model.state_dict()) == names
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert torch.equal(model(input_ids=ids).logits, before)


def trained(model: Any, condition: Any, *, num_steps: int = 3, is_frozen: bool = False) -> None:
    torch.manual_seed(0)
    names = {f"{part}.{name}" for part, module in condition.added().items() for name, _ in module.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or not is_frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    condition.begin(total_steps=num_steps)
    ids = token_windows(16)
    model.train()
    for _ in range(num_steps):
        loss = model(input_ids=ids, labels=ids).loss
        total = condition.loss() if is_frozen else loss + condition.loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    model.eval()


def test_no_gradient_reaches_the_model() -> None:
    model = tiny_llama(layers=3)
    condition = insert(EarlyExit(exits=(0, 1)), model)
    model.train()(input_ids=token_windows(2))
    condition.loss().backward()
    names = {f"model.layers.{layer}.early_exit.{name}" for layer in (0, 1) for name in ("weight", "bias", "sureness")}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names


def leaving(condition: Any, threshold: float) -> None:
    for part in condition.exits:
        part.threshold.fill_(threshold)


@torch.no_grad()
def test_a_token_that_left_costs_keys_and_values_only() -> None:
    model = tiny_llama(layers=4).eval()
    condition = insert(EarlyExit(exits=(1,)), model)
    condition.exits[0].weight.normal_(std=0.1)
    leaving(condition, 0.0)
    prompt = model(input_ids=tokens(1, 5), use_cache=True)
    layers, streams = model.model.layers, []
    layers[1].register_forward_hook(lambda _, __, output: streams.append(output))
    attention = layers[3].self_attn
    with (
        rows_of(layers[1].mlp.up_proj) as before,
        rows_of(layers[2].mlp.up_proj) as behind,
        rows_of(attention.q_proj) as queries,
        rows_of(attention.k_proj) as keys,
    ):
        logits = model(input_ids=tokens(1, 1), past_key_values=prompt.past_key_values).logits
    assert (before, behind, queries, keys) == ([1], [], [], [1])
    assert prompt.past_key_values.get_seq_length() == 6
    stream = streams[-1][0] if isinstance(streams[-1], tuple) else streams[-1]
    expected = model.lm_head(model.model.norm(condition.exits[0].shortcut(stream)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def exiting(model: Any, confidence: str = "learned") -> Any:
    """Return exits of which each lets some tokens leave."""
    condition = insert(EarlyExit(exits=(0, 1), positions="all", confidence=confidence), model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in condition.exits:
            part.weight.copy_(0.3 * torch.randn(part.weight.shape, generator=generator))
            if confidence == "learned":
                part.sureness[:-1] = torch.randn(part.sureness[:-1].shape, generator=generator)
            part.threshold.fill_(0.8 if confidence == "learned" else 0.05)
    for part in condition.parts.values():
        part.sparse.least = 1
    return condition


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "confidence"),
    [("llama", "learned"), ("llama", "entropy"), ("qwen2", "learned"), ("gemma2", "learned"), ("gpt2", "learned"),
     ("opt", "learned")],
)  # fmt: skip
def test_rows_leave_alone_and_a_text_gives_what_decoding_it_gives(name: str, confidence: str) -> None:
    model = model_of(name)
    condition = exiting(model, confidence)
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    real = mask.bool()
    whole = model(input_ids=ids, attention_mask=mask).logits
    gone = condition.call.gone["who"]
    assert 0 < int(gone.sum()) < gone.numel()
    pieces = decoded(model, ids, mask, ends=(5, 6, 7, 8, 9, 10, 11, 12))
    torch.testing.assert_close(pieces[real], whole[real], rtol=0, atol=2e-5)
    for part in condition.parts.values():
        part.sparse.is_sparse = False
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[real], whole[real], rtol=0, atol=1e-5)
    alone = model(input_ids=ids[1:2]).logits
    torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_earliest_exit_that_is_sure_answers() -> None:
    model = model_of("llama")
    condition = exiting(model)
    leaving(condition, 0.0)
    ids = tokens(1, 6)
    first, second = condition.exits
    both = model(input_ids=ids).logits
    second.threshold.fill_(float("inf"))
    assert torch.equal(model(input_ids=ids).logits, both)
    first.threshold.fill_(float("inf"))
    second.threshold.fill_(0.0)
    assert not torch.allclose(model(input_ids=ids).logits, both, atol=1e-3)


@torch.no_grad()
def test_prompts_run_whole_unless_asked() -> None:
    model = tiny_llama(layers=3).eval()
    ids = tokens(2, 8)
    before = model(input_ids=ids).logits
    condition = insert(EarlyExit(exits=(0,)), model)
    condition.exits[0].weight.normal_()
    leaving(condition, 0.0)
    assert torch.equal(model(input_ids=ids).logits, before)
    condition.exits[0].options = EarlyExit(positions="all")
    assert not torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(("confidence", "wanted"), [("learned", 0.7), ("entropy", 0.93)])
def test_exits_learn_and_keep_the_agreement_that_is_wanted(confidence: Any, wanted: float) -> None:
    model = tiny_llama(layers=4)
    condition = insert(EarlyExit(exits=(1,), agreement=0.9, positions="all", confidence=confidence), model)
    trained(model, condition, num_steps=60)
    seen = condition.metrics()
    assert seen["imitation"] < 0.5
    assert seen["exit_share"] > 0.2
    assert seen["exit_agreement"] > 0.85
    ids = token_windows(64, seed=1)
    condition.options = EarlyExit(agreement=wanted, confidence=confidence)
    condition.calibrate(model, [{"input_ids": ids[:32]}, {"input_ids": ids[32:]}])
    with torch.no_grad():
        early = model(input_ids=ids).logits.argmax(-1)
        gone = condition.call.gone["who"]
        leaving(condition, float("inf"))
        full = model(input_ids=ids).logits.argmax(-1)
    assert float(gone.float().mean()) > 0.2
    assert float((early == full)[gone].float().mean()) >= wanted - 0.02
    part = condition.exits[0]
    assert part.seen_K.sum() == ids.numel()
    assert bool(gone.all()) == (confidence == "learned")  # at 0.93 some stay


def test_padding_is_not_imitated() -> None:
    losses = []
    for padded in (False, True):
        model = tiny_llama(layers=3)
        condition = insert(EarlyExit(exits=(0,)), model)
        ids = tokens(2, 8)
        mask = torch.ones_like(ids)
        if padded:
            ids = torch.cat([ids, torch.zeros(2, 3, dtype=ids.dtype)], 1)
            mask = torch.cat([mask, torch.zeros(2, 3, dtype=mask.dtype)], 1)
        model.train()(input_ids=ids, attention_mask=mask)
        losses.append(condition.loss().detach())
    torch.testing.assert_close(losses[0], losses[1])


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("confidence", ["learned", "entropy"])
def test_recomputed_activations_change_nothing(confidence: str) -> None:
    states = []
    for is_recomputing in (False, True):
        model = tiny_llama(layers=3)
        model.config.use_cache = False  # recomputing turns it off, and without it some versions round otherwise
        condition = insert(EarlyExit(exits=(0, 1), confidence=confidence), model)
        if is_recomputing:
            recompute_activations(model, use_reentrant=False)
        trained(model, condition)
        states.append(state(model))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-6, msg=name)


def test_saved_weights_bring_exits_and_thresholds_back() -> None:
    model = tiny_llama(layers=3)
    condition = insert(EarlyExit(exits=(0,), positions="all", agreement=0.3), model)
    trained(model, condition, num_steps=10)
    assert condition.exits[0].threshold.item() < float("inf")
    other = tiny_llama(layers=3, seed=1).eval()
    insert(EarlyExit(exits=(0,), positions="all"), other)
    other.load_state_dict(model.state_dict())
    ids = tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_copy_can_be_made_at_any_time() -> None:
    model = tiny_llama(layers=3)
    condition = insert(EarlyExit(exits=(0,)), model)
    model.train()(input_ids=tokens(1, 6))
    assert condition.loss() is not None
    twin = copy.deepcopy(model).eval()
    assert twin.model.layers[2].early_exit.call is not condition.call
    assert twin.model.layers[2].early_exit.readout.model is twin


def test_generation_leaves_early_and_says_the_same_where_exits_agree() -> None:
    model = tiny_llama(layers=4)
    condition = insert(EarlyExit(exits=(1,), agreement=1.0), model)
    trained(model, condition, num_steps=80)
    ids = token_windows(2, 6, seed=2)
    leaving(condition, float("inf"))
    full = model.generate(ids, max_new_tokens=6, do_sample=False)
    leaving(condition, 0.0)
    with rows_of(model.model.layers[3].mlp.up_proj) as seen:
        early = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert seen == [12]  # the prompt
    assert float((early == full).float().mean()) > 0.8
