import copy
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional

from lightning_prune.conditional.skip_layer import SkipLayer, density_loss, straight_through
from tests.conditional.inserted import decoded, insert, model_of, tokens
from tests.tiny_models import STACKS_EXPERTS, recompute_activations, tiny_llama, token_windows

CHECKPOINTS_INSIDE = STACKS_EXPERTS  # of Transformers 5: what is recomputed is the forward of the class


def test_density_loss_of_three_layers() -> None:
    loss = density_loss(torch.tensor([0.9, 0.5, 0.3]), 0.5, 0.1)
    torch.testing.assert_close(loss, torch.tensor(0.02))


@pytest.mark.parametrize(("gap", "share"), [(0.0, 0.5), (1.0, 0.731), (2.0, 0.881)])
def test_noise_runs_the_sigmoid_of_the_gap(gap: float, share: float) -> None:
    logits = torch.tensor([0.0, gap]).expand(1, 200_000, 2)
    gates = straight_through(logits, 1.0, torch.Generator().manual_seed(0))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert abs(float(gates.mean()) - share) < 0.004


def test_the_gate_has_the_gradient_of_the_softmax() -> None:
    logits = torch.tensor([[[0.3, -0.2]]], requires_grad=True)
    noise = -torch.log(-torch.log(torch.rand(1, 1, 2, generator=torch.Generator().manual_seed(3))))
    straight_through(logits, 0.7, torch.Generator().manual_seed(3)).sum().backward()
    run = functional.softmax((logits.detach() + noise) / 0.7, dim=-1)[..., 1]
    expected = (run * (1 - run) / 0.7)[..., None] * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, "density must lie between 0 and 1, got 0.0"),
        ({"density": 1.0}, "density must lie between 0 and 1, got 1.0"),
        ({"ramp": 1.5}, "ramp must be a share of the training"),
        ({"temperature": 0.0}, "temperature must be 0.001 or more"),
        ({"strength": -1.0}, "strength must be 0.0 or more"),
    ],
)
def test_options_out_of_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SkipLayer(**options)


def test_an_encoder_with_a_decoder_is_refused_and_left_alone() -> None:
    model = model_of("t5")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="which has an encoder and a decoder"):
        insert(SkipLayer(), model)
    assert set(model.state_dict()) == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "opt"])
def test_at_first_the_model_is_what_it_was_and_can_be_given_back(name: str) -> None:
    model = model_of(name)
    ids, names = tokens(2, 9), list(model.state_dict())
    before, forwards = model(input_ids=ids).logits, [vars(module).get("forward") for module in model.modules()]
    condition = insert(SkipLayer(), model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [name for name in model.state_dict() if name not in names] == [
        f"{part}.{entry}" for part in condition.added() for entry in ("weight", "num_steps", "progress")
    ]
    condition.remove()
    assert list(model.state_dict()) == names
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert torch.equal(model(input_ids=ids).logits, before)


def trained(model: Any, condition: Any, *, num_steps: int = 3, seed: int = 0, loss_only: bool = False) -> list[float]:
    """Train a few steps on the same batch in a bare loop."""
    condition.begin(total_steps=num_steps)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, losses = token_windows(8), []
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.train()
    for _ in range(num_steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        if not loss_only:
            loss = loss + condition.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
        losses.append(float(loss.detach()))
    return losses


def have_moved(condition: Any) -> bool:
    return all(bool(router.weight.detach().any()) for router in condition.routers)


def test_skipping_is_the_identity_and_running_the_block() -> None:
    model = tiny_llama(layers=3).eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids)
        expected = model.lm_head(model.model.norm(hidden))
        condition = insert(SkipLayer(offset=0.0), model)
        assert torch.equal(model(input_ids=ids).logits, expected)  # a tie skips
    for router in condition.routers:
        router.options = SkipLayer(offset=100.0)
    plain = tiny_llama(layers=3).train()(input_ids=ids).logits
    torch.testing.assert_close(model.train()(input_ids=ids).logits, plain, rtol=0, atol=0)


def test_routers_learn_from_the_task_and_from_the_density() -> None:
    for loss_only in (True, False):
        model = tiny_llama()
        condition = insert(SkipLayer(strength=0.0 if loss_only else 10.0), model)
        trained(model, condition, num_steps=1, loss_only=loss_only)
        assert have_moved(condition)


def test_the_density_comes_near_what_is_wanted() -> None:
    model = tiny_llama(layers=4, tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)  # a stream of the size that trained models have
    condition = insert(SkipLayer(density=0.3, strength=1.0, ramp=0.5), model)
    trained(model, condition, num_steps=60)
    ids = token_windows(8)
    found: list[float] = []
    model.train()
    for _ in range(5):
        model(input_ids=ids)
        found.append(condition.metrics()["density"])
    assert abs(sum(found) / 5 - 0.3) < 0.06
    assert condition.metrics()["wanted"] == pytest.approx(0.3)


def test_the_wanted_density_falls_along_the_ramp() -> None:
    model = tiny_llama()
    condition = insert(SkipLayer(density=0.6, ramp=0.5), model)
    condition.begin(total_steps=8)
    seen, hidden = [], torch.zeros(1, 1, 32)
    for _ in range(6):
        seen.append((round(condition.wanted(), 6), round(condition.routers[0].logits(hidden)[0, 0, 1].item(), 6)))
        condition.after_step()
    assert seen == [(1.0, 2.0), (0.9, 1.5), (0.8, 1.0), (0.7, 0.5), (0.6, 0.0), (0.6, 0.0)]


def test_padding_does_not_count() -> None:
    model = tiny_llama()
    condition = insert(SkipLayer(offset=0.0, density=0.5), model)
    router = condition.routers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = -10.0
        model.model.embed_tokens.weight[1:] = 10.0
        router.weight[1] = 1.0  # padding skips, all others run
    ids = tokens(2, 8)
    ids[:, :4] = 0
    mask = (ids != 0).long()
    model.train()
    model(input_ids=ids)
    assert condition.call.noted[router].item() == 0.5
    model(input_ids=ids, attention_mask=mask)
    assert condition.call.noted[router].item() == 1.0
    model.model(ids, mask)
    assert condition.call.noted[router].item() == 1.0


@pytest.mark.parametrize("how", [{"use_reentrant": False}, None])
def test_recomputed_activations_see_the_same_noise(how: dict[str, bool] | None) -> None:
    weights = []
    for is_recomputing in (False, True):
        model = tiny_llama(layers=3)
        condition = insert(SkipLayer(offset=0.5), model)
        if is_recomputing and how is not None:
            recompute_activations(model, **how)
        trained(model, condition)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-6, msg=name)


def test_reentrant_recomputing_gives_a_gradient_or_is_refused() -> None:
    model = tiny_llama(layers=3)
    condition = insert(SkipLayer(), model)
    recompute_activations(model, use_reentrant=True)
    words = re.escape("set gradient_checkpointing_kwargs to {'use_reentrant': False}")
    with nullcontext() if CHECKPOINTS_INSIDE else pytest.raises(ValueError, match=words):
        trained(model, condition, num_steps=1)
    assert have_moved(condition) == CHECKPOINTS_INSIDE


def test_evaluation_is_deterministic_and_a_prompt_decides_as_decoding_does() -> None:
    model = tiny_llama(layers=3)
    condition = insert(SkipLayer(density=0.4, ramp=0.0, strength=1.0), model)
    trained(model, condition, num_steps=20)
    model.eval()
    ids = tokens(2, 10)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        assert torch.equal(whole, model(input_ids=ids).logits)
    torch.testing.assert_close(decoded(model, ids, ends=(4, 5, 6, 7, 8, 9, 10)), whole, rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[:, 6:] = tokens(2, 4, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=changed).logits[:, :6], whole[:, :6], rtol=0, atol=1e-5)


def test_a_copy_decides_for_itself() -> None:
    model = tiny_llama()
    condition = insert(SkipLayer(), model)
    model.train()(input_ids=tokens(1, 6))
    assert condition.loss() is not None
    twin = copy.deepcopy(model).eval()
    model.eval()
    ids = tokens(1, 6)
    with torch.no_grad():
        for router in condition.routers:
            router.weight[0] = 100.0 * torch.sign(model.model.embed_tokens(ids).mean((0, 1)))
        model.lm_head.weight.zero_()
        assert bool(twin(input_ids=ids).logits.abs().max() > 0)
    assert twin.model.layers[0].skip_router.block is twin.model.layers[0]
    condition.call.noted.clear()
    twin.train()(input_ids=ids)
    assert condition.loss() is None
    assert len(twin.model.layers[0].skip_router.call.noted) == 2


def test_saved_weights_bring_routers_and_ramp_back() -> None:
    model = tiny_llama()
    condition = insert(SkipLayer(), model)
    condition.begin(total_steps=40)
    for _ in range(3):
        condition.after_step()
    other = tiny_llama(seed=1)
    again = insert(SkipLayer(), other)
    other.load_state_dict(model.state_dict())
    again.begin(total_steps=40)
    assert again.wanted() == condition.wanted() == pytest.approx(0.85)
    assert torch.equal(again.routers[1].weight, condition.routers[1].weight)


def test_a_resumed_training_is_the_uninterrupted_one() -> None:
    def start() -> tuple[Any, Any, torch.optim.Optimizer]:
        model = tiny_llama(layers=3)
        condition = insert(SkipLayer(), model)
        return model.train(), condition, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def steps(model: Any, condition: Any, optimizer: torch.optim.Optimizer, num: int) -> None:
        ids = token_windows(8)
        for _ in range(num):
            (model(input_ids=ids, labels=ids).loss + condition.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            condition.after_step()

    model, condition, optimizer = start()
    condition.begin(total_steps=8)
    torch.manual_seed(0)
    steps(model, condition, optimizer, 1)
    noise = torch.get_rng_state()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, condition, optimizer, 2)
    again, other, restarted = start()
    again.load_state_dict(saved[0])
    restarted.load_state_dict(saved[1])
    other.begin(total_steps=8)
    torch.set_rng_state(noise)
    steps(again, other, restarted, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_generation_runs_with_its_cache() -> None:
    model = tiny_llama(layers=3)
    condition = insert(SkipLayer(ramp=0.0, strength=1.0), model)
    trained(model, condition, num_steps=20)
    model.eval()
    ids = tokens(2, 5)
    sparse = model.generate(ids, max_new_tokens=8, do_sample=False)
    for router in condition.routers:
        router.sparse.is_sparse = False
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), sparse)
