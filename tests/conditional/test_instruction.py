import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from lightning_prune.conditional.instruction import Instruction, InstructionCondition, Predictor
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.encoder import Encoder, Fresh, OwnLayers
from lightning_prune.predictors.prompt import Reads
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, zeroed
from lightning_prune.structured.structure import Stack
from tests.tiny_models import VOCAB, needs_stacked_experts, recompute_activations, tiny_family, tiny_llama

STACK = Stack((), "num_hidden_layers", (), 2)  # an instruction looks for its units by itself


def tiny_opt() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCAB, num_attention_heads=2, max_position_embeddings=64, **sizes))


def tiny_phi3() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return Phi3ForCausalLM(
        Phi3Config(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, **sizes)
    )


MODELS = {
    "llama": tiny_llama,
    "gpt2": lambda: tiny_family("gpt2"),
    "opt": tiny_opt,
    "phi3": tiny_phi3,
}


def conditioned(model: PreTrainedModel, **options: Any) -> InstructionCondition:
    options = {"budget": Budget(keep=0.5), "reads": Reads(dropout=0), "ramp": 0.0, **options}
    condition = Instruction(**options).insert(model, STACK)
    condition.begin(total_steps=10)
    return condition


def batch(num: int = 3, *, length: int = 12, prompt: int = 5, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (num, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_each_row_computes_what_the_model_without_its_units_computes(name: str) -> None:
    model = MODELS[name]().eval()
    structure = discover(model, kinds=["ffn"])
    condition = conditioned(model, choice=SoftTopK(hard=True))
    data = batch()
    masks = condition.masks_of(condition.prompt(data))
    assert all((mask > 0).sum(-1).eq(k).all() for mask, k in zip(masks, condition.predictor.keep, strict=True))
    found = model(**data).logits
    for row in range(3):
        cuts = [
            Cut(group.key, tuple(mask[row].nonzero().flatten().tolist()))
            for group, mask in zip(condition.predictor.units.groups, masks, strict=True)
        ]
        with condition.whole(), zeroed(model, structure.groups, cuts):
            expected = model(**{key: value[row : row + 1] for key, value in data.items()}).logits[0]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


def test_keeping_all_units_is_the_model_itself() -> None:
    model, data = tiny_llama().eval(), batch()
    expected = model(**data).logits
    condition = conditioned(model, budget=Budget(keep=1.0))
    torch.testing.assert_close(model(**data).logits, expected)
    condition.remove()
    assert torch.equal(model(**data).logits, expected)
    assert not hasattr(model, "mask_predictor")
    assert "forward" not in vars(model)


@pytest.mark.parametrize("encoder", [OwnLayers(), OwnLayers(num_layers=1), Fresh(width=16, num_heads=2)])
def test_gradients_reach_head_and_encoder_at_the_first_step(encoder: Encoder) -> None:
    model = tiny_llama(tied=False).train()
    condition = conditioned(model, predictor=Predictor(encoder=encoder))
    model(**batch()).loss.backward()
    for name, parameter in condition.predictor.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0 or name.endswith("in_proj_bias"), name


def test_masks_read_the_instruction_alone_wherever_padding_stands() -> None:
    model = tiny_llama().eval()
    condition = conditioned(model)
    data = batch(1)
    (expected, *_) = condition.masks_of(condition.prompt(data))
    pad = torch.zeros(1, 4, dtype=torch.long)
    for order in (lambda x, p: torch.cat((p, x), 1), lambda x, p: torch.cat((x, p), 1)):
        padded = {
            "input_ids": order(data["input_ids"], pad),
            "attention_mask": order(data["attention_mask"], pad),
            "labels": order(data["labels"], pad - 100),
        }
        torch.testing.assert_close(condition.masks_of(condition.prompt(padded))[0], expected)
    other = {**data, "input_ids": data["input_ids"].clone()}
    other["input_ids"][0, 5:] = 3  # behind the instruction
    torch.testing.assert_close(condition.masks_of(condition.prompt(other))[0], expected)


def test_a_row_is_masked_alike_in_any_batch() -> None:
    model = tiny_llama().eval()
    condition = conditioned(model)
    data = batch(4)
    together = condition.masks_of(condition.prompt(data))
    alone = condition.masks_of(condition.prompt({key: value[2:3] for key, value in data.items()}))
    for mask, one in zip(together, alone, strict=True):
        torch.testing.assert_close(mask[2:3], one)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_recomputed_blocks_get_the_same_masks_and_their_gradient(is_reentrant: bool) -> None:
    grads = []
    for recomputes in (False, True):
        model = tiny_llama().train()
        torch.manual_seed(3)
        conditioned(model)
        if recomputes:
            recompute_activations(model, use_reentrant=is_reentrant)
            model.enable_input_require_grads()
        for seed in (0, 1):  # accumulated: the masks of two calls
            model(**batch(seed=seed)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_recomputation_by_other_means_is_refused() -> None:
    model = tiny_llama().train()
    conditioned(model)
    block, plain = model.model.layers[0], model.model.layers[0].forward
    block.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        plain, *args, use_reentrant=False, **kwargs
    )
    with pytest.raises(RuntimeError, match="computed again in the backward pass"):
        model(**batch()).loss.backward()


def test_generation_keeps_the_masks_of_the_prompt() -> None:
    model = tiny_llama().eval()
    condition = conditioned(model)
    prompt = batch(2)["input_ids"][:, :5]
    attention = torch.ones_like(prompt)
    masks = condition.masks_of(condition.prompt({"input_ids": prompt, "attention_mask": attention}))
    found = model.generate(prompt, attention_mask=attention, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with condition.fixed(masks):
        expected = model.generate(
            prompt, attention_mask=attention, max_new_tokens=6, do_sample=False, use_cache=False, eos_token_id=None
        )
    assert found.tolist() == expected.tolist()


def test_a_cache_of_another_mask_is_refused() -> None:
    model = tiny_llama().eval()
    condition = conditioned(model)
    ids = batch(1)["input_ids"]
    with condition.whole():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="belongs to another mask"):
        model(ids[:, :1], past_key_values=cache)


def test_a_copy_has_masks_of_its_own() -> None:
    model = tiny_llama().eval()
    conditioned(model)
    twin, data = copy.deepcopy(model), batch()
    before = model(**data).logits
    with torch.no_grad():
        twin.mask_predictor.head.outer.bias.copy_(torch.linspace(-3, 3, len(twin.mask_predictor.head.outer.bias)))
    assert torch.equal(model(**data).logits, before)
    assert not torch.equal(twin(**data).logits, before)
    masks = twin.mask_predictor.condition.masks_of(twin.mask_predictor.condition.prompt(data))
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(torch.randn_like(twin.model.embed_tokens.weight))
    again = twin.mask_predictor.condition.masks_of(twin.mask_predictor.condition.prompt(data))
    assert not torch.equal(again[0], masks[0])


def test_masks_are_ramped_in_over_steps_and_the_ramp_is_saved() -> None:
    model = tiny_llama().train()
    condition = conditioned(model, ramp=0.4)
    data = batch()
    shares = []
    for _ in range(6):
        mask = condition.masks_of(condition.prompt(data))[0]
        shares.append(float(mask.detach().min()))
        model(**data)
        condition.after_step()
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[4] == shares[5] == 0
    again = tiny_llama()
    restored = conditioned(again, ramp=0.4)
    again.load_state_dict(model.state_dict())
    restored.begin(total_steps=10)
    assert restored.step == 6


def test_dropped_beginnings_follow_from_tokens_and_step_alone() -> None:
    reads = Reads(dropout=0.5)
    data = batch(64, prompt=8)
    prompt = reads.find(data, is_training=True)
    found = reads.dropped(prompt, torch.tensor(3), seed=0).attention
    backwards = {key: value.flip(0) for key, value in data.items()}
    assert torch.equal(
        reads.dropped(reads.find(backwards, is_training=True), torch.tensor(3), seed=0).attention.flip(0), found
    )
    is_cut = found.sum(-1) < 8
    assert 20 < int(is_cut.sum()) < 44
    assert bool((found.sum(-1) >= 4).all())  # at most the first half
    assert bool(found[:, 7].all())
    assert not torch.equal(reads.dropped(prompt, torch.tensor(4), seed=0).attention, found)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({**batch(), "labels": batch()["input_ids"]}, "row 0 of this batch has no instruction"),
        ({"input_ids": batch()["input_ids"]}, "trained without labels"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "no input_ids"),
    ],
)
def test_batches_without_an_instruction_are_refused(data: dict[str, Tensor], said: str) -> None:
    model = tiny_llama().train()
    conditioned(model)
    with pytest.raises(ValueError, match=said):
        model(**data)


def test_chunks_of_plain_text_give_masks_and_no_loss() -> None:
    model = tiny_llama().train()
    condition = conditioned(model, reads=Reads(source="chunk", chunk=4, dropout=0))
    data = {**batch(), "labels": batch()["input_ids"]}
    prompt = condition.prompt(data)
    assert prompt.attention.sum(-1).tolist() == [4, 4, 4]
    with condition.fixed(condition.masks_of(prompt)):
        expected = model(**{**data, "labels": batch(prompt=4)["labels"]}).loss
    torch.testing.assert_close(model(**data).loss, expected)


@needs_stacked_experts
def test_units_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="stack of experts"):
        conditioned(tiny_family("qwen3_moe"))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"num_units": 20}, "nearest good one is 16"),
        ({"num_units": 56}, "has 48 units"),
        ({}, "either keep"),
        ({"keep": 0.5, "keep_from": 0.6}, "must lie in"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(budget: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        conditioned(tiny_llama(), budget=Budget(**budget))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rate": 1e30}, r"rate .* \(0, 1000\], got 1e\+30"), ({"rate": 0.0}, "rate"), ({"seed": -1}, "seed")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Instruction(budget=Budget(keep=0.5), **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, of SoftTopK
def test_a_compiled_model_computes_and_learns_the_same() -> None:
    model = tiny_llama().train()
    condition = conditioned(model)
    condition.begin(total_steps=4)
    expected = model(**batch()).loss
    expected.backward()
    gradient = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager")(**batch()).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert any("mask_predictor" in name for name in gradient)
    for name, one in model.named_parameters():
        if one.grad is not None:
            torch.testing.assert_close(one.grad, gradient[name], rtol=1e-4, atol=1e-6)


def test_a_second_predictor_is_refused() -> None:
    model = tiny_llama()
    conditioned(model)
    with pytest.raises(ValueError, match="has a mask_predictor already"):
        conditioned(model)


def test_key_value_groups_are_masked_beside_ffn_units() -> None:
    model = tiny_llama().eval()
    structure = discover(model, kinds=["ffn", "kv_groups"])
    condition = conditioned(model, kinds=("ffn", "kv_groups"), choice=SoftTopK(hard=True))
    data = batch(1)
    masks = condition.masks_of(condition.prompt(data))
    groups = condition.predictor.units.groups
    assert [group.kind for group in groups] == ["ffn", "ffn", "kv_groups", "kv_groups"]
    cuts = [Cut(g.key, tuple(m[0].nonzero().flatten().tolist())) for g, m in zip(groups, masks, strict=True)]
    found = model(**data).logits
    with condition.whole(), zeroed(model, structure.groups, cuts):
        torch.testing.assert_close(found, model(**data).logits, rtol=0, atol=1e-5)


def test_a_budget_drawn_in_training_is_the_full_one_in_evaluation() -> None:
    model = tiny_llama()
    condition = conditioned(model, budget=Budget(keep=0.75, keep_from=0.2))
    numbers: dict[bool, set[int]] = {True: set(), False: set()}
    for _ in range(8):
        for is_training in (True, False):
            model.train(is_training)
            numbers[is_training].add(int((condition.masks_of(condition.prompt(batch()))[0][0] > 0).sum()))
        model.train()
        model(**batch())
        condition.after_step()
    assert len(numbers[True]) > 1
    assert numbers[True] <= {8, 16, 24, 32}
    assert numbers[False] == {32}


def test_a_step_without_a_call_of_the_model_is_refused() -> None:
    model = tiny_llama().train()
    condition = conditioned(model)
    model.model(batch()["input_ids"])
    with pytest.raises(RuntimeError, match="was never called, only parts of it"):
        condition.after_step()


def test_masks_hold_under_a_forward_that_a_program_puts_in_the_models_place() -> None:
    model, data = tiny_llama().train(), batch()
    condition = conditioned(model, choice=SoftTopK(hard=True))
    with condition.fixed(condition.masks_of(condition.prompt(data))):
        expected = model(**data).loss
    model.forward = lambda **given: type(model).forward(model, **given)  # of a program, made after the predictor
    condition.begin(total_steps=10)
    torch.testing.assert_close(model(**data).loss, expected)
    condition.remove()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(**data).loss, expected)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_generation_without_a_cache_keeps_the_masks_of_the_prompt(how: dict[str, Any]) -> None:
    model = tiny_llama().eval()
    condition = conditioned(model, predictor=Predictor(spread=2.0))
    prompts = batch(2)["input_ids"][:, :5]
    given = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 6, "eos_token_id": None, **how}
    masks = condition.masks_of(condition.prompt({"input_ids": prompts}))
    each = how.get("num_beams", how.get("num_return_sequences", 1))
    with condition.fixed([mask.repeat_interleave(each, 0) for mask in masks]):
        expected = model.generate(prompts, use_cache=False, **given)
    assert model.generate(prompts, use_cache=False, **given).tolist() == expected.tolist()
    assert model.generate(prompts, **given).tolist() == expected.tolist()
    condition.remove()
    assert "generate" not in vars(model)


def test_a_model_in_evaluation_mode_learns_where_its_predictor_does() -> None:
    model = tiny_llama().eval()
    condition = conditioned(model, budget=Budget(keep=0.75, keep_from=0.2))
    condition.predictor.train()
    numbers = set()
    for _ in range(8):
        model(**batch())
        numbers.add(int((condition.masks_of(condition.prompt(batch()))[0][0] > 0).sum()))
        condition.after_step()
    assert len(numbers) > 1


def test_a_whole_model_in_bfloat16_scores_in_float32() -> None:
    model = tiny_llama().eval()
    condition = conditioned(model)
    model.to(torch.bfloat16)
    prompt = condition.prompt(batch())
    scores = condition.predictor.scores(prompt.ids, prompt.attention)[0]
    assert scores.dtype == torch.float32
    assert bool(model(**batch()).logits.isfinite().all())


def test_rows_that_end_within_their_chunk_are_refused() -> None:
    model = tiny_llama().train()
    conditioned(model, reads=Reads(source="chunk", chunk=12, dropout=0))
    with pytest.raises(ValueError, match="no row of this batch has a token to learn behind its chunk of 12"):
        model(**batch())
