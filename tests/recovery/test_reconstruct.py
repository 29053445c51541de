"""Reconstruction: every target against an exact solve on the inputs it has in the finished model, zeros, refusals."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_prune import NM, Once, Sparsifier, Targets
from lightning_prune.recovery.reconstruct import Reconstruct, ReconstructionReport, reconstruct
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.targets.targets import Binding
from tests.processes import Processes
from tests.tiny_models import needs_stacked_experts, tiny_family, tiny_llama, tiny_mlp, token_windows

DAMPING = 0.05


def pruned(model: nn.Module, **parts: Any) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Prune half of every row by magnitude, or as told; return what the model was before, and the masks."""
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parts = {"schedule": Once(sparsity=0.5), "scorer": Magnitude(scope="row")} | parts
    conductor = Sparsifier(**parts)
    conductor.prune_once(model, (), progress=False)
    return dense, conductor.masks


def refit(model: nn.Module, dense: Any, masks: Any, batches: Any, **options: Any) -> ReconstructionReport:
    return reconstruct(model, dense, masks, batches, options=Reconstruct(**options), progress=False)


def token_batches(name: str = "llama") -> list[dict[str, Tensor]]:
    rows = token_windows(24, 12).clamp(min=1).split(8)  # 0 is padding
    if name == "t5":
        return [{"input_ids": ids, "decoder_input_ids": ids.flip(1)} for ids in rows]
    return [{"input_ids": ids} for ids in rows]


def layer_inputs(model: nn.Module, bindings: list[Binding], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return input_TI of every target's layer in plain forward passes."""
    seen: dict[str, list[Tensor]] = {binding.name: [] for binding in bindings}
    handles = [
        binding.module.register_forward_pre_hook(
            lambda module, args, name=binding.name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for binding in bindings
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def exact(
    weight_OI: Tensor, bias_O: Tensor | None, mask_OI: Tensor, input_TI: Tensor, wanted_TI: Tensor
) -> tuple[np.ndarray, Any]:
    """Solve the damped least squares of every row by numpy's lstsq, the damping as rows of its own.

    The output wanted is that of the dense weights on `wanted_TI`.
    """
    inputs, wanted, weight = input_TI.numpy(), wanted_TI.numpy(), weight_OI.double().numpy()
    has_bias = bias_O is not None
    mean, wanted_mean = inputs.mean(0) * has_bias, wanted.mean(0) * has_bias
    centred = inputs - mean
    ridge = DAMPING * np.square(centred).sum() / inputs.shape[1]
    answer = np.zeros(weight.shape)
    for row, mask in enumerate(mask_OI.numpy()):
        left = np.concatenate([centred[:, mask], np.sqrt(ridge) * np.eye(mask.sum())])
        right = np.concatenate([(wanted - wanted_mean) @ weight[row], np.sqrt(ridge) * weight[row, mask]])
        answer[row, mask] = np.linalg.lstsq(left, right)[0]
    if bias_O is None:
        return answer, None
    return answer, bias_O.double().numpy() + weight @ wanted_mean - answer @ mean


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
def test_every_target_is_refitted_exactly_to_its_inputs_in_the_finished_model(name: str, share: float) -> None:
    model, batches = tiny_family(name), token_batches(name)
    bindings = Targets().resolve(model)
    dense_inputs = layer_inputs(model, bindings, batches)
    dense, masks = pruned(model)
    report = refit(model, dense, masks, batches, damping=DAMPING, towards_dense=share)
    inputs = layer_inputs(model, bindings, batches)
    for binding in bindings:
        bias = getattr(binding.module, "bias", None)
        bias_name = binding.name.removesuffix("weight") + "bias"
        own, other = inputs[binding.name], dense_inputs[binding.name]
        weight, new_bias = exact(
            binding.to_matrix(dense[binding.name]),
            None if bias is None else dense[bias_name],
            binding.to_matrix(masks[binding.name]),
            own,
            (1 - share) * own + share * other,
        )
        ours = binding.to_matrix(binding.parameter.detach()).numpy()
        np.testing.assert_allclose(ours, weight, atol=2e-4 * np.abs(weight).max(), err_msg=binding.name)
        if bias is not None:
            np.testing.assert_allclose(bias.detach().numpy(), new_bias, atol=1e-5, err_msg=binding.name)
    assert {error.name for error in report.targets} == set(masks)
    assert all(error.is_paired == (share > 0) for error in report.targets)
    assert sum(error.after for error in report.targets) < sum(error.before for error in report.targets)


@pytest.mark.parametrize("granularity", [NM(n=2, m=4), NM(n=1, m=4)], ids=str)
def test_zeros_stay_bitwise_and_the_weights_their_dtype(granularity: NM) -> None:
    model = tiny_llama().bfloat16()
    dense, masks = pruned(model, schedule=Once(sparsity=1 - granularity.n / granularity.m), granularity=granularity)
    refit(model, dense, masks, token_batches())
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert weight.dtype == torch.bfloat16
        assert bool((weight[~mask].view(torch.int16) == 0).all())
        assert bool((weight[mask] != 0).all())
    untouched = set(dense) - set(masks)
    assert untouched
    assert all(torch.equal(model.get_parameter(name), dense[name]) for name in untouched)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_report_holds_the_errors_of_the_outputs(share: float) -> None:
    model, batches = tiny_llama(), token_batches()
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    bindings = [binding for binding in Targets().resolve(model) if binding.name in names]
    dense_inputs = layer_inputs(model, bindings, batches)
    dense, masks = pruned(model)
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    report = refit(model, dense, masks, batches, towards_dense=share)
    inputs = layer_inputs(model, bindings, batches)
    for name in names:
        wanted_TO = (dense_inputs if share else inputs)[name] @ dense[name].double().T
        before, after = (
            float((inputs[name] @ weight.double().T - wanted_TO).square().sum() / wanted_TO.square().sum())
            for weight in (weights[name], model.get_parameter(name).detach())
        )
        found = next(error for error in report.targets if error.name == name)
        assert found.before == pytest.approx(before, rel=1e-5)
        assert found.after == pytest.approx(after, rel=1e-5)
        assert found.after < found.before
    found = next(error for error in report.targets if error.name == names[0])
    assert found.tokens_per_input == 24 * 12 / 16  # half of 32 inputs
    assert found.damping == pytest.approx(3 / 18)
    assert report.num_tokens == 24 * 12
    assert report.notes == ()
    assert report.as_dict()["targets"][0]["name"] == report.targets[0].name


def test_the_dense_model_that_runs_along_leaves_nothing_behind() -> None:
    model, batches = tiny_llama(), token_batches()
    dense, masks = pruned(model)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    given = {name: tensor.clone() for name, tensor in dense.items()}
    refit(model, dense, masks, batches)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert all(torch.equal(dense[name], tensor) for name, tensor in given.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_dense_model_keeps_the_outputs_of_the_whole_nearer() -> None:
    batches = token_batches()
    dense_model = tiny_llama(layers=4).eval()
    lost = []
    for share in (0.0, 0.5):
        model = copy.deepcopy(dense_model)
        dense, masks = pruned(model)
        refit(model, dense, masks, batches, towards_dense=share, damping=DAMPING)
        with torch.no_grad():
            lost.append(sum((model(**b).logits - dense_model(**b).logits).square().sum().item() for b in batches))
    assert lost[1] < lost[0]


def test_padding_counts_for_nothing() -> None:
    ids = token_windows(16, 12)
    model = tiny_llama()
    dense, masks = pruned(model)
    plain, padded = copy.deepcopy(model), copy.deepcopy(model)
    refit(
        plain, dense, masks, [{"input_ids": row[None, :length]} for row, length in zip(ids, [12, 9] * 8, strict=True)]
    )
    keep = torch.ones_like(ids)
    keep[1::2, 9:] = 0
    report = refit(padded, dense, masks, [{"input_ids": ids, "attention_mask": keep}])
    assert report.num_tokens == 8 * 12 + 8 * 9
    for name in masks:
        assert torch.allclose(plain.get_parameter(name), padded.get_parameter(name), atol=1e-4), name


def test_the_bias_alone_keeps_weights_and_restores_the_mean() -> None:
    model, batches = tiny_family("gpt2"), token_batches()
    dense, masks = pruned(model)
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    bindings = Targets().resolve(model)
    refit(model, dense, masks, batches, method="bias", towards_dense=0.0)
    inputs = layer_inputs(model, bindings, batches)
    for binding in bindings:
        assert torch.equal(binding.parameter, before[binding.name])
        wanted = inputs[binding.name] @ dense[binding.name].double()  # Conv1D: (I, O)
        bias = dense[binding.name.removesuffix("weight") + "bias"]
        given = inputs[binding.name] @ binding.parameter.detach().double() + binding.module.bias.double()
        assert torch.allclose(given.mean(0), wanted.mean(0) + bias, atol=1e-5)


def test_twice_is_once_where_the_dense_biases_are_given() -> None:
    model, batches = tiny_family("gpt2"), token_batches()
    dense, masks = pruned(model)
    refit(model, dense, masks, batches)
    once = copy.deepcopy(model.state_dict())
    refit(model, dense, masks, batches)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, once[name], atol=1e-5), name


def test_targets_outside_of_blocks_and_models_without_attention() -> None:
    head = "lm_head.weight"
    model, batches = tiny_llama(tied=False), token_batches()
    targets = Targets(include=("*.mlp.*", head))
    dense, masks = pruned(model, targets=targets)
    report = refit(model, dense, masks, batches, damping=DAMPING)
    bindings = targets.resolve(model)
    inputs = layer_inputs(model, bindings, batches)
    weight, _ = exact(dense[head], None, masks[head], inputs[head], inputs[head])
    np.testing.assert_allclose(model.get_parameter(head).detach().numpy(), weight, atol=1e-4)
    assert [(error.name, error.is_paired) for error in report.targets[-2:]] == [
        ("model.layers.1.mlp.down_proj.weight", True),
        (head, False),
    ]

    network = tiny_mlp()
    dense, masks = pruned(network)
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(100, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    with torch.no_grad():
        wanted = inputs_TI @ dense["0.weight"].T
        lost = (inputs_TI @ network[0].weight.T - wanted).square().sum()
        refit(network, dense, masks, [{"input": inputs_TI}])
        assert (inputs_TI @ network[0].weight.T + network[0].bias - dense["0.bias"] - wanted).square().sum() < lost


def test_few_tokens_are_noted_and_fewer_refused_before_anything_changes() -> None:
    model = tiny_llama()
    dense, masks = pruned(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="keeps 24 inputs in a row and sees 40 calibration tokens; a refit needs at"):
        refit(model, dense, masks, [{"input_ids": token_windows(4, 10)}])  # enough for the first targets of a block
    is_real = torch.arange(12) < 3
    padded = {"input_ids": token_windows(8, 12), "attention_mask": is_real.long().expand(8, 12)}
    with pytest.raises(ValueError, match="keeps 16 inputs in a row and sees 24 calibration tokens"):
        refit(model, dense, masks, [padded])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = refit(model, dense, masks, [{"input_ids": token_windows(8, 12)}])
    assert len(report.notes) == 1
    assert "saw 4.0 calibration tokens per kept input; below 8" in report.notes[0]
    assert "mlp.down_proj" in report.notes[0]


class Forked(nn.Module):
    """Two stacks of blocks, of which the second waits for inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.image = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, text: Tensor) -> Tensor:
        for layer in self.text:
            text = layer(text)
        return text


def refit_share() -> dict[str, Tensor]:
    """Refit with this process's half of the batches."""
    model = tiny_family("gpt2")
    dense, masks = pruned(model)
    rows = token_windows(24, 12).clamp(min=1).split(6)[dist.get_rank() :: 2]
    report = refit(model, dense, masks, [{"input_ids": ids} for ids in rows])
    assert all(error.is_paired for error in report.targets)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_two_processes_with_half_of_the_batches_each_refit_as_one_does_with_all() -> None:
    model = tiny_family("gpt2")
    dense, masks = pruned(model)
    refit(model, dense, masks, token_batches())
    with Processes() as processes:
        for state in processes.run(refit_share):
            for name, value in model.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_targets_that_no_batch_reaches_are_named() -> None:
    torch.manual_seed(0)
    model = Forked()
    dense, masks = pruned(model)
    batches = [{"text": torch.randn(40, 8)}]
    with pytest.raises(ValueError, match=r"no calibration token reached image\.0\.weight \(2 targets in all\)"):
        refit(model, dense, masks, batches)
    report = refit(model, dense, masks, batches, exclude=("image.*",))
    assert [error.name for error in report.targets] == ["text.0.weight", "text.1.weight"]


@needs_stacked_experts
def test_stacked_experts_are_refused_by_name_and_can_be_left_out() -> None:
    model, batches = tiny_family("qwen3_moe"), token_batches()
    name = "model.layers.1.self_attn.q_proj.weight"
    binding = next(binding for binding in Targets().resolve(model) if binding.name == name)
    dense_input_TI = layer_inputs(model, [binding], batches)[name]
    dense, masks = pruned(model)
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.0\.mlp\.experts\.\w+ cannot be seen"):
        refit(model, dense, masks, batches)
    report = refit(model, dense, masks, batches, exclude=("*.experts.*",))
    assert {error.name for error in report.targets} == {name for name in masks if ".experts." not in name}
    wanted_TO = dense_input_TI @ dense[name].double().T  # the experts before it run dense in the dense model
    lost_TO = layer_inputs(model, [binding], batches)[name] @ binding.parameter.detach().double().T - wanted_TO
    found = next(error for error in report.targets if error.name == name)
    assert found.after == pytest.approx(float(lost_TO.square().sum() / wanted_TO.square().sum()), rel=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    model, batches = tiny_llama(), token_batches()
    dense, masks = pruned(model)
    name = next(iter(masks))
    with pytest.raises(ValueError, match="needs the masks of a pruned model, got none"):
        refit(model, dense, {}, batches)
    with pytest.raises(ValueError, match="needs calibration batches, got none"):
        refit(model, dense, masks, [])
    with pytest.raises(ValueError, match="target pattern 'no_such' matches no weight"):
        refit(model, dense, masks | {"no_such": masks[name]}, batches)
    with pytest.raises(ValueError, match=f"dense weights hold no {name}"):
        refit(model, {}, masks, batches)
    with pytest.raises(ValueError, match="cut smaller has another shape than its parent"):
        refit(model, dense | {name: dense[name][1:]}, masks, batches)
    with pytest.raises(ValueError, match="weights outside of it are not zero"):
        refit(model, dense, masks | {name: ~masks[name]}, batches)
    with pytest.raises(ValueError, match="zero wherever the masks prune"):
        refit(model, {key: model.get_parameter(key).detach() for key in masks}, masks, batches)
    with pytest.raises(ValueError, match=f"{name} has no bias that could take up the mean"):
        refit(model, dense, masks, batches, method="bias")
    with pytest.raises(ValueError, match="target pattern '\\*no_such\\*' matches no weight"):
        refit(model, dense, masks, batches, exclude=("*no_such*",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradient"}, "method must be least_squares or bias"),
        ({"damping": -0.1}, "damping must be >= 0"),
        ({"damping": 0.1, "method": "bias"}, "damping has no effect"),
        ({"towards_dense": 1.5}, "towards_dense must be in"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reconstruct(**options)
