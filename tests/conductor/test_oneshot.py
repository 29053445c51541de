"""Pruning once: from weights, from inputs block by block, from gradients; nothing but the weights is changed."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Block, Once, Sparsifier, Targets
from lightning_prune.allocations.owl import OWL
from lightning_prune.base import distributed
from lightning_prune.scorers.gradient import Gradient
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.taylor import Taylor
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.targets.targets import find_blocks
from tests.tiny_models import tiny_llama, tiny_mlp, token_windows

HALF = Once(sparsity=0.5)


def prune(model: nn.Module, batches: Any = (), *, schedule: Once = HALF, **parts: Any) -> Sparsifier:
    conductor = Sparsifier(schedule=schedule, **parts)
    conductor.prune_once(model, batches, progress=False)
    return conductor


def token_batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": token_windows(3, 9, seed=seed)} for seed in range(3)]


def input_norms(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the input norms of linear layers in plain forward passes, in float64."""
    squares: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares[name] = squares.get(name, 0) + inputs.reshape(-1, inputs.shape[-1]).double().square().sum(0)

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=name: add(name, args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt().float() for name, total in squares.items()}


def best_of_rows(score: Tensor, num_keep: int) -> Tensor:
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :num_keep]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def test_weights_alone_need_no_batches() -> None:
    model = tiny_mlp()
    before = model[0].weight.detach().clone()
    conductor = prune(model)
    cut = before.abs().reshape(-1).sort().values[63]
    assert torch.equal(model[0].weight.detach(), torch.where(before.abs() > cut, before, 0))
    assert conductor.report().sparsity == 0.5


def test_inputs_of_a_block_come_from_the_pruned_blocks_before_it() -> None:
    model, reference, batches = tiny_llama().eval(), tiny_llama().eval(), token_batches()
    masks = prune(model, batches, scorer=Wanda()).masks
    for index in range(2):
        names = [name for name in masks if f"layers.{index}." in name]
        norms = input_norms(reference, names, batches)  # of the reference, pruned as far as block index - 1
        for name in names:
            weight = reference.get_parameter(name)
            mask = best_of_rows(weight.detach().abs() * norms[name], weight.shape[1] // 2)
            assert torch.equal(masks[name], mask), name
            weight.data[~mask] = 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_what_lies_outside_the_blocks_is_observed_after_they_are_pruned() -> None:
    model, batches = tiny_llama(tied=False).eval(), token_batches()
    head = model.lm_head.weight.detach().clone()
    targets = Targets(include=("*.mlp.*.weight", "lm_head.weight"))
    masks = prune(model, batches, scorer=Wanda(), targets=targets).masks
    assert len(masks) == 2 * 3 + 1
    norm = input_norms(model, ["lm_head.weight"], batches)["lm_head.weight"]  # blocks are pruned by now
    assert torch.equal(masks["lm_head.weight"], best_of_rows(head.abs() * norm, 16))


@pytest.mark.parametrize("targets", [Targets(), Targets(include=("*.weight",))])
def test_padding_does_not_count(targets: Targets) -> None:
    ids = token_windows(4, 8)
    short = {"input_ids": ids[:, :5]}
    padded = {"input_ids": ids, "attention_mask": (torch.arange(8) < 5).long().expand(4, 8)}
    expected, found = tiny_llama(tied=False), tiny_llama(tied=False)
    only = Targets(exclude=("*embed*",), include=("*.*_proj.weight", "lm_head.weight")) if targets.include else targets
    expected_masks = prune(expected, [short], scorer=Wanda(), targets=only).masks
    found_masks = prune(found, [padded], scorer=Wanda(), targets=only).masks
    differing = [name for name in found_masks if not torch.equal(found_masks[name], expected_masks[name])]
    assert differing == []


def test_padding_has_no_gradient() -> None:
    ids = token_windows(4, 8)
    expected, found = tiny_llama(), tiny_llama()
    short = {"input_ids": ids[:, :5]}
    padded = {"input_ids": ids, "attention_mask": (torch.arange(8) < 5).long().expand(4, 8)}
    expected_masks = prune(expected, [short], scorer=Taylor()).masks
    found_masks = prune(found, [padded], scorer=Taylor()).masks
    assert all(torch.equal(found_masks[name], expected_masks[name]) for name in found_masks)


@pytest.mark.parametrize("include", [(), ("*_proj.weight", "lm_head.weight")])
def test_batches_of_different_padding_are_told_apart(include: tuple[str, ...]) -> None:
    ids = token_windows(4, 8)
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    unpadded = [{"input_ids": ids[:1, :2]}, {"input_ids": ids[1:]}]
    padded = [{"input_ids": ids[:1], "attention_mask": mask[:1]}, {"input_ids": ids[1:], "attention_mask": mask[1:]}]
    parts: dict[str, Any] = {"scorer": Wanda(), "targets": Targets(include=include)}
    expected = prune(tiny_llama(tied=False), unpadded, **parts).masks
    found = prune(tiny_llama(tied=False), padded, **parts).masks
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


class Padded(nn.Module):
    """A layer before the blocks and one after; does nothing with its mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.before(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.after(hidden)


def test_layers_around_the_blocks_see_no_padding_either() -> None:
    inputs = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) ** 3
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    padded = [{"inputs": inputs[:1], "attention_mask": mask[:1]}, {"inputs": inputs[1:], "attention_mask": mask[1:]}]
    unpadded = [{"inputs": inputs[:1, :2]}, {"inputs": inputs[1:]}]
    parts: dict[str, Any] = {"scorer": Wanda(), "targets": Targets(include=("*.weight",))}
    expected, found = prune(Padded(), unpadded, **parts).masks, prune(Padded(), padded, **parts).masks
    assert len(found) == 4
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_global_ranking_sees_the_inputs_of_the_dense_model() -> None:
    model, batches = tiny_llama().eval(), token_batches()
    dense = tiny_llama().eval()
    masks = prune(model, batches, scorer=Wanda(scope="global")).masks
    norms = input_norms(dense, list(masks), batches)
    scores = torch.cat([(dense.get_parameter(name).detach().abs() * norms[name]).reshape(-1) for name in masks])
    keep = best_of_rows(scores[None], scores.numel() // 2)[0]
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks.values()]), keep)


def test_budgets_come_from_the_dense_model_and_masks_from_the_pruned_one() -> None:
    model, batches = tiny_llama().eval(), token_batches()
    dense = tiny_llama().eval()
    conductor = prune(model, batches, scorer=Wanda(), allocation=OWL(m=2.0, lamda=0.1), schedule=Once(sparsity=0.7))
    norms = input_norms(dense, list(conductor.masks), batches)
    ratios = []
    for index in range(2):
        scores = [
            (dense.get_parameter(name).detach().abs() * norm).reshape(-1)
            for name, norm in norms.items()
            if f"layers.{index}." in name
        ]
        block = torch.cat(scores).double()
        ratios.append(float((block > 2.0 * block.mean()).double().mean()))
    # two blocks of one size: the one with more outliers is 0.1 denser than the mean, the other 0.1 less
    densities = {index: 0.4 if ratios[index] == max(ratios) else 0.2 for index in range(2)}
    for target in conductor.report().targets:
        rows, cols = target.shape
        pruned_per_row = int((1 - densities[int(target.name.split(".")[2])]) * cols + 1e-6)
        assert target.num_zeros == rows * pruned_per_row
    for index in range(2):
        names = [name for name in conductor.masks if f"layers.{index}." in name]
        norms = input_norms(dense, names, batches)  # block by block from here on
        for name in names:
            weight = dense.get_parameter(name)
            num_keep = weight.shape[1] - int((1 - densities[index]) * weight.shape[1] + 1e-6)
            mask = best_of_rows(weight.detach().abs() * norms[name], num_keep)
            assert torch.equal(conductor.masks[name], mask), name
            weight.data[~mask] = 0


def mean_changes(batches: list[dict[str, Tensor]], names: Any) -> dict[str, Tensor]:
    """Return the mean over sequences of |weight * gradient|, by the formula."""
    twin = tiny_llama().eval()
    total = {name: torch.zeros_like(twin.get_parameter(name)) for name in names}
    for ids in torch.cat([batch["input_ids"] for batch in batches]).split(1):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(ids).logits[0, :-1], ids[0, 1:]).backward()
        for name in names:
            weight = twin.get_parameter(name)
            assert weight.grad is not None
            total[name] += (weight.detach() * weight.grad).abs()
    return total


def test_scores_from_gradients_are_the_plain_mean_over_sequences() -> None:
    batches = token_batches()
    masks = prune(tiny_llama(), batches, scorer=Taylor(beta=0.5)).masks
    for name, score in mean_changes(batches, masks).items():
        best = best_of_rows(score.reshape(1, -1), score.numel() // 2).reshape(score.shape)
        assert torch.equal(masks[name], best), name


@pytest.mark.parametrize("scorer", [Taylor(), Gradient()])
def test_scores_from_gradients_are_the_same_for_every_batch_size_and_order(scorer: Any) -> None:
    ids = torch.cat([batch["input_ids"] for batch in token_batches()])
    lengths = torch.tensor([9, 9, 5, 3, 9, 7, 9, 9, 4])
    batch = {"input_ids": ids, "attention_mask": (torch.arange(9) < lengths[:, None]).long()}
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    kept = []
    for size, rows in ((9, torch.arange(9)), (1, torch.arange(9)), (4, torch.arange(9)), (2, order)):
        batches = [{name: value[part] for name, value in batch.items()} for part in rows.split(size)]
        kept.append(prune(tiny_llama().double(), batches, scorer=scorer).masks)
    for masks in kept[1:]:
        assert all(torch.equal(masks[name], mask) for name, mask in kept[0].items())


def test_blocks_of_weights_are_pruned_from_inputs_too() -> None:
    model = tiny_llama()
    conductor = prune(model, token_batches(), scorer=Wanda(scope="tensor"), granularity=Block(rows=4, cols=4))
    for mask in conductor.masks.values():
        blocks = mask.reshape(mask.shape[0] // 4, 4, mask.shape[1] // 4, 4)
        assert torch.equal(blocks.all(dim=(1, 3)), blocks.any(dim=(1, 3)))
        assert int((~mask).sum()) == mask.numel() // 32 * 16


def test_a_model_of_one_block_is_observed_in_plain_passes() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    assert find_blocks(model) == []
    weight, inputs = model[0].weight.detach().clone(), torch.rand(5, 6)
    conductor = prune(model, [{"input": inputs}], scorer=Wanda())
    assert torch.equal(conductor.masks["0.weight"], best_of_rows(weight.abs() * inputs.norm(dim=0), 3))


def test_layers_that_are_blocks_themselves_are_pruned_in_order() -> None:
    model, twin = tiny_mlp(), tiny_mlp()
    inputs = torch.rand(5, 8)
    conductor = prune(model, [{"input": inputs}], scorer=Wanda(), targets=Targets(include=("*",)))
    first = best_of_rows(twin[0].weight.detach().abs() * inputs.norm(dim=0), 4)
    twin[0].weight.data[~first] = 0
    hidden = twin[1](twin[0](inputs)).detach()
    second = best_of_rows(twin[2].weight.detach().abs() * hidden.norm(dim=0), 8)
    assert torch.equal(conductor.masks["0.weight"], first)
    assert torch.equal(conductor.masks["2.weight"], second)


@pytest.mark.parametrize("scorer", [Wanda(), Taylor(), Magnitude()])
def test_modes_flags_and_gradients_come_back(scorer: Any) -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 3.0)
    modes = [module.training for module in model.modules()]
    prune(model, token_batches(), scorer=scorer)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    with_grad = {name: float(p.grad.mean()) for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {"model.embed_tokens.weight": 3.0}  # tied to the head
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert hooks == []
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_batches_may_come_from_a_generator() -> None:
    masks = prune(tiny_llama(), token_batches(), scorer=Wanda()).masks
    again = prune(tiny_llama(), (batch for batch in token_batches()), scorer=Wanda()).masks
    assert all(torch.equal(masks[name], again[name]) for name in masks)


@pytest.mark.parametrize("scorer", [Wanda(), Taylor()])
def test_no_batches_are_refused_where_they_are_needed(scorer: Any) -> None:
    name = type(scorer).__name__
    with pytest.raises(ValueError, match=f"{name} needs calibration batches, got none; pass batches of model inputs"):
        prune(tiny_llama(), [], scorer=scorer)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="Taylor needs a loss, but the model returns none; add labels to the batches"):
        prune(tiny_mlp(), [{"input": torch.rand(2, 8)}], scorer=Taylor())
    model = tiny_mlp()
    with pytest.raises(ValueError, match="needs a loss"):
        prune(model, [{"input": torch.rand(2, 8)}], scorer=Taylor())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Unused(nn.Module):
    """Three blocks of which the last is never called, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](inputs)))


@pytest.mark.parametrize("include", [(), ("*",)])
def test_a_layer_that_no_batch_reaches_is_refused_by_name(include: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"Wanda has observed nothing of blocks\.2\.weight: no token.*batches that reach"
    ):
        prune(Unused(), [{"inputs": torch.rand(2, 4)}], scorer=Wanda(), targets=Targets(include=include))


class TwoTowers(nn.Module):
    """Reads words, and images where there are some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])})
        self.text = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])})

    def forward(self, words: Tensor, images: Tensor | None = None, labels: Tensor | None = None) -> Any:
        for layer in self.text["layers"]:
            words = words + layer(words)
        if images is not None:
            for layer in self.vision["layers"]:
                images = images + layer(images)
            words = words + 0 * images
        return Output(words.square().mean())


@dataclasses.dataclass
class Output:
    """What models with a loss return."""

    loss: Tensor


@pytest.mark.parametrize("scorer", [Wanda(), Wanda(scope="global"), Taylor()])
def test_a_tower_that_no_batch_reaches_is_named_before_anything_is_changed(scorer: Any) -> None:
    model = TwoTowers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [{"words": torch.rand(2, 4), "labels": torch.rand(2)}]
    conductor = Sparsifier(schedule=HALF, scorer=scorer)

    def check_unchanged(*_: object) -> None:
        assert torch.equal(model.text["layers"][0].weight, before["text.layers.0.weight"])

    watch = model.text["layers"][1].register_forward_hook(check_unchanged)
    refusal = r"nothing of vision\.layers\.0\.weight and 1 more.*exclude: \[\"vision\.\*\"\].*no weight was changed"
    with pytest.raises(ValueError, match=refusal):
        conductor.prune_once(model, batches, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not conductor.masks
    watch.remove()
    without = prune(model, batches, scorer=scorer, targets=Targets(exclude=("vision.*",)))
    assert set(without.masks) == {"text.layers.0.weight", "text.layers.1.weight"}


@pytest.mark.parametrize("scorer", [Wanda(scope="tensor"), Taylor(), Gradient()])
def test_a_tower_that_counts_for_nothing_is_refused(scorer: Any) -> None:
    model = TwoTowers()
    with torch.no_grad():
        model.vision["layers"][0].weight.zero_().add_(1e-3)
    batch = {"words": torch.rand(2, 4), "images": torch.zeros(2, 4), "labels": torch.rand(2)}
    with pytest.raises(ValueError, match=r"all scores of vision\.layers\.0\.weight are equal.*no weight was changed"):
        prune(model, [batch], scorer=scorer)


@pytest.mark.parametrize(
    ("scorer", "batch"),
    [
        (Taylor(), {"labels": torch.full((3, 9), -100)}),
        (Gradient(), {"labels": torch.full((3, 9), -100)}),
        (Wanda(), {"attention_mask": torch.zeros(3, 9, dtype=torch.long)}),
        (Wanda(scope="global"), {"attention_mask": torch.zeros(3, 9, dtype=torch.long)}),
    ],
)
def test_where_nothing_is_learned_nothing_is_pruned(scorer: Any, batch: dict[str, Tensor]) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"observed nothing of model\.layers\.0.*(label that counts|nothing but padding)"
    ):
        prune(model, [{"input_ids": token_windows(3, 9)} | batch], scorer=scorer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_without_a_label_that_counts_change_nothing() -> None:
    batches = [batch | {"labels": batch["input_ids"]} for batch in token_batches()]
    empty = {"input_ids": token_windows(3, 9, seed=9), "labels": torch.full((3, 9), -100)}
    one, other = (prune(tiny_llama(), all_of, scorer=Taylor()).masks for all_of in (batches, [empty, *batches, empty]))
    assert all(torch.equal(other[name], mask) for name, mask in one.items())


def test_weights_that_are_all_equal_are_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(0.5)
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"all scores of {name}.weight are equal.*exclude: \[\"{name}\.\*\"\]"):
        prune(model, scorer=Magnitude())


def test_many_equal_scores_are_noted() -> None:
    model = tiny_mlp()
    batch = {"input": torch.cat([torch.rand(5, 2), torch.zeros(5, 6)], dim=1)}  # six inputs that are always zero
    report = Sparsifier(schedule=HALF, scorer=Wanda()).prune_once(model, [batch], progress=False)
    [note] = report.notes
    assert note.startswith("75% of 0.weight was chosen by place")


class OneExpertOfTwo(nn.Module):
    """Blocks of two experts, of which the second is used where the inputs are negative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = inputs + layer["b" if bool((inputs < 0).all()) else "a"](inputs).abs()
        return inputs


def test_an_expert_without_tokens_stays_as_it_is_and_is_noted() -> None:
    model = OneExpertOfTwo()
    before = model.layers[0]["b"].weight.detach().clone()
    report = Sparsifier(schedule=HALF, scorer=Wanda()).prune_once(model, [{"inputs": torch.rand(3, 4)}], progress=False)
    assert [target.num_zeros for target in report.targets] == [8, 0, 8, 0]
    assert torch.equal(model.layers[0]["b"].weight, before)
    [note] = report.notes
    assert "layers.0.b.weight and 1 more" in note
    assert "it stays as it is" in note


class Tied(nn.Module):
    """Uses one weight twice on inputs of different features: of two layers, of one, or of two parameters."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(2)])
        if how == "one parameter":
            self.blocks[1].weight = self.blocks[0].weight
        elif how == "one memory":
            self.blocks[1].weight = nn.Parameter(self.blocks[0].weight.detach())
        else:
            self.blocks[1] = self.blocks[0]

    def forward(self, left: Tensor, right: Tensor) -> Any:
        out = self.blocks[0](left) + self.blocks[1](right)
        return Output(out.square().mean())


@pytest.mark.parametrize("how", ["one parameter", "one layer", "one memory"])
@pytest.mark.parametrize("scorer", [Wanda(), Wanda(scope="global"), Taylor()])
def test_a_weight_that_is_used_in_several_places_is_scored_by_all_of_them(how: str, scorer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(6, 8, generator=generator), torch.rand(6, 8, generator=generator)
    left[:, 4:], right[:, :4] = left[:, 4:] / 100, right[:, :4] / 100
    model = Tied(how)
    weight = model.blocks[0].weight.detach().clone()
    batch = {"left": left.double(), "right": right.double() * 3}
    masks = prune(model, [batch], scorer=scorer).masks
    assert list(masks) == ["blocks.0.weight"]
    if isinstance(scorer, Taylor):
        score = torch.zeros_like(weight)
        twin = Tied("one parameter")
        for row in range(6):
            twin.zero_grad()
            twin(batch["left"][row : row + 1], batch["right"][row : row + 1]).loss.backward()
            score += (weight * twin.blocks[0].weight.grad).abs()
        wanted = best_of_rows(score.reshape(1, -1), 32).reshape(8, 8)
    else:
        score = weight.abs() * (batch["left"].square() + batch["right"].square()).sum(0).sqrt()
        wanted = best_of_rows(score, 4) if scorer.scope == "row" else best_of_rows(score.reshape(1, -1), 32)
    assert torch.equal(masks["blocks.0.weight"], wanted.reshape(8, 8))


def test_an_interruption_leaves_the_weights_as_they_were() -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupt(module: nn.Module, args: object) -> None:
        if (model.model.layers[0].self_attn.q_proj.weight == 0).any():
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, token_batches(), scorer=Wanda())
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("batch", "words"),
    [([torch.ones(2, 3)], "batch 0 is a list"), ({"input_ids": torch.ones(0, 3)}, r"input_ids has shape \(0, 3\)")],
)
def test_batches_that_cannot_be_used_are_refused(batch: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prune(tiny_llama(), [batch], scorer=Wanda())


def test_a_sharded_model_cannot_be_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_sharded", lambda parameter: True)
    with pytest.raises(ValueError, match="Wanda cannot calibrate a sharded model; prune before fully_shard, then sh"):
        prune(tiny_llama(), token_batches(), scorer=Wanda())


@pytest.mark.parametrize(
    ("scorer", "titles"),
    [
        (Magnitude(), ["scoring: 100%", "14/14"]),
        (Wanda(), ["pruning blocks: 100%", "2/2"]),
        (Wanda(scope="global"), ["calibrating: 100%", "3/3", "scoring: 100%"]),
        (Taylor(), ["calibrating: 100%", "9/9", "scoring: 100%", "14/14"]),
    ],
)
def test_bars_say_what_is_done(scorer: Any, titles: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Sparsifier(schedule=HALF, scorer=scorer).prune_once(tiny_llama(), token_batches())
    shown = capsys.readouterr().err
    assert [title for title in titles if title not in shown] == []
    prune(tiny_llama(), token_batches(), scorer=scorer)
    assert "%|" not in capsys.readouterr().err
