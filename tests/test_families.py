"""Every architecture we name: pruned once by each kind of scorer, and while it trains."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Cubic, Once, Sparsifier, Targets
from lightning_prune.base.types import Scorer
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from tests.tiny_models import STACKS_EXPERTS, needs_stacked_experts, tiny_family, tiny_mlp, token_windows

FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3_moe", "t5", "bert"]
DENSE = [family for family in FAMILIES if family != "qwen3_moe"]
HALF = Once(sparsity=0.5)
ALL = Targets(include=("*",))
NUM_TARGETS = {"llama": 14, "gpt2": 8, "gpt_neox": 8, "qwen3_moe": 12 if STACKS_EXPERTS else 32, "t5": 32, "bert": 12}


def batches(num_batches: int = 3) -> list[dict[str, Tensor]]:
    windows = [token_windows(4, 10, seed=seed) for seed in range(num_batches)]
    return [{"input_ids": ids, "labels": ids} for ids in windows]


def weights(model: nn.Module, names: Any) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in names}


def check_half(model: nn.Module, conductor: Sparsifier, before: nn.Module) -> None:
    """Check exact zeros in half of every target and nothing else changed."""
    masks = conductor.masks
    for name, parameter in before.named_parameters():
        now = model.get_parameter(name).detach()
        if name in masks:
            assert int((now == 0).sum()) == now.numel() // 2
            assert torch.equal(now, torch.where(masks[name], parameter.detach(), 0))
        else:
            assert torch.equal(now, parameter)
    assert conductor.report().sparsity == 0.5


@pytest.mark.parametrize(
    ("family", "scorer"),
    [(family, scorer) for family in FAMILIES for scorer in (Magnitude(), Taylor())]
    + [(family, Wanda()) for family in DENSE],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_pruned_once(family: str, scorer: Scorer) -> None:
    model = tiny_family(family)
    before = copy.deepcopy(model)
    conductor = Sparsifier(schedule=HALF, scorer=scorer)
    conductor.prune_once(model, batches(), progress=False)
    assert len(conductor.masks) == NUM_TARGETS[family]
    check_half(model, conductor, before)
    assert torch.isfinite(model(**batches(1)[0]).loss)


def expected_first_layer(model: nn.Module, name: str, is_transposed: bool) -> Tensor:
    """Return the Wanda mask of a layer that no pruned layer feeds, from a plain forward."""
    squares: list[Tensor] = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(
        lambda module, args: squares.append(args[0].detach().flatten(0, -2).square())
    )
    with torch.no_grad():
        for batch in batches():
            model.eval()(**batch)
    handle.remove()
    weight = layer.weight.detach().T if is_transposed else layer.weight.detach()
    score = weight.abs() * torch.cat(squares).double().sum(0).sqrt().float()
    order = score.sort(dim=1, descending=True, stable=True).indices[:, : score.shape[1] // 2]
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
    return mask.T if is_transposed else mask


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.k_proj.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
        ("bert", "bert.encoder.layer.0.attention.self.value.weight"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("t5", "decoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_wanda_scores_the_first_layer_by_its_inputs(family: str, name: str) -> None:
    expected = expected_first_layer(tiny_family(family), name, is_transposed=family == "gpt2")
    conductor = Sparsifier(schedule=HALF, scorer=Wanda())
    conductor.prune_once(tiny_family(family), batches(), progress=False)
    assert torch.equal(conductor.masks[name], expected)


def test_a_decoder_sees_the_pruned_encoder() -> None:
    model, twin = tiny_family("t5").eval(), tiny_family("t5").eval()
    conductor = Sparsifier(schedule=HALF, scorer=Wanda())
    conductor.prune_once(model, batches(), progress=False)
    for name, mask in conductor.masks.items():  # what comes before the first cross attention of the decoder
        if name.startswith("encoder.") or name.startswith("decoder.block.0.layer.0."):
            twin.get_parameter(name).data[~mask] = 0
    name = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    assert torch.equal(conductor.masks[name], expected_first_layer(twin, name, is_transposed=False))


@needs_stacked_experts
def test_wanda_refuses_stacked_experts_and_says_what_to_do() -> None:
    model = tiny_family("qwen3_moe")
    before = copy.deepcopy(model.state_dict())
    message = (
        r"Wanda needs the inputs of model\.layers\.0\.mlp\.experts\.gate_up_proj, but it does not belong to a linear "
        "layer; exclude it, or use a scorer without input statistics such as Magnitude"
    )
    with pytest.raises(ValueError, match=message):
        Sparsifier(schedule=HALF, scorer=Wanda()).prune_once(model, batches(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    conductor = Sparsifier(schedule=HALF, scorer=Wanda(), targets=Targets(exclude=("*.experts.*",)))
    assert conductor.prune_once(model, batches(), progress=False).sparsity == 0.5
    assert len(conductor.masks) == 8


def test_rows_of_every_expert_are_ranked_on_their_own() -> None:
    model = tiny_family("qwen3_moe")
    conductor = Sparsifier(schedule=HALF, scorer=Magnitude(scope="row"))
    before = weights(model, [name for name, _ in model.named_parameters() if "experts" in name])
    conductor.prune_once(model, progress=False)
    for name, weight in before.items():
        mask = conductor.masks[name]
        assert (mask.sum(-1) == weight.shape[-1] // 2).all()
        kept_lowest = weight.abs().masked_fill(~mask, torch.inf).amin(-1)
        assert (kept_lowest >= weight.abs().masked_fill(mask, 0).amax(-1)).all()


def train(model: nn.Module, conductor: Sparsifier, loss_of: Callable[[nn.Module], Tensor], num_steps: int = 6) -> None:
    """Train under masks, and check that a loop in plain torch that multiplies by the same masks has the same losses."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    conductor.attach(model, [optimizer], total_steps=num_steps)
    losses: list[float] = []
    masks: list[dict[str, Tensor]] = []
    torch.manual_seed(5)
    for _ in range(num_steps):
        loss = loss_of(model)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        masks.append({name: mask.clone() for name, mask in conductor.masks.items()})
    conductor.detach()
    for name, mask in masks[-1].items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight != 0, mask)  # exactly the pruned weights are zero, also after steps without change
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    torch.manual_seed(5)
    for step in range(num_steps):
        loss = loss_of(twin)
        assert float(loss.detach()) == pytest.approx(losses[step], rel=1e-6), step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks[step].items():
                twin.get_parameter(name).mul_(mask)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "scorer"),
    [(family, scorer) for family in FAMILIES for scorer in (Magnitude(), Taylor())]
    + [(family, Wanda()) for family in DENSE],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_pruned_while_training(family: str, scorer: Scorer) -> None:
    model = tiny_family(family).train()
    schedule = Cubic(sparsity=0.5, start=1, end=4, interval=1)
    conductor = Sparsifier(schedule=schedule, scorer=scorer)
    data = batches(1)[0]
    train(model, conductor, lambda trained: trained(**data).loss)
    assert (conductor.num_updates, conductor.step) == (3, 6)  # at step 1 the ramp still asks for nothing
    # 0 at the start; then 0.5 * (1 - (2/3)^3), 0.5 * (1 - (1/3)^3) and 0.5; rounded down per row or tensor
    sparsities = [entry["sparsity"] for entry in conductor.history]
    assert sparsities[-1] == 0.5
    assert sparsities == pytest.approx([0.5 * (1 - (1 - step / 3) ** 3) for step in (1, 2, 3)], abs=0.04)


def tiny_cnn() -> nn.Sequential:
    """Return a network of two convolutions and a linear layer for images of 8 x 8."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("scorer", [Magnitude(), Magnitude(scope="row"), Taylor(beta=0.5)], ids=repr)
def test_a_convolutional_network_trains_with_masks(scorer: Scorer) -> None:
    model = tiny_cnn()
    images, labels = torch.rand(16, 1, 8, 8), torch.randint(0, 3, (16,))
    conductor = Sparsifier(
        schedule=Cubic(sparsity=0.75, start=1, end=4, interval=1), scorer=scorer, targets=Targets(include=("*weight",))
    )
    train(model, conductor, lambda trained: nn.functional.cross_entropy(trained(images), labels))
    assert [target.shape for target in conductor.report().targets] == [(4, 1, 3, 3), (8, 4, 3, 3), (3, 128)]
    # rows of 9, 36 and 128; as tensors 36, 288 and 384
    by_hand = [4 * 6, 8 * 27, 3 * 96] if scorer.scope == "row" else [27, 216, 288]
    assert [target.num_zeros for target in conductor.report().targets] == by_hand


def test_wanda_refuses_convolutions_and_says_what_to_do() -> None:
    model = tiny_cnn()
    images = [{"input": torch.rand(4, 1, 8, 8)}]
    with pytest.raises(ValueError, match=r"Wanda needs the inputs of 0\.weight, but it does not belong to a linear"):
        Sparsifier(schedule=HALF, scorer=Wanda(), targets=Targets(include=("*weight",))).prune_once(model, images)
    conductor = Sparsifier(schedule=HALF, scorer=Wanda(), targets=Targets(include=("5.weight",)))
    weight = model[5].weight.detach().clone()
    norm = model[:5](images[0]["input"]).detach().norm(dim=0)
    conductor.prune_once(model, images, progress=False)
    order = (weight.abs() * norm).sort(dim=1, descending=True, stable=True).indices[:, :64]
    assert torch.equal(conductor.masks["5.weight"], torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True))


@pytest.mark.parametrize("scorer", [Magnitude(), Taylor(), Wanda()], ids=repr)
def test_a_plain_network_trains_with_masks(scorer: Scorer) -> None:
    model = tiny_mlp()
    inputs, labels = torch.rand(32, 8), torch.randint(0, 4, (32,))
    conductor = Sparsifier(schedule=Cubic(sparsity=0.5, start=1, end=4, interval=1), scorer=scorer, targets=ALL)
    train(model, conductor, lambda trained: nn.functional.cross_entropy(trained(inputs), labels))
    assert [target.num_zeros for target in conductor.report().targets] == [64, 32]
