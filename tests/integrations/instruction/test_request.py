import pytest
import torch

from lightning_prune.integrations.instruction.request import padded, tokens_of
from tests.model_folders import character_tokenizer


def test_text_ids_and_messages_give_the_same_tokens() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    expected = tuple(tokenizer("abc:")["input_ids"])
    assert tokens_of("abc:", tokenizer) == expected
    assert tokens_of([{"role": "user", "content": "abc"}], tokenizer) == expected
    assert tokens_of(torch.tensor([expected])) == expected
    assert tokens_of(list(expected)) == expected


@pytest.mark.parametrize("prompt", ["", "  \n", [], (), torch.zeros(0, dtype=torch.long), torch.zeros(1, 0)])
def test_an_empty_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        tokens_of(prompt, character_tokenizer())


@pytest.mark.parametrize("prompts", [["abc", "def"], torch.ones(2, 3, dtype=torch.long), ["abc"]])
def test_several_prompts_are_refused(prompts: object) -> None:
    with pytest.raises(ValueError, match="one sub-model serves one instruction"):
        tokens_of(prompts, character_tokenizer())


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        tokens_of("abc")


def test_rows_are_padded_on_either_side() -> None:
    ids, there = padded([(5, 6), (7,)], pad=9, side="left")
    assert ids.tolist() == [[5, 6], [9, 7]]
    assert there.tolist() == [[1, 1], [0, 1]]
    ids, there = padded([(5, 6), (7,)], pad=9, side="right")
    assert ids.tolist() == [[5, 6], [7, 9]]
    assert there.tolist() == [[1, 1], [1, 0]]
