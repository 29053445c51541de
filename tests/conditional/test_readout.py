from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaModel

from lightning_prune.conditional.readout import find_readout
from tests.conditional.inserted import model_of, tokens
from tests.structured.families import SIZES, randomised
from tests.tiny_models import tiny_llama


def last_block(model: Any) -> Any:
    base = model.base_model
    base = getattr(base, "decoder", base)
    return (base.layers if hasattr(base, "layers") else base.h)[-1]


def built(name: str) -> Any:
    if name == "granite":
        return randomised(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)))
    if name == "cohere":
        return randomised(CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)))
    return model_of(name)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "names", "number"),
    [
        ("llama", ("model.norm", "lm_head"), 1.0),
        ("gpt2", ("transformer.ln_f", "lm_head"), 1.0),
        ("opt", ("model.decoder.final_layer_norm", "lm_head"), 1.0),
        ("gemma2", ("model.norm", "lm_head"), 30.0),
        ("granite", ("model.norm", "lm_head"), 0.25),
        ("cohere", ("model.norm", "lm_head"), 0.25),
    ],
)
def test_the_last_stream_is_read_as_the_model_reads_it(name: str, names: tuple[str, ...], number: float) -> None:
    model = built(name)
    if name == "gemma2":
        model.lm_head.weight.mul_(100)  # logits that the cap bends
    block, seen = last_block(model), []
    readout = find_readout(model, block, "early_exit")
    assert (readout.names, readout.number) == (names, pytest.approx(number, rel=1e-5))
    handle = block.register_forward_hook(lambda _, __, output: seen.append(output))
    logits = model(input_ids=tokens(2, 7)).logits
    handle.remove()
    stream = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
    torch.testing.assert_close(readout(stream), logits, rtol=1e-5, atol=1e-5)


def test_a_model_without_head_is_refused() -> None:
    model = LlamaModel(tiny_llama().config)
    with pytest.raises(ValueError, match="LlamaModel has none"):
        find_readout(model, model.layers[-1], "early_exit")


def test_other_answers_than_those_of_the_output_embeddings_are_refused() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda _, __, output: output)
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + 1.0
        return output

    model.forward = shifted
    with pytest.raises(ValueError, match="are not a multiple of what its output embeddings give"):
        find_readout(model, model.model.layers[-1], "early_exit")
