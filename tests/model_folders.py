"""Model folders on disk, as a user would name them on the command line."""

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB, tiny_llama

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per lower-case letter, digit and sign, that fits the tiny models."""
    signs = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits, *" .,:;()=_\n"]
    assert len(signs) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel({sign: number for number, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_model_folder(folder: Path, *, has_tokenizer: bool = True) -> Path:
    """Write a tiny Llama with its tokenizer."""
    tiny_llama().save_pretrained(folder)
    if has_tokenizer:
        character_tokenizer().save_pretrained(folder)
    return folder
