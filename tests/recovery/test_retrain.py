"""Choose parameters to retrain in models of several families and compare with their names."""

import pytest
from torch import nn

from lightning_prune.recovery.retrain import Part, Trainable, choose_trainable, count_trainable, parameters_of_part
from tests.structured.families import build


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt"])
def test_biases_and_norms_are_the_vectors_of_a_decoder(family: str) -> None:
    model = build(family)
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    choose_trainable(model, ["norms"] if family == "llama" else ["biases", "norms"])
    assert trained(model) == vectors


def test_a_part_is_what_its_name_says() -> None:
    model = build("qwen2")
    assert {name.rpartition(".")[2] for name in parameters_of_part(model, "biases")} == {"bias"}
    assert all("norm" in name for name in parameters_of_part(model, "norms"))
    assert list(parameters_of_part(model, "embeddings")) == ["model.embed_tokens.weight"]
    assert list(parameters_of_part(model, "head")) == ["lm_head.weight"]


def test_positions_are_embeddings_too() -> None:
    assert set(parameters_of_part(build("gpt2"), "embeddings")) == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_all_trains_everything() -> None:
    model = build("llama").requires_grad_(False)
    share = choose_trainable(model, ["all"])
    assert share.num_trainable == share.num_parameters == sum(p.numel() for p in model.parameters())


def test_the_share_is_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))  # 8 + 6 parameters, 4 of them biases
    choose_trainable(model, ["biases"])
    assert count_trainable(model) == Trainable(4, 14)
    assert str(count_trainable(model)) == "4 of 14 parameters trained (28.6 %)"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "names no part"),
        (["biases"], "has no biases"),
        (["layers"], "knows the parts biases, norms, head, embeddings, all; got 'layers'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(parts: list[Part], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_trainable(build("llama"), parts)
