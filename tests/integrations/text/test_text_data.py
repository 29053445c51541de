"""Windows of text: the same on every run, shared between ranks, continued after a resume."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from lightning_prune.integrations.text.text_data import TextData, WindowLoader
from lightning_prune.integrations.text.text_documents import read_documents, train_tokenizer

SOURCE = "def area_{0}(width):\n    # {0} times\n    return width * {0}\n\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        (tmp_path / f"module_{number}.py").write_text(SOURCE.format(number) * 12)
    return tmp_path


def _data(folder: Path, **options: object) -> TextData:
    data = TextData(path=str(folder), vocab_size=300, window=16, batch_size=4, hold_out=4, **options)
    data.setup()
    return data


def test_the_standard_library_is_the_default() -> None:
    documents = read_documents(max_characters=200_000)
    names = [document.name for document in documents]
    assert sum(len(document.text) for document in documents[:-1]) < 200_000
    assert sum(len(document.text) for document in documents) >= 200_000
    assert not any("site-packages" in name or "test/" in name for name in names)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert documents[0].text == (root / names[0]).read_text(encoding="utf-8", errors="replace")
    assert documents == read_documents(max_characters=200_000)


def test_order_depends_on_names_only(folder: Path) -> None:
    names = [document.name for document in read_documents(str(folder))]
    assert sorted(names) == sorted(f"module_{number}.py" for number in range(12))
    (folder / "module_3.py").write_text("changed = True\n")
    assert [document.name for document in read_documents(str(folder))] == names


def test_long_text_is_read_in_pieces_without_loss(tmp_path: Path) -> None:
    text = "".join(f"line {number} of a long story\n" for number in range(2000)) + "no newline at the end"
    (tmp_path / "story.txt").write_text(text)
    documents = read_documents(str(tmp_path / "story.txt"))
    assert "".join(document.text for document in documents) == text
    assert len(documents) == -(-len(text) // 8000)


def test_json_lines_give_their_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    assert [document.text for document in read_documents(str(path))] == ["one", "two"]


@pytest.mark.parametrize("line", ['{"story": "three"}', "[1, 2]", '{"text": 3}', "no json"])
def test_json_lines_without_text_name_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n" + line + "\n")
    with pytest.raises(
        ValueError,
        match=r"data.jsonl, line 2: expected an object with a field 'text', or with 'messages' of role and .*, got ",
    ):
        read_documents(str(path))


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text found at"):
        read_documents(str(tmp_path))
    with pytest.raises(ValueError, match="no text found at"):
        read_documents(str(tmp_path / "nowhere"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"cannot read text from .*picture.png; allowed are .txt"):
        read_documents(str(tmp_path / "picture.png"))


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = train_tokenizer(["some words and words"], vocab_size=270)
    text = "Grüße, 世界\n\tx  ==  y\x00 <s>"
    assert tokenizer.decode(tokenizer.encode(text.replace("<s>", ""))) == text.replace("<s>", "")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == 270
    with pytest.raises(ValueError, match="vocab_size must hold 256 bytes and 3 special tokens, got 100"):
        train_tokenizer(["text"], vocab_size=100)
    with pytest.raises(ValueError, match="got 258"):
        train_tokenizer(["text"], vocab_size=258)
    assert len(train_tokenizer(["text"], vocab_size=259)) == 259


def test_every_fourth_document_is_held_out(folder: Path) -> None:
    data = _data(folder)
    ordered = read_documents(str(folder))
    assert data.val_documents == [ordered[3], ordered[7], ordered[11]]
    assert data.train_documents == [item for item in ordered if item not in data.val_documents]


def test_windows_hold_the_documents_in_order(folder: Path) -> None:
    data = _data(folder)
    stream = torch.cat([batch["input_ids"].flatten() for batch in data.val_dataloader()]).tolist()
    expected = []
    for document in data.val_documents:
        expected += [0, *data.tokenizer.encode(document.text), 1]
    assert stream == expected[: len(expected) // 16 * 16]
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].dtype == torch.int64


def test_an_epoch_holds_every_window_once_in_a_new_order(folder: Path) -> None:
    data = _data(folder)
    loader = data.train_dataloader()
    first, second = [torch.cat([batch["input_ids"] for batch in loader]) for _ in range(2)]
    assert len(first) == len(loader) * 4
    assert not torch.equal(first, second)
    again = data.train_dataloader()
    assert torch.equal(torch.cat([batch["input_ids"] for batch in again]), first)
    other = _data(folder, seed=1).train_dataloader()
    assert not torch.equal(torch.cat([batch["input_ids"] for batch in other]), first)


def test_ranks_share_the_windows() -> None:
    windows = torch.arange(23)[:, None]
    for seed in (None, 5):
        seen = []
        for rank in range(3):
            loader = WindowLoader(windows, batch_size=2, seed=seed, rank=rank, world_size=3)
            seen.append(torch.cat([batch["input_ids"] for batch in loader]).flatten().tolist())
        number = 7 if seed is None else 6  # 23 // 3, and only whole batches when shuffled
        assert [len(part) for part in seen] == [number] * 3
        assert len({window for part in seen for window in part}) == 3 * number


def test_a_loader_continues_where_its_state_stopped() -> None:
    windows = torch.arange(40)[:, None]

    def new() -> WindowLoader:
        return WindowLoader(windows, batch_size=3, seed=2)

    whole = new()
    expected = [batch["input_ids"] for _ in range(2) for batch in whole]
    for stop in (1, 12, 13, 14, 20):
        loader = new()
        seen = []
        while len(seen) < stop:
            for batch in loader:
                seen.append(batch["input_ids"])
                if len(seen) == stop:
                    break
        resumed = new()
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        while len(seen) < len(expected):
            seen += [batch["input_ids"] for batch in resumed]
        assert all(torch.equal(found, wanted) for found, wanted in zip(seen, expected, strict=True)), stop


def test_too_little_text_says_which_split(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"the validation text has \d+ tokens, fewer than one window of 900"):
        TextData(path=str(folder), vocab_size=300, window=900, hold_out=4).setup()
    with pytest.raises(ValueError, match=r"the training text has \d+ tokens, fewer than one window of 9000"):
        TextData(path=str(folder), vocab_size=300, window=9000, hold_out=4).setup()
    with pytest.raises(
        ValueError, match=r"the training text fills \d+ windows of 16 tokens, fewer than a batch of 999"
    ):
        TextData(path=str(folder), vocab_size=300, window=16, batch_size=999, hold_out=4).setup()
    with pytest.raises(ValueError, match="hold_out must be 2 or more, got 1"):
        TextData(hold_out=1)


def test_a_tokenizer_folder_is_used(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(["return width"] * 3, vocab_size=262).save_pretrained(tmp_path / "own")
    data = _data(folder, tokenizer=str(tmp_path / "own"))
    assert len(data.tokenizer) == 262
