"""Tiny models whose norms have weights, for the methods that move or select residual channels."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 64


def family(name: str, *, tied: bool = False, dtype: torch.dtype = torch.float32, layers: int = 2) -> PreTrainedModel:
    """Return a model of a family with weights of norms and biases away from their start."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4)
    return model.to(dtype).eval()


def calibration(num: int = 4, *, seed: int = 0, length: int = 16) -> list[dict[str, Tensor]]:
    """Return batches of four random sequences."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (4, length), generator=generator)} for _ in range(num)]


@torch.no_grad()
def logits(model: PreTrainedModel, *, seed: int = 7) -> Tensor:
    """Return the logits of other sequences than those of the calibration."""
    result: Tensor = model(input_ids=calibration(1, seed=seed)[0]["input_ids"]).logits
    return result
