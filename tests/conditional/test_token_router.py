import copy
import math

import pytest
import torch
from torch import nn

from lightning_prune.conditional.expert_choice import ExpertChoice
from lightning_prune.conditional.heavy_light import HeavyLight
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.conditional.token_router import TokenRouter
from lightning_prune.predictors.soft_top_k import soft_top_k
from lightning_prune.structured.structure import Stack
from tests.conditional.routed_models import METHODS, inserted, logits, routers_of, trained
from tests.tiny_models import STACKS_EXPERTS, recompute_activations, tiny_family, token_windows

LIKE = torch.zeros(1)
STACK = Stack(("model.layers",), "num_hidden_layers", (), 2)
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def router(*, share: float = 0.25, is_causal: bool, **options: object) -> TokenRouter:
    made = TokenRouter(8, share=share, is_causal=is_causal, like=LIKE, **options)  # type: ignore[arg-type]
    made.advance(torch.zeros(2 * made.weight.shape[0] + 1), 0)
    return made


def tokens(num: int = 3, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, length, 8, generator=torch.Generator().manual_seed(seed))


def test_both_directions_choose_the_best_of_the_real_tokens() -> None:
    made, x = router(is_causal=False).eval(), tokens()
    keep = torch.ones(3, 16, dtype=torch.bool)
    keep[1, 7:], keep[2] = False, False
    chosen, scale = made(x, keep)
    assert chosen.sum(1).tolist() == [4, 2, 0]
    scores = made.scores(x)[..., 0].detach()
    assert scores[1][chosen[1]].min() >= scores[1, :7][~chosen[1, :7]].max()
    assert not chosen[~keep].any()
    torch.testing.assert_close(scale[0], soft_top_k(scores[0], 4, epsilon=1.0) * chosen[0])


def test_scores_do_not_follow_the_size_of_inputs() -> None:
    made, x = router(is_causal=False), tokens(1, 4000)
    torch.testing.assert_close(made.scores(x), made.scores(100 * x))
    assert abs(float(made.scores(x).detach().std()) - 1) < 0.1


def test_more_tokens_pass_while_the_router_learns() -> None:
    made, x = router(is_causal=False, share=0.5, wider=9 / 8), tokens()
    assert made.train()(x, None)[0].sum(1).tolist() == [9, 9, 9]
    assert made.eval()(x, None)[0].sum(1).tolist() == [8, 8, 8]


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_gradient_reaches_the_router_and_not_what_all_scores_share(is_causal: bool) -> None:
    made, x = router(is_causal=is_causal), tokens()
    made(x, None)
    made.advance(made.taken(), 0)
    scale = made(x, None)[1]
    (scale * torch.arange(16)).sum().backward()
    assert float(made.weight.grad.norm()) > 0  # type: ignore[union-attr]
    shifted = torch.zeros(1, requires_grad=True)
    made.scores = lambda x_BTD: TokenRouter.scores(made, x_BTD).detach() + shifted  # type: ignore[method-assign]
    made(x, None)[1].sum().backward()
    assert abs(float(shifted.grad)) < 1e-5  # type: ignore[arg-type]


def test_a_causal_router_judges_each_token_alone_and_meets_the_share_on_average() -> None:
    made = router(is_causal=True).train()
    for seed in range(40):
        made(tokens(4, 64, seed), None)
        made.advance(made.taken(), 0)
    made.eval()
    x = tokens(8, 256, seed=99)
    chosen, scale = made(x, None)
    assert abs(float(chosen.float().mean()) - 0.25) < 0.03
    assert 0 < float(scale.detach().sum()) <= int(chosen.sum())
    alone = [made(x[:, place : place + 1], None)[0] for place in range(8)]
    assert torch.equal(torch.cat(alone, 1), chosen[:, :8])


def test_estimates_are_the_last_chosen_score_and_the_shift_of_the_solution() -> None:
    made, x = router(is_causal=True, epsilon=0.3).train(), tokens(2, 20)
    first, scale = made(x, None)
    assert bool(first.all())
    assert bool((scale == 1).all())
    made.advance(made.taken(), 0)
    scores = made.scores(x).detach().flatten()
    ordered = scores.sort(descending=True).values
    assert float(made.estimates[0]) == float(ordered[9])
    torch.testing.assert_close(
        made.eval()(x, None)[1].flatten(), soft_top_k(scores, 10, epsilon=0.3) * (scores >= ordered[9])
    )


def test_padding_moves_no_estimate() -> None:
    keep = torch.arange(20) < 12
    made, same = (router(is_causal=True).train() for _ in range(2))
    made(tokens(2, 20), keep.expand(2, -1))
    same(tokens(2, 20)[:, :12], None)
    assert torch.equal(made.taken(), same.taken())


def test_a_share_of_one_leaves_nothing_out() -> None:
    made = router(is_causal=True, share=1.0)
    for seed in range(2):
        assert bool((made(tokens(seed=seed), None)[1] == 1).all())
        made.advance(made.taken(), 0)


def test_the_share_falls_over_the_ramp() -> None:
    _, condition = inserted("bert", HeavyLight(share=0.2, ramp=0.5))
    condition.begin(total_steps=8)
    shares = []
    for _ in range(6):
        shares.append(round(condition.metrics()["share"], 6))
        condition.after_step()
    assert shares == [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]


@EVERY
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_later_token_changes_nothing_before_it(family: str, method: ConditionMethod) -> None:
    model = trained(family, method)
    ids = token_windows(3, 14, seed=5)
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 64
    before, after = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 9:], before[:, 9:], atol=1e-3)


@EVERY
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_with_a_cache_gives_what_a_pass_over_the_text_gives(family: str, method: ConditionMethod) -> None:
    model = trained(family, method)
    ids = token_windows(3, 14, seed=6)
    whole, cache, parts = logits(model, ids), None, []
    with torch.no_grad():
        for first, last in ((0, 6), (6, 7), (7, 8), (8, 11), (11, 12), (12, 13), (13, 14)):
            out = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_padding_changes_nothing_for_real_tokens(family: str, method: ConditionMethod) -> None:
    model = trained(family, method)
    ids = token_windows(2, 10, seed=7)
    padded = torch.cat((ids, torch.zeros(2, 5, dtype=torch.long)), 1)
    mask = torch.cat((torch.ones(2, 10), torch.zeros(2, 5)), 1).long()
    torch.testing.assert_close(
        logits(model, padded, attention_mask=mask)[:, :10], logits(model, ids), rtol=0, atol=1e-5
    )


@EVERY
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
def test_a_model_computes_what_it_did_at_first_and_when_the_method_is_gone(
    family: str, method: ConditionMethod
) -> None:
    if family == "t5" and METHODS["conditional_adapter"] is method:
        pytest.skip("its first block counts positions by itself")
    if family == "t5" and not STACKS_EXPERTS:
        pytest.skip("the T5 of Transformers 4 is refused: every block of it counts positions by itself")
    ids = token_windows(2, 10)
    both = {"decoder_input_ids": ids} if family == "t5" else {}
    found = logits(tiny_family(family).eval(), ids, **both)
    model, condition = inserted(family, method)
    torch.testing.assert_close(logits(model, ids, **both), found, rtol=0, atol=1e-5)
    names = {name for name, _ in model.named_modules()}
    assert set(condition.added()) <= names
    condition.remove()
    torch.testing.assert_close(logits(model, ids, **both), found, rtol=0, atol=1e-5)
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("token_router" in name for name in model.state_dict())


@EVERY
def test_everything_learned_and_counted_is_in_the_state(method: ConditionMethod) -> None:
    model = trained("llama", method)
    again, _ = inserted("llama", method)
    ids = token_windows(3, 14, seed=8)
    assert not torch.allclose(logits(again, ids), logits(model, ids), atol=1e-3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, ids), logits(model, ids))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied, ids), logits(again, ids))


@EVERY
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_activations_computed_twice_give_the_same_step(family: str, method: ConditionMethod) -> None:
    found = []
    for is_twice in (False, True):
        model = trained(family, method)
        if is_twice:
            recompute_activations(model, use_reentrant=False)
        ids = token_windows(4, 12, seed=9)
        torch.manual_seed(0)  # of dropout
        mask = (torch.arange(12) < torch.tensor([[12], [9], [12], [5]])).long()
        losses = [
            model.train()(input_ids=i, attention_mask=m, labels=i).loss for i, m in ((ids, mask), (ids, mask.flip(0)))
        ]
        sum(losses).backward()  # type: ignore[union-attr]
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((grads, [router.taken() for router in routers_of(model)]))
    assert found[0][0].keys() == found[1][0].keys()
    for name, grad in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@EVERY
def test_a_second_method_in_one_model_is_refused(method: ConditionMethod) -> None:
    model = trained("llama", method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for second in METHODS.values():
        with pytest.raises(ValueError, match=r"one conditional method at a time"):
            second.insert(model, STACK)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ramp": 1.5}, "ramp is the share of the training"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": math.inf}, "epsilon must be positive"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeavyLight(**options)


def test_seeds_are_those_of_the_block() -> None:
    first, second = (routers_of(inserted("llama", ExpertChoice(num_experts=2))[0]) for _ in range(2))
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, first[1].weight)
    assert isinstance(first[0].weight, nn.Parameter)
