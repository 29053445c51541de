import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lightning_prune.conditional.instruction import Instruction, InstructionCondition, Predictor
from lightning_prune.integrations.instruction.encoders import Pretrained
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.prompt import Reads
from lightning_prune.structured.structure import Stack
from tests.tiny_models import tiny_llama

WORDS = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(60))]


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """Return a folder with a tiny BERT whose tokens are the model's in the opposite order."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer([*WORDS[:2], *WORDS[:1:-1]]).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def conditioned(encoder: str, **options: Any) -> InstructionCondition:
    predictor = Predictor(encoder=Pretrained(name=encoder, **options), hidden=8)
    reads = Reads(dropout=0.0)
    return Instruction(budget=Budget(keep=0.5), predictor=predictor, reads=reads).insert(
        tiny_llama(), Stack((), "", (), 2)
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_encoder_with_other_tokens_reads_the_same_text(encoder: str, pooling: str) -> None:
    condition = conditioned(encoder, pooling=pooling)
    condition.use_tokenizer(tokenizer(WORDS))
    condition.model.eval()
    ids = torch.tensor([[2, 3, 4, 5], [0, 0, 9, 7]])
    attention = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    module = condition.predictor.encoder
    found = module(ids, attention)
    theirs = torch.tensor([[61, 60, 59, 58], [54, 56, 0, 0]])  # token n of the model is 63 - n of the encoder
    there = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    states = module.backbone(input_ids=theirs, attention_mask=there).last_hidden_state
    expected = {
        "last": torch.stack((states[0, 3], states[1, 1])),
        "mean": torch.stack((states[0].mean(0), states[1, :2].mean(0))),
    }
    torch.testing.assert_close(found, expected[pooling])


def test_gradients_reach_the_encoder_unless_it_is_frozen(encoder: str) -> None:
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    for trains in (True, False):
        condition = conditioned(encoder, trains=trains)
        condition.use_tokenizer(tokenizer(WORDS))
        condition.begin(total_steps=1)
        condition.predictor.ramp_steps.zero_()
        condition.model.train()
        condition.model(input_ids=ids, labels=labels).loss.backward()
        grad = condition.predictor.encoder.backbone.embeddings.word_embeddings.weight.grad
        assert (grad is not None and float(grad.abs().sum()) > 0) == trains


def test_what_is_missing_is_said(encoder: str, tmp_path: Path) -> None:
    condition = conditioned(encoder)
    with pytest.raises(ValueError, match="no tokenizer was found"):
        condition.use_tokenizer(None)
    with pytest.raises(ValueError, match="call use_tokenizer first"):
        copy.deepcopy(condition.predictor.encoder)(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2))
    with pytest.raises(ValueError, match="cannot be opened"):
        conditioned(str(tmp_path / "nothing"))
