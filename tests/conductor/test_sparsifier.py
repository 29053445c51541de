"""The conductor in a bare loop: zeros survive everything, the clock counts optimizer steps, resume is exact."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import NM, Cubic, Once, Sparsifier, Targets
from lightning_prune.scorers.gradient import Gradient
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from tests.loops import (
    NUM_STEPS,
    SCORERS,
    adamw,
    assert_same_masks,
    assert_same_weights,
    batches,
    recipe,
    sparsifier,
    train,
    train_pruned,
)
from tests.tiny_models import tiny_llama, tiny_mlp

EARLY = Once(sparsity=0.5, at=1)
PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def zeros_outside(conductor: Sparsifier, model: nn.Module) -> bool:
    """Return whether every pruned weight is exactly +0.0."""
    weights = dict(model.named_parameters())
    return all(
        bool((weights[name].detach()[~mask].view(torch.int32) == 0).all()) for name, mask in conductor.masks.items()
    )


class MasterCopies(torch.optim.Optimizer):
    """SGD that steps its own copies of the weights and writes them back, as mixed-precision optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.masters = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, master in self.masters:
            if parameter.grad is not None:
                master.sub_(0.1 * parameter.grad)
                parameter.copy_(master)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "master_copies": lambda p: MasterCopies(p),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([weight for weight in p if weight.ndim == 2], lr=1e-2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_survive_every_step_of_the_optimizer(name: str) -> None:
    model = tiny_llama()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, last=2)  # momentum from before the pruning
    conductor = Sparsifier(schedule=EARLY)
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    kept_moves = []

    def check(step: int) -> None:
        assert zeros_outside(conductor, model), f"a pruned weight moved at step {step}"
        weight = model.model.layers[0].mlp.up_proj.weight.detach()
        kept_moves.append(weight.clone())

    train(model, optimizer, first=2, after_step=check)
    assert conductor.report().sparsity == 0.5
    mask = conductor.masks["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(kept_moves[-1][mask], kept_moves[0][mask]), "kept weights must go on training"


def test_optimizer_forgets_what_is_pruned() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = Sparsifier(schedule=Once(sparsity=0.5, at=4))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=4)
    weight = model.model.layers[0].mlp.up_proj.weight
    mask = conductor.masks["model.layers.0.mlp.up_proj.weight"]
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[weight][key]
        assert not moment[~mask].any()
        assert moment[mask].any()


def test_gradients_of_pruned_weights_do_not_reach_clipping() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = Sparsifier(schedule=EARLY)
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=1)
    ids_BT = batches()[1]
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    for name, mask in conductor.masks.items():
        grad = dict(model.named_parameters())[name].grad
        assert grad is not None
        assert not grad[~mask].any()
        assert grad[mask].any()


def test_regrowth_starts_with_fresh_moments() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = Sparsifier(schedule=Cubic(sparsity=0.5, start=2, end=8, interval=2), scorer=Gradient(beta=0.0))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.model.layers[0].mlp.up_proj.weight
    before: list[Tensor] = []
    num_returned = 0

    def check(step: int) -> None:
        nonlocal num_returned
        if name in conductor.masks:
            mask = conductor.masks[name]
            if before:
                returned = mask & ~before[-1]
                num_returned += int(returned.sum())
                if step % 2 == 0:
                    assert not optimizer.state[weight]["exp_avg"][returned].any()
                    assert not weight.detach()[returned].any()
            before.append(mask.clone())

    train(model, optimizer, after_step=check)
    assert num_returned > 0


def test_the_clock_counts_optimizer_steps_not_batches() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = Sparsifier(schedule=Cubic(sparsity=0.5, start=1, end=3, interval=1))
    conductor.attach(model, [optimizer], total_steps=4)
    for index, ids_BT in enumerate(batches(12)):
        (model(input_ids=ids_BT, labels=ids_BT).loss / 3).backward()
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert conductor.step == 4
    assert [entry["step"] for entry in conductor.history] == [2, 3]
    assert conductor.report().sparsity == 0.5


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    model = tiny_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    conductor = Sparsifier(schedule=Once(sparsity=0.5, at=2), scorer=Taylor(beta=0.0))
    conductor.attach(model, [optimizer], total_steps=4)
    for index in range(3):
        loss = model(torch.full((2, 8), 1.0 + index)).square().mean()
        scaler.scale(loss).backward()
        if index == 1:
            next(model.parameters()).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        if index < 2:
            assert conductor.step == 1, "step 2 was skipped"
            optimizer.zero_grad()
    assert conductor.step == 2
    assert conductor.report().sparsity == 0.5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_statistics_see_unscaled_gradients(kind: Any, fused: bool) -> None:
    averages = []
    for scale in (1.0, 64.0):
        model = tiny_mlp()
        optimizer = kind(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        conductor = Sparsifier(schedule=Once(sparsity=0.5, at=2), scorer=Taylor())
        conductor.attach(model, [optimizer], total_steps=4)
        scaler.scale(model(torch.ones(2, 8)).square().mean()).backward()
        scaler.step(optimizer)
        averages.append(conductor.state_dict()["statistics"]["0.weight"]["weight_grad"]["average"])
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-6, atol=0)


def test_bf16_autocast_and_bf16_weights_keep_exact_zeros() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        optimizer = adamw(model)
        conductor = sparsifier()
        conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
        model.train()
        for ids_BT in batches():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                loss = model(input_ids=ids_BT, labels=ids_BT).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = dict(model.named_parameters())
        assert all(not weights[name].detach()[~mask].any() for name, mask in conductor.masks.items())
        assert conductor.report().sparsity == 0.5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by the compiler
@pytest.mark.parametrize(
    "scorer",
    ["Wanda", pytest.param("Magnitude", marks=pytest.mark.slow), pytest.param("Taylor", marks=pytest.mark.slow)],
)
def test_a_compiled_model_gets_the_same_masks(scorer: str) -> None:
    plain, conductor = train_pruned(recipe(scorer=scorer))
    model = tiny_llama()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = adamw(model)
    second = sparsifier(recipe(scorer=scorer))
    second.attach(compiled, [optimizer], total_steps=NUM_STEPS)
    train(compiled, optimizer)
    second.detach()
    torch.compiler.reset()
    assert_same_masks(conductor, second)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


@PEFT_WARNING
def test_a_lora_model_keeps_its_pruned_base() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    expected = Sparsifier(schedule=Once(sparsity=0.5), targets=Targets(include=("*.q_proj.*", "*.up_proj.*")))
    expected.prune_once(copy.deepcopy(base))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    optimizer = adamw(model)
    conductor = Sparsifier(schedule=Once(sparsity=0.5))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer)
    assert_same_masks(conductor, expected)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert not weight[~conductor.masks["model.layers.0.mlp.up_proj.weight"]].any()
    assert not any("lora" in name for name in conductor.masks)
    assert any("lora_B" in name and parameter.any() for name, parameter in model.named_parameters())


@PEFT_WARNING
def test_gradients_are_refused_for_a_frozen_base() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    conductor = Sparsifier(schedule=EARLY, scorer=Taylor())
    with pytest.raises(ValueError, match=r"Taylor needs gradients, but model\.layers\.0\..* is frozen"):
        conductor.attach(model, [adamw(model)], total_steps=NUM_STEPS)
    assert not conductor.is_attached


def test_frozen_targets_are_pruned_and_stay_put() -> None:
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    dense = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = adamw(model)
    conductor = Sparsifier(schedule=EARLY, targets=Targets(include=("model.layers.*",)))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer)
    weight = model.model.layers[0].mlp.up_proj.weight
    mask = conductor.masks["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, torch.where(mask, dense, 0.0))
    assert conductor.report().sparsity == 0.5


def test_embeddings_heads_norms_and_biases_are_left_alone() -> None:
    for tied in (True, False):
        model, dense = tiny_llama(tied=tied), tiny_llama(tied=tied)
        conductor = Sparsifier(schedule=Once(sparsity=0.5))
        report = conductor.prune_once(model)
        assert {target.name.split(".")[-2] for target in report.targets} == {
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        }
        assert_same_weights(model.model.embed_tokens, dense.model.embed_tokens)
        assert_same_weights(model.lm_head, dense.lm_head)


def test_a_head_is_left_alone_also_inside_another_module() -> None:
    module = nn.ModuleDict({"language_model": tiny_llama(tied=False), "scores": nn.Linear(32, 2)})
    report = Sparsifier(schedule=Once(sparsity=0.5)).prune_once(module)
    assert len(report.targets) == 14
    assert not any("lm_head" in target.name or "scores" in target.name for target in report.targets)


def test_a_tied_weight_is_pruned_once_when_asked_for() -> None:
    model = tiny_llama(tied=True)
    conductor = Sparsifier(schedule=Once(sparsity=0.5), targets=Targets(include=("lm_head.weight",)))
    report = conductor.prune_once(model)
    assert [target.name for target in report.targets] == ["model.embed_tokens.weight"]
    assert report.sparsity == 0.5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    both = Targets(include=("lm_head.weight",), exclude=("*embed_tokens*",))
    with pytest.raises(ValueError, match="no weight is left to prune"):
        Sparsifier(schedule=Once(sparsity=0.5), targets=both).prune_once(model)


@pytest.mark.parametrize("scorer", [name for name in SCORERS if name != "Gradient"])
def test_what_is_pruned_stays_pruned(scorer: str) -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier(recipe(scorer=scorer))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    before: dict[str, Tensor] = {}

    def check(step: int) -> None:
        for name, mask in conductor.masks.items():
            assert not (mask & ~before.get(name, mask)).any(), f"{name} grew back at step {step}"
            before[name] = mask.clone()

    train(model, optimizer, after_step=check)
    assert conductor.num_updates == 3


def test_stopping_early_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier()
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=4)
    conductor.detach()
    expected = "training ended at step 4 of a schedule that ends at step 8: sparsity is 0.3519, not the promised 0.5"
    assert expected in caplog.text
    assert conductor.report().notes == conductor.broken == (expected,)


def test_nothing_is_rewound_and_the_model_keeps_its_keys() -> None:
    model = tiny_llama()
    keys = list(model.state_dict())
    optimizer = adamw(model)
    train(model, optimizer, last=3)
    trained = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    conductor = Sparsifier(schedule=Once(sparsity=0.5))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    mask = conductor.masks["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, torch.where(mask, trained, 0.0))
    assert list(model.state_dict()) == keys
    clone = copy.deepcopy(model)
    assert_same_weights(clone, model)


def test_masks_of_prune_once_are_held_in_training() -> None:
    model = tiny_llama()
    conductor = Sparsifier(schedule=Once(sparsity=0.5), scorer=Wanda())
    conductor.prune_once(model, [{"input_ids": ids_BT} for ids_BT in batches(2)], progress=False)
    held = {name: mask.clone() for name, mask in conductor.masks.items()}
    optimizer = adamw(model)
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer)
    conductor.detach()
    assert all(torch.equal(mask, held[name]) for name, mask in conductor.masks.items())
    assert zeros_outside(conductor, model)
    other = tiny_llama(seed=5)
    with pytest.raises(ValueError, match="do not fit this model"):
        conductor.attach(other, [adamw(other)], total_steps=NUM_STEPS)


def test_decaying_n_of_m_reaches_its_pattern() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = Sparsifier(
        schedule=Cubic(sparsity=0.5, start=2, end=8, interval=2), granularity=NM(n=2, m=4), scorer=Magnitude()
    )
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer)
    for mask in conductor.masks.values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()


def test_nan_scores_leave_the_masks_as_they_were() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier()
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer, last=3)
    before = {name: mask.clone() for name, mask in conductor.masks.items()}
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"scores of model\.layers\.1\.mlp\.down_proj\.weight contain NaN"):
        optimizer.step()  # without gradients: only this weight is damaged
    assert all(torch.equal(conductor.masks[name], mask) for name, mask in before.items())


class NotTorch:
    """An optimizer of another engine."""


def test_what_cannot_work_is_refused_at_attach() -> None:
    model = tiny_llama()
    conductor = sparsifier()
    with pytest.raises(ValueError, match="NotTorch is not stepped by torch"):
        conductor.attach(model, [NotTorch()], total_steps=NUM_STEPS)
    with pytest.raises(ValueError, match="needs the optimizers"):
        conductor.attach(model, [], total_steps=NUM_STEPS)
    with pytest.raises(ValueError, match="must be known, got -1"):
        conductor.attach(model, [adamw(model)], total_steps=-1)
    with pytest.raises(ValueError, match=r"schedule\.end is step 8, beyond the 7 steps"):
        conductor.attach(model, [adamw(model)], total_steps=7)
    immediate = Sparsifier(schedule=Once(sparsity=0.5), scorer=Wanda())
    with pytest.raises(ValueError, match="Wanda has observed nothing"):
        immediate.attach(model, [adamw(model)], total_steps=NUM_STEPS)
    assert not immediate.is_attached
    with pytest.raises(ValueError, match="nothing to report yet"):
        sparsifier().report()
    with torch.device("meta"):
        hollow = tiny_llama()
    with pytest.raises(ValueError, match="on the meta device"):
        sparsifier().attach(hollow, [adamw(hollow)], total_steps=NUM_STEPS)


def test_attaching_leaves_no_hook_behind_after_detach() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier(recipe(scorer="Wanda"))
    conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    conductor.detach()
    assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
