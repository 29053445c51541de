"""Which weights are chosen, under which names, and how each is read as a matrix."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_prune import Once, Sparsifier, Targets
from lightning_prune.targets.targets import Binding, clean_name, find_blocks, is_linear
from tests.tiny_models import needs_stacked_experts, tiny_family, tiny_llama, tiny_mlp


def names(model: nn.Module, **patterns: tuple[str, ...]) -> list[str]:
    return [binding.name for binding in Targets(**patterns).resolve(model)]


def bound(model: nn.Module, name: str) -> Binding:
    (binding,) = Targets(include=(name,)).resolve(model)
    return binding


@pytest.mark.parametrize(
    "wrapped",
    [
        "layers.0.mlp.weight",
        "module.layers.0.mlp.weight",
        "_orig_mod.layers.0.mlp.weight",
        "module._orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight",
        "base_model.model.layers.0.mlp.base_layer.weight",
        "module.base_model.model.layers.0.mlp.base_layer.weight",
        "layers.0._fsdp_wrapped_module.mlp.weight",
    ],
)
def test_wrappers_leave_no_trace_in_names(wrapped: str) -> None:
    assert clean_name(wrapped) == "layers.0.mlp.weight"


def test_a_module_called_module_keeps_its_name() -> None:
    assert clean_name("encoder.module.weight") == "encoder.module.weight"
    assert clean_name("module") == "module"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_wrapped_models_have_the_targets_of_the_bare_one() -> None:
    model = tiny_llama()
    expected = names(model)
    assert names(nn.DataParallel(model)) == expected
    assert names(torch.compile(model)) == expected  # type: ignore[arg-type]


LLAMA_BLOCK = [
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
]


def test_default_targets_are_the_linear_layers_of_the_blocks() -> None:
    expected = [f"model.layers.{block}.{name}" for block in range(2) for name in LLAMA_BLOCK]
    assert names(tiny_llama()) == expected
    assert names(tiny_llama(tied=False)) == expected


@pytest.mark.parametrize(
    ("family", "per_block", "num_blocks"),
    [("gpt2", 4, 2), ("gpt_neox", 4, 2), ("bert", 6, 2)],
)
def test_default_targets_of_families(family: str, per_block: int, num_blocks: int) -> None:
    found = names(tiny_family(family))
    assert len(found) == per_block * num_blocks
    assert not [name for name in found if "emb" in name or "head" in name or "cls" in name or "norm" in name]


@needs_stacked_experts
def test_experts_are_targets_and_routers_are_not() -> None:
    found = names(tiny_family("qwen3_moe"))
    assert [name for name in found if ".mlp." in name] == [
        f"model.layers.{block}.mlp.experts.{part}_proj" for block in range(2) for part in ("gate_up", "down")
    ]


def test_both_sides_of_an_encoder_decoder_are_targets() -> None:
    found = names(tiny_family("t5"))
    assert len([name for name in found if name.startswith("encoder.block.")]) == 2 * 6
    assert len([name for name in found if name.startswith("decoder.block.")]) == 2 * 10
    assert len(found) == 32


def test_a_model_without_blocks_offers_all_layers_but_its_output() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(8, 2)
            self.scale = nn.Parameter(torch.ones(2, 2))

    assert names(Small()) == ["conv.weight", "fc.weight"]
    assert names(tiny_mlp()) == ["0.weight"]
    assert names(nn.Sequential(nn.Linear(3, 2))) == ["0.weight"]


def test_routers_of_experts_are_left_alone() -> None:
    def block() -> nn.Module:
        parts = {name: nn.Linear(4, 4) for name in ("gate", "router", "up")}
        return nn.ModuleDict(parts | {"moe": nn.ModuleDict({"gate": nn.ModuleDict({"wg": nn.Linear(4, 4)})})})

    model = nn.ModuleList([nn.ModuleList([block(), block()])])
    assert names(model) == ["0.0.up.weight", "0.1.up.weight"]
    assert names(model, include=("*router*",)) == ["0.0.router.weight", "0.1.router.weight"]


def test_a_head_beside_a_single_block_is_left_alone() -> None:
    model = tiny_llama(layers=1, tied=False)
    assert find_blocks(model) == []
    assert names(model) == [f"model.layers.0.{name}" for name in LLAMA_BLOCK]


def test_include_chooses_exactly_what_it_matches() -> None:
    model = tiny_llama()
    assert names(model, include=("*.1.mlp.up_proj.weight",)) == ["model.layers.1.mlp.up_proj.weight"]
    assert names(model, include=("*q_proj*", "*k_proj*"), exclude=("*.0.*",)) == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ]
    assert names(model, include=("model.embed_tokens.weight",)) == ["model.embed_tokens.weight"]


def test_exclude_narrows_the_default() -> None:
    assert names(tiny_llama(), exclude=("*.mlp.*", "*.[01].self_attn.[kv]_proj.*")) == [
        f"model.layers.{block}.self_attn.{part}_proj.weight" for block in range(2) for part in "qo"
    ]


def test_a_tied_weight_has_two_names_and_is_found_once_by_either() -> None:
    model = tiny_llama(tied=True)
    for pattern in ("lm_head.weight", "model.embed_tokens.weight", "*e*_*[ds].weight"):
        (binding,) = Targets(include=(pattern,)).resolve(model)
        assert binding.parameter is model.lm_head.weight
    assert names(model, include=("*.q_proj.weight", "lm_head.*"), exclude=("*embed*",)) == [
        f"model.layers.{block}.self_attn.q_proj.weight" for block in range(2)
    ]


def test_a_target_knows_every_module_that_holds_it() -> None:
    tied = tiny_llama(tied=True)
    binding = bound(tied, "lm_head.weight")
    assert binding.modules == (tied.model.embed_tokens, tied.lm_head)
    assert binding.module is tied.model.embed_tokens
    layer = nn.Linear(4, 4)
    assert bound(nn.Sequential(layer, layer, nn.Linear(4, 4)), "1.weight").modules == (layer,)


def test_adapters_are_left_out() -> None:
    model = tiny_mlp()
    model[0].lora_A = nn.Linear(8, 2, bias=False)
    assert names(model, include=("*weight",)) == ["0.weight", "2.weight"]


def test_a_linear_layer_is_read_as_it_is() -> None:
    model = tiny_mlp()
    binding = bound(model, "0.weight")
    assert binding.shape_OI == (16, 8)
    target = binding.target(whole=False)
    assert (target.name, target.row_start, target.num_rows) == ("0.weight", 0, 16)
    assert target.weight_OI.data_ptr() == model[0].weight.data_ptr()
    assert not target.weight_OI.requires_grad
    assert binding.keeps_rows(4)


def round_trip(binding: Binding, expected_OI: Tensor) -> None:
    matrix = binding.to_matrix(binding.parameter.detach())
    assert tuple(matrix.shape) == binding.shape_OI
    assert torch.equal(matrix, expected_OI)
    assert torch.equal(binding.from_matrix(matrix), binding.parameter)
    assert torch.equal(binding.read(binding.parameter.detach(), whole=True), expected_OI)


def test_conv1d_of_gpt2_is_read_transposed() -> None:
    model = nn.ModuleDict({"c": Conv1D(6, 4)})  # 4 inputs, 6 outputs, stored (4, 6)
    binding = bound(model, "c.weight")
    assert binding.shape_OI == (6, 4)
    round_trip(binding, model["c"].weight.detach().T)
    assert is_linear(model["c"])


class Experts(nn.Module):
    """Weights of three experts, 4 outputs and 5 inputs each."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.rand(3, 5, 4) if is_transposed else torch.rand(3, 4, 5))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_are_read_as_rows_of_all_experts(is_transposed: bool) -> None:
    experts = Experts(is_transposed=is_transposed)
    binding = bound(nn.ModuleDict({"experts": experts}), "experts.up")
    assert binding.shape_OI == (12, 5)
    matrices = [up.T if is_transposed else up for up in experts.up.detach()]
    round_trip(binding, torch.cat(matrices))


def test_a_convolution_is_read_with_one_row_per_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2))
    binding = bound(model, "0.weight")
    assert binding.shape_OI == (4, 12)
    round_trip(binding, model[0].weight.detach().permute(0, 2, 3, 1).flatten(1))


def test_blocks_are_the_outermost_lists() -> None:
    model = tiny_family("t5")
    assert find_blocks(model) == [*model.encoder.block, *model.decoder.block]
    llama = tiny_llama(layers=3)
    assert find_blocks(llama) == list(llama.model.layers)
    mlp = tiny_mlp()
    assert find_blocks(mlp) == [mlp[0], mlp[2]]
    # one block alone is no repetition, nor is a list of norms
    assert find_blocks(nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])) == []
    assert find_blocks(nn.ModuleDict({"norms": nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])})) == []


def test_patterns_that_match_nothing_are_refused_with_names_to_choose_from() -> None:
    message = r"target pattern 'decoder\.\*' matches no weight; names look like 'model\.embed_tokens\.weight', '"
    with pytest.raises(ValueError, match=message):
        names(tiny_llama(), include=("*.mlp.*", "decoder.*"))
    with pytest.raises(ValueError, match=message):
        names(tiny_llama(), exclude=("decoder.*",))
    with pytest.raises(ValueError, match="matches no weight"):
        names(tiny_llama(), include=("model.norm.weight",))  # one dimension: never a target


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no weight is left to prune; name targets with include patterns, for ex"):
        names(tiny_mlp(), exclude=("*",))
    with pytest.raises(ValueError, match="no weight is left to prune"):
        names(nn.ModuleDict({"e": nn.Embedding(3, 2)}))


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"target 0\.weight is on the meta device.*load the weights before attaching"):
        names(model)


class Packed(Tensor):
    """A tensor subclass, as quantization libraries make them."""


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 2, dtype=torch.int8),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.zeros(2, 2).to(torch.float8_e4m3fn),
        torch.zeros(2, 2).as_subclass(Packed),
    ],
)
def test_quantized_weights_are_refused(weight: Tensor) -> None:
    model = tiny_mlp()
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"target 0\.weight is already quantized \(.*\); prune before quantizing, or"):
        names(model)
    assert names(model, include=("*",), exclude=("0.*",)) == ["2.weight"]


def test_two_targets_never_share_a_name() -> None:
    model = nn.Module()
    model.module = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model.fc, model.base_layer = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"two weights are called fc\.weight once what wrappers add to names"):
        names(model)
    del model.base_layer, model.module
    model.outer = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    assert names(model) == ["fc.weight", "outer.module.fc.weight"]


def test_one_memory_under_two_parameters_is_one_target() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    (binding,) = Targets().resolve(model)
    assert binding.modules == (model[0], model[1])
    assert [copy is model[1].weight for copy in binding.copies] == [True]


def test_weights_that_share_memory_in_part_are_refused() -> None:
    memory = torch.rand(6, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight, model[1].weight = nn.Parameter(memory[:4]), nn.Parameter(memory[2:])
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory, but are not the same weight read"):
        names(model)
    model[1].weight = nn.Parameter(memory[:4].t())
    with pytest.raises(ValueError, match=r"share memory"):
        names(model)
    separate = torch.rand(8, 4)
    model[0].weight, model[1].weight = nn.Parameter(separate[:4]), nn.Parameter(separate[4:])
    assert names(model) == ["0.weight", "1.weight"]


def test_a_weight_that_trains_as_two_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"0\.weight is one weight held as .* parameters over the same memory"):
        Sparsifier(schedule=Once(sparsity=0.5)).attach(model, [optimizer], total_steps=2)
    model[1].weight = model[0].weight
    Sparsifier(schedule=Once(sparsity=0.5)).attach(model, [optimizer], total_steps=2)
