"""Models write their own calibration text: sampled, seeded, ended where they end it, and kept for the next time."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from lightning_prune.integrations.text.self_text import cache_folder, own_text
from tests.tiny_models import VOCAB, tiny_llama

BEGIN, END = 1, 2


class Writer:
    """Stands in for `generate`: gives prepared rows, and remembers how it was asked."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.asked: list[dict[str, object]] = []

    def __call__(self, input_ids: Tensor, **options: object) -> Tensor:
        self.asked.append(options)
        assert input_ids.tolist() == [[BEGIN]] * len(self.rows)
        return torch.tensor(self.rows)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "cache"))


def writing(monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]) -> tuple[torch.nn.Module, Writer]:
    model, writer = tiny_llama(), Writer(rows)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = BEGIN, END
    monkeypatch.setattr(model, "generate", writer)
    return model, writer


def test_documents_end_where_the_model_ends_them_and_stand_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, writer = writing(monkeypatch, [[BEGIN, 7, END, 0, 0], [BEGIN, 8, 9, 8, 9]])
    ids_NT = own_text(model, num_sequences=2, sequence_length=5, batch_size=2)  # type: ignore[arg-type]
    assert ids_NT.tolist() == [[BEGIN, 7, END, BEGIN, 8], [9, 8, 9, BEGIN, 7]]
    assert len(writer.asked) == 2
    wanted = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4}
    assert wanted.items() <= writer.asked[0].items()


def test_a_model_that_ends_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = writing(monkeypatch, [[BEGIN, END]])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM ends its own texts too early .*--data"):
        own_text(model, num_sequences=1, sequence_length=100)  # type: ignore[arg-type]


def test_a_failure_of_the_model_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> Tensor:
        raise RuntimeError("probability tensor contains\ninf")

    model = tiny_llama()
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(ValueError, match=r"cannot write its own calibration text \(probability tensor contains inf\)"):
        own_text(model, num_sequences=1, sequence_length=4)


def test_text_depends_on_the_seed_alone_and_leaves_other_randomness_as_it_was() -> None:
    texts = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        cache_folder().exists() and [path.unlink() for path in cache_folder().iterdir()]  # type: ignore[func-returns-value]
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        texts.append(own_text(tiny_llama(), num_sequences=2, sequence_length=8, seed=seed))
        if noise == 2:
            torch.manual_seed(noise)
            assert torch.equal(torch.get_rng_state(), state)
    assert texts[0].shape == (2, 8)
    assert int(texts[0].max()) < VOCAB
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_text_is_kept_for_the_same_weights_and_settings_and_not_when_damaged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, writer = writing(monkeypatch, [[BEGIN, 5, 6, 7]])
    first_NT = own_text(model, num_sequences=1, sequence_length=4)  # type: ignore[arg-type]
    assert torch.equal(own_text(model, num_sequences=1, sequence_length=4), first_NT)  # type: ignore[arg-type]
    assert len(writer.asked) == 1
    own_text(model, num_sequences=1, sequence_length=4, seed=1)  # type: ignore[arg-type]
    assert len(writer.asked) == 2
    (path,) = [path for path in cache_folder().iterdir() if "5, 6" in path.read_text()][:1]
    for damaged in ("", "{}", "[]", json.dumps(json.loads(path.read_text()) | {"ids": [[1, 1, 1, 1]]})):
        for kept in cache_folder().iterdir():
            kept.write_text(damaged)
        number = len(writer.asked)
        assert torch.equal(own_text(model, num_sequences=1, sequence_length=4), first_NT)  # type: ignore[arg-type]
        assert len(writer.asked) == number + 1
        assert ".json is damaged or cannot be read; the model writes it anew" in caplog.text
        caplog.clear()
        assert [kept.name for kept in cache_folder().iterdir() if kept.suffix != ".json"] == []
    with torch.no_grad():
        model.lm_head.weight[0] += 1  # type: ignore[index, operator, union-attr]
    number = len(writer.asked)
    own_text(model, num_sequences=1, sequence_length=4)  # type: ignore[arg-type]
    assert len(writer.asked) == number + 1


def test_a_cache_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "file"))
    model, _ = writing(monkeypatch, [[BEGIN, 5, 6, 7]])
    assert own_text(model, num_sequences=1, sequence_length=4).tolist() == [[BEGIN, 5, 6, 7]]  # type: ignore[arg-type]
    assert "the text is not kept for the next time" in caplog.text


def test_an_encoder_writes_nothing() -> None:
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ValueError, match="BertModel writes no text of its own; name a text with --data"):
        own_text(BertModel(config), num_sequences=1, sequence_length=4)
