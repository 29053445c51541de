"""A teacher from a folder: its dtype, its tokens, its identity, and when it is opened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lightning_prune.integrations import hf_teacher
from lightning_prune.integrations.hf_teacher import distiller_of, offloaded, open_teacher, teacher_id
from lightning_prune.recovery.distill import Distill
from lightning_prune.recovery.teacher import self_teacher
from tests.tiny_models import VOCAB, tiny_family, tiny_llama, token_windows

CPU = torch.device("cpu")


def tokenizer(*, swapped: bool = False, extra: bool = False) -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCAB - 1 + extra)}
    if swapped:
        words["w3"], words["w4"] = 4, 3
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def opened(folder: Path, **changed: Any) -> Any:
    options: dict[str, Any] = {"dtype": None, "device": CPU, "offload": False, "student_tokenizer": tokenizer()}
    return open_teacher(str(folder), **(options | changed))


def test_it_is_loaded_frozen_and_in_the_dtype_asked_for(folder: Path) -> None:
    teacher = opened(folder)
    expected = tiny_llama(seed=1).eval()(input_ids=token_windows(2)).logits
    torch.testing.assert_close(teacher(input_ids=token_windows(2)).logits, expected.detach())
    assert not teacher.training
    assert {parameter.dtype for parameter in opened(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_an_encoder_decoder_is_loaded_as_one(tmp_path: Path) -> None:
    tiny_family("t5").save_pretrained(tmp_path)
    assert type(opened(tmp_path, student_tokenizer=None)).__name__ == "T5ForConditionalGeneration"


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"2 tokens have different ids .* 'w3' \(4 / 3\), 'w4' \(3 / 4\); take a teacher"
    ):
        opened(folder, student_tokenizer=tokenizer(swapped=True))
    with pytest.raises(
        ValueError, match=r"1 tokens have different ids or exist on one side only, .* 'w63' \(63 / None\)"
    ):
        opened(folder, student_tokenizer=tokenizer(extra=True))
    tiny_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer to compare"):
        opened(tmp_path / "bare")


def test_offloading_from_the_cpu_to_the_cpu_is_refused(folder: Path) -> None:
    message = "keeps the teacher's weights on the CPU, where this run trains anyway; set offload: false"
    with pytest.raises(ValueError, match=message):
        offloaded(tiny_llama(), device=CPU)
    with pytest.raises(ValueError, match=message):
        distiller_of(Distill(teacher=str(folder), offload=True), copied=None, student_tokenizer=None, device=CPU)


def test_an_offloaded_teacher_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_teacher, "_check_offload", lambda device: None)
    student = tiny_llama().train()
    distiller = distiller_of(Distill(offload=True), copied=self_teacher(student), student_tokenizer=None, device=CPU)
    distiller.attach(student, replace_loss=True)
    for _ in range(2):
        loss = student(input_ids=token_windows(2), labels=token_windows(2)).loss
        assert loss.abs().item() < 1e-6


def test_identity_follows_the_weights(folder: Path) -> None:
    first = teacher_id(str(folder))
    assert teacher_id(str(folder)) == first
    tiny_llama(seed=2).save_pretrained(folder)
    assert teacher_id(str(folder)) != first


def test_a_teacher_whose_logits_are_all_cached_is_never_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Distill(teacher=str(folder), top_k=8, cache_dir=str(tmp_path / "cache"))

    def loss() -> float:
        student = tiny_llama().train()
        distiller = distiller_of(options, copied=None, student_tokenizer=tokenizer(), device=CPU)
        distiller.attach(student, replace_loss=True)
        return student(input_ids=token_windows(2), labels=token_windows(2)).loss.item()

    first = loss()
    monkeypatch.setattr(hf_teacher, "AutoModelForCausalLM", None)
    monkeypatch.setattr(hf_teacher, "check_tokenizers", None)
    assert loss() == pytest.approx(first, rel=1e-3)


def test_a_self_teacher_is_the_copy_that_was_made() -> None:
    student = tiny_llama().train()
    copied = self_teacher(student)
    distiller = distiller_of(Distill(), copied=copied, student_tokenizer=None, device=CPU)
    distiller.attach(student, replace_loss=True)
    assert student(input_ids=token_windows(2), labels=token_windows(2)).loss.abs().item() < 1e-6
    with pytest.raises(ValueError, match="needs a copy of the model from before pruning"):
        distiller_of(Distill(), copied=None, student_tokenizer=None, device=CPU)
