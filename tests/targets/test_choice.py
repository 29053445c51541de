"""Which weights are pruned by default, and why each of the others is not."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchmetrics import Metric
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from lightning_prune import Targets
from tests.tiny_models import tiny_llama


class Block(nn.Module):
    """A transformer's block: fused attention and a small network."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Residual(nn.Module):
    """Two convolutions with norms, and a third beside them where the width changes."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(into, out, 1) if into != out else None


def model_of(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(OrderedDict(parts))


def blocks(number: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(number))


def chosen(model: nn.Module) -> list[str]:
    return [binding.name for binding in Targets().resolve(model)]


def reasons(model: nn.Module) -> dict[str, str]:
    return {one.name: one.reason for one in Targets().select(model).left_out}


def test_convolutions_are_pruned_and_the_classifier_is_not() -> None:
    stages = [nn.Sequential(Residual(into, out), Residual(out, out)) for into, out in ((8, 8), (8, 16))]
    model = model_of(stem=nn.Conv2d(3, 8, 7), layer1=stages[0], layer2=stages[1], fc=nn.Linear(16, 10))
    assert reasons(model) == {"fc.weight": "output head"}
    assert len(chosen(model)) == 1 + 8 + 1


@pytest.mark.parametrize(
    "model",
    [
        ResNetForImageClassification(
            ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", num_labels=5)
        ),
        RegNetForImageClassification(
            RegNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], groups_width=2, num_labels=3)
        ),
    ],
    ids=["resnet", "regnet"],
)
def test_every_convolution_of_a_convolutional_network_is_pruned(model: nn.Module) -> None:
    kernels = {name for name, parameter in model.named_parameters() if parameter.ndim == 4}
    assert set(chosen(model)) == kernels
    assert set(reasons(model).values()) == {"output head"}


def test_a_classifier_of_several_linear_layers_behind_convolutions_is_a_head() -> None:
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    classifier = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    assert chosen(model_of(features=features, classifier=classifier)) == [f"features.{at}.weight" for at in (0, 2, 4)]


def test_a_patch_embedding_and_projections_of_a_transformer_are_outside() -> None:
    model = model_of(patch=nn.Conv2d(3, 8, 4, 4), project=nn.Linear(8, 8), blocks=blocks(), head=nn.Linear(8, 10))
    assert reasons(model) == {
        "patch.weight": "outside the repeated blocks",
        "project.weight": "outside the repeated blocks",
        "head.weight": "output head",
    }


def test_fused_attention_is_pruned() -> None:
    assert chosen(blocks(1)) == [
        f"0.{name}" for name in ("attn.in_proj_weight", "attn.out_proj.weight", "up.weight", "down.weight")
    ]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Embedding(9, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 9)),
        nn.ModuleList([nn.Embedding(9, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 9)]),
        model_of(parts=model_of(embed=nn.Embedding(9, 8), blocks=blocks(), head=nn.Sequential(nn.Linear(8, 9)))),
    ],
    ids=["sequential", "list", "dict"],
)
def test_heads_are_recognised_in_any_container(model: nn.Module) -> None:
    assert sorted(reasons(model).values()) == ["embedding", "output head"]
    assert len(chosen(model)) == 8


def test_the_output_embeddings_of_a_part_are_a_head_wherever_it_lies() -> None:
    inner = tiny_llama(tied=False)
    found = reasons(model_of(part=nn.ModuleList([inner]), after=nn.Linear(4, 4), last=nn.Linear(4, 2)))
    assert found["part.0.lm_head.weight"] == "output head"


def test_a_classifier_of_a_language_model_is_a_head() -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    assert reasons(LlamaForSequenceClassification(config))["score.weight"] == "output head"


def test_a_plain_chain_is_pruned_but_for_the_layer_that_produces_its_output() -> None:
    chain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    assert chosen(chain) == ["0.weight", "2.weight"]
    assert chosen(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) == ["0.weight", "1.weight"]
    assert chosen(nn.Linear(8, 3)) == ["weight"]


def test_heads_beside_the_last_one_are_heads() -> None:
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    assert chosen(model_of(trunk=trunk, actor=nn.Linear(8, 3), critic=nn.Linear(8, 1))) == [
        "trunk.0.weight",
        "trunk.2.weight",
    ]
    nets = {
        name: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, out))
        for name, out in (("actor", 3), ("critic", 1))
    }
    assert list(reasons(model_of(**nets))) == ["actor.4.weight", "critic.4.weight"]


def test_classifiers_beside_each_other_behind_convolutions_are_heads() -> None:
    heads = {name: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)) for name in ("left", "right")}
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert chosen(model_of(features=features, **heads)) == ["features.0.weight", "features.2.weight"]


def test_the_last_convolution_is_a_head_if_it_is_pointwise_or_narrow() -> None:
    body = [Residual(3, 16), Residual(16, 16)]
    for last, is_head in ((nn.Conv2d(16, 21, 1), True), (nn.Conv2d(16, 4, 3), True), (nn.Conv2d(16, 8, 3), False)):
        assert ("2.weight" in reasons(nn.Sequential(*body, last))) == is_head


def test_recurrent_layers_are_pruned_and_the_decoder_is_not() -> None:
    model = model_of(embed=nn.Embedding(9, 4), rnn=nn.LSTM(4, 6, 2, bidirectional=True), head=nn.Linear(12, 9))
    expected = [name for name, _ in model.named_parameters() if name.startswith("rnn.weight_")]
    assert len(expected) == 8
    assert chosen(model) == expected
    cells = model_of(cells=nn.ModuleList([nn.GRUCell(4, 6), nn.GRUCell(6, 6)]), head=nn.Linear(6, 9))
    assert chosen(cells) == [f"cells.{at}.weight_{what}" for at in (0, 1) for what in ("ih", "hh")]
    assert "rnn.weight_hr_l0" in chosen(model_of(rnn=nn.LSTM(4, 6, proj_size=3), head=nn.Linear(3, 9)))


def test_recurrent_layers_beside_convolutions_are_blocks_of_their_own() -> None:
    model = model_of(cnn=nn.Sequential(Residual(1, 8), Residual(8, 8)), rnn=nn.GRU(8, 8), head=nn.Linear(8, 5))
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0"} < set(chosen(model))


def mixture(*, stacked: bool) -> nn.Module:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choose, self.shared_gate = nn.Linear(8, 3, bias=False), nn.Linear(8, 1, bias=False)
            if stacked:
                self.up, self.down = (nn.Parameter(torch.rand(3, *shape)) for shape in ((12, 8), (8, 12)))
                self.bias = nn.Parameter(torch.rand(3, 12))
            else:
                self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(3))

    return model_of(blocks=nn.ModuleList(Mixture() for _ in range(2)), head=nn.Linear(8, 9))


@pytest.mark.parametrize("stacked", [True, False])
def test_routers_are_told_by_one_output_for_each_expert_or_a_single_one(stacked: bool) -> None:
    found = reasons(mixture(stacked=stacked))
    routers = [name for name, reason in found.items() if reason == "router or gate"]
    assert routers == [f"blocks.{at}.{name}.weight" for at in (0, 1) for name in ("choose", "shared_gate")]
    assert len(chosen(mixture(stacked=stacked))) == (4 if stacked else 12)


def test_biases_of_stacked_experts_are_no_weights() -> None:
    assert reasons(mixture(stacked=True))["blocks.0.bias"] == "no layer's weight"


def test_a_layer_called_gate_between_equal_neighbours_is_part_of_its_network() -> None:
    gated = [model_of(gate=nn.Linear(4, 6), up=nn.Linear(4, 6), down=nn.Linear(6, 4)) for _ in range(2)]
    assert "0.gate.weight" in chosen(nn.ModuleList(gated))
    routed = [model_of(gate=nn.Linear(4, 4), up=nn.Linear(4, 6), down=nn.Linear(6, 4)) for _ in range(2)]
    assert "0.gate.weight" not in chosen(nn.ModuleList(routed))


def test_experts_with_inputs_before_outputs_are_read_the_other_way_round() -> None:
    config = GptOssConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, num_local_experts=2,
    )  # fmt: skip
    found = {binding.name: binding.shape_OI for binding in Targets().resolve(GptOssForCausalLM(config))}
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == (2 * 24, 8)
    assert found["model.layers.0.mlp.experts.down_proj"] == (2 * 8, 12)


def test_a_frozen_teacher_is_left_alone() -> None:
    student, teacher = model_of(blocks=blocks(), head=nn.Linear(8, 3)), model_of(blocks=blocks(), head=nn.Linear(8, 3))
    model = model_of(teacher=teacher.requires_grad_(False), student=student)
    assert {name.split(".")[0] for name in chosen(model)} == {"student"}
    assert reasons(model)["teacher.blocks.0.up.weight"] == "frozen, and no adapter covers it"


def test_a_small_student_beside_a_frozen_network_is_pruned() -> None:
    student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    teacher = model_of(blocks=blocks()).requires_grad_(False)
    assert chosen(model_of(teacher=teacher, student=student)) == ["student.0.weight", "student.2.weight"]
    assert chosen(model_of(teacher=teacher, student=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))) == [
        "student.0.weight"
    ]


def test_a_convolutional_student_beside_a_frozen_one_keeps_its_linear_layers() -> None:
    teacher = nn.Sequential(Residual(3, 8), Residual(8, 8), nn.Linear(8, 3)).requires_grad_(False)
    student = model_of(conv=nn.Conv2d(3, 4, 3), hidden=nn.Linear(16, 8), out=nn.Linear(8, 3))
    for model in (model_of(teacher=teacher, student=student), model_of(student=student, teacher=teacher)):
        assert chosen(model) == ["student.conv.weight", "student.hidden.weight"]


def test_networks_inside_metrics_are_no_part_of_the_model() -> None:
    class Distance(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(Residual(3, 8), Residual(8, 8), nn.Conv2d(8, 1, 1))

        def update(self) -> None:
            """Nothing."""

        def compute(self) -> None:
            """Nothing."""

    model = model_of(net=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), distance=Distance())
    assert chosen(model) == ["net.0.weight"]
    found = reasons(model)
    assert found.pop("net.2.weight") == "output head"
    assert set(found.values()) == {"part of a metric"}


def test_blocks_that_train_beside_frozen_ones_are_pruned() -> None:
    model = model_of(blocks=blocks(3), head=nn.Linear(8, 3))
    model["blocks"][0].requires_grad_(False)
    assert {name.split(".")[1] for name in chosen(model)} == {"1", "2"}


def test_frozen_blocks_below_a_head_that_trains_may_be_unfrozen_later() -> None:
    model = model_of(blocks=blocks().requires_grad_(False), first=nn.Linear(8, 8), head=nn.Linear(8, 3))
    assert len(chosen(model)) == 8
    assert len(chosen(model.requires_grad_(False))) == 8


def test_a_frozen_layer_that_holds_its_own_adapter_is_pruned() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.weight.requires_grad_(False)
            self.low, self.high = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(8, 2))

    frozen = nn.Linear(8, 8).requires_grad_(False)
    model = nn.ModuleList(nn.ModuleDict({"one": Adapted(), "other": frozen}) for _ in range(2))
    assert chosen(model) == ["0.one.weight", "1.one.weight"]


@pytest.mark.filterwarnings("ignore:Unable to import:UserWarning")
def test_a_frozen_base_is_pruned_where_an_adapter_covers_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert chosen(model) == [f"model.layers.{at}.self_attn.q_proj.weight" for at in (0, 1)]
    assert reasons(model)["model.layers.0.mlp.up_proj.weight"] == "frozen, and no adapter covers it"


def test_convolutions_that_the_method_cannot_treat_are_left_out_beside_others() -> None:
    model = nn.Sequential(Residual(3, 8), Residual(8, 8))
    found = Targets().select(model, fits=lambda candidate: "too odd" if candidate.parameter.shape[1] == 3 else None)
    assert [(one.name, one.reason) for one in found.left_out] == [
        ("0.conv1.weight", "too odd"),
        ("0.shortcut.weight", "too odd"),
    ]
    assert len(Targets().select(model, fits=lambda candidate: "all").targets) == 5  # refused by whoever checks them
