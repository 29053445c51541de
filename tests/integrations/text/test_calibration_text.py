"""Which text a one-shot run calibrates on, what of it is held out, and that the loss is told before and after."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from lightning_prune.integrations.folders.hf_oneshot import run_oneshot
from lightning_prune.integrations.text.calibration_text import Text, calibration_windows
from lightning_prune.integrations.text.text_documents import Document, read_documents
from tests.model_folders import TEXT, character_tokenizer, write_model_folder
from tests.tiny_models import VOCAB, tiny_llama


def documents(*texts: str) -> list[Document]:
    return [Document(str(idx), text) for idx, text in enumerate(texts)]


def ids(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_windows_are_the_tokens_of_one_document_after_the_other() -> None:
    tokenizer = character_tokenizer()
    texts = documents("abcd", "efghij", "never read")
    windows_NT = calibration_windows(tokenizer, texts, num_sequences=3, sequence_length=3)
    letters = torch.arange(9).reshape(3, 3) + tokenizer.convert_tokens_to_ids("a")
    assert torch.equal(windows_NT, letters)


def test_too_little_text_says_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"gives 7 tokens, 3 sequences of 3 need 9; .*--num_sequences 2"):
        calibration_windows(character_tokenizer(), documents("abcdefg"), num_sequences=3, sequence_length=3)


def test_what_follows_the_calibration_text_is_held_out() -> None:
    model, tokenizer = tiny_llama(), character_tokenizer()
    text = Text(data="x", num_sequences=2, sequence_length=3, batch_size=2)
    passages = text.passages(model, tokenizer, documents("abcdefghijkl"))
    first = int(tokenizer.convert_tokens_to_ids("a"))
    assert ids(passages.calibration) == [[first, first + 1, first + 2], [first + 3, first + 4, first + 5]]
    assert ids(passages.held_out) == [[first + 6, first + 7, first + 8], [first + 9, first + 10, first + 11]]
    assert passages.about == "2 held-out sequences of 3 tokens"
    passages = text.passages(model, tokenizer, documents("abcdef" + "a" * 20))
    assert len(ids(passages.held_out)) == 6  # whole windows; a rest only where there is none
    long = Text(data="x", num_sequences=1, sequence_length=20).passages(model, tokenizer, documents("a" * 38))
    assert ids(long.held_out) == [[first] * 18]
    short = text.passages(model, tokenizer, documents("abcdefg"))
    assert ids(short.held_out) == ids(short.calibration)
    assert "the calibration text itself" in short.about


@pytest.mark.parametrize("name", ["num_sequences", "sequence_length", "batch_size"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be 1 or more, got 0"):
        Text(**{name: 0})  # type: ignore[arg-type]


def test_the_model_writes_the_text_where_none_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = tiny_llama()
    text = Text(num_sequences=3, sequence_length=8, seed=4)
    assert text.read() is None
    passages = text.passages(model, None)
    assert (len(ids(passages.calibration)), len(ids(passages.held_out))) == (3, 16)
    assert all(len(row) == 8 and max(row) < VOCAB for row in ids(passages.calibration) + ids(passages.held_out))
    assert "calibration text: written by the model itself, 19 sequences of 8 tokens, seed 4" in caplog.text
    same = Text(data="self", num_sequences=3, sequence_length=8, seed=4).passages(model, None)
    assert ids(same.calibration) == ids(passages.calibration)
    other = Text(num_sequences=3, sequence_length=8, seed=5).passages(model, None)
    assert ids(other.calibration) != ids(passages.calibration)


def test_a_model_that_writes_nothing_reads_python_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    passages = Text(num_sequences=2, sequence_length=4).passages(BertModel(config), character_tokenizer())
    assert len(ids(passages.calibration)) == 2
    assert (passages.held_out, passages.about) == ([], "BertModel predicts no next token")
    assert "sources of Python's standard library, as BertModel writes no text; --data names another" in caplog.text
    with pytest.raises(ValueError, match="BertModel writes no text of its own"):
        Text(data="self", num_sequences=2, sequence_length=4).passages(BertModel(config), character_tokenizer())


@pytest.mark.parametrize("recipe", ["oneshot/wanda_half", "oneshot/magnitude_half"])
def test_every_run_tells_the_loss_on_held_out_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recipe: str
) -> None:
    caplog.set_level(logging.INFO)
    folder, data = write_model_folder(tmp_path / "model"), tmp_path / "text.txt"
    data.write_text(TEXT)
    losses = []
    for idx, sparsity in enumerate((1e-9, 0.5)):
        caplog.clear()
        run_oneshot(
            recipe,
            model=str(folder),
            out=str(tmp_path / f"out{idx}"),
            overrides=[f"prune.schedule.sparsity={sparsity}"],
            data=str(data),
            num_sequences=2,
            sequence_length=12,
            device="cpu",
        )
        (line,) = [line for line in caplog.messages if line.startswith("loss on 16 held-out sequences of 12 tokens: ")]
        words = line.split()
        losses.append((float(words[8]), float(words[10])))
    assert losses[0][0] == losses[0][1] == losses[1][0]
    assert losses[1][0] != losses[1][1]


CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"


def test_chats_are_read_as_the_tokenizer_writes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    tokenizer: Any = character_tokenizer()
    read = read_documents(str(path))
    plain_NT = calibration_windows(tokenizer, read, num_sequences=1, sequence_length=5)
    assert tokenizer.convert_ids_to_tokens(plain_NT[0]) == ["a", "b", "\n", "\n", "c"]
    assert "has no chat template, so messages are read as plain text" in caplog.text
    tokenizer.chat_template = TEMPLATE
    chat_NT = calibration_windows(tokenizer, read, num_sequences=1, sequence_length=9)
    assert "".join(tokenizer.convert_ids_to_tokens(chat_NT[0])) == "u:ab;a:c;"


@pytest.mark.parametrize(
    "messages", ["hello", [1], [{"role": "user"}], [{"content": "x"}], [{"role": 3, "content": "x"}]]
)
def test_a_chat_that_is_none_names_its_line(tmp_path: Path, messages: object) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match=r"chats.jsonl, line 1: (a message needs a role|expected an object with)"):
        read_documents(str(path))


def test_a_data_set_is_read_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "org/none":
            raise ConnectionError("no\nnetwork")
        return ({"text": f"story {idx}"} if name == "org/tales" else {"body": "x"} for idx in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [found.text for found in read_documents("org/tales:en", max_characters=14)] == ["story 0", "story 1"]
    assert [found.text for found in read_documents("org/tales::test", max_characters=7)] == ["story 0"]
    assert asked == [("org/tales", "en", "train", True), ("org/tales", None, "test", True)]
    with pytest.raises(
        ValueError, match=r"data set org/other, record 0: expected an object .* got an object with body"
    ):
        read_documents("org/other")
    with pytest.raises(ValueError, match=r"no file or folder org/none, and the data set .*ConnectionError: no network"):
        read_documents("org/none")
    number = len(asked)
    for path in ("./org/tales", "tales.txt", "/org/tales", "a b"):
        with pytest.raises(ValueError, match="there is no such file or folder"):
            read_documents(path)
    assert len(asked) == number
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"to read a data set of this name: pip install datasets"):
        read_documents("org/tales")
