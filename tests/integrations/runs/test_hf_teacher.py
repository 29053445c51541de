"""A teacher from a folder: its dtype, its tokens, its identity, and when it is opened."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaForSequenceClassification, LlamaModel, PreTrainedTokenizerFast

from lightning_prune.integrations.runs import hf_teacher
from lightning_prune.integrations.runs.hf_teacher import distiller_of, offloaded, open_teacher, teacher_id
from lightning_prune.recovery.distill import Distill, Distiller
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


def test_a_masked_language_model_is_loaded_as_one(tmp_path: Path) -> None:
    tiny_family("bert").save_pretrained(tmp_path)
    assert type(opened(tmp_path, student_tokenizer=None)).__name__ == "BertForMaskedLM"


def brings_code(folder: Path) -> None:
    """Make a folder whose model only its own code opens, as one with blocks of different shapes is."""
    config = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise AssertionError('code of a teacher was run')")


def is_a_classifier(folder: Path) -> None:
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(folder)


def lacks_its_head(folder: Path) -> None:
    LlamaModel(tiny_llama(tied=False).config).save_pretrained(folder)


def is_cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tiny_llama().save_pretrained(folder)
    weights.write_bytes(weights.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (brings_code, r"comes with code of its own, which a recipe never runs .* name a model that stock Transformers"),
        (is_a_classifier, r"is a LlamaForSequenceClassification, which gives no logits over tokens; name a language"),
        (lacks_its_head, r"holds no weights for lm_head.weight \(1 tensors in all\), which LlamaForCausalLM needs"),
        (is_cut_off, r"cannot be opened: "),
        (lambda folder: None, r"cannot be opened: .* recover.distill.teacher is self, a folder that holds a model"),
    ],
    ids=["code", "classifier", "no head", "cut off", "empty"],
)
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_folder_that_cannot_teach_is_refused_at_start_in_one_line(
    make: Callable[[Path], None], message: str, is_cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question))
    make(tmp_path)
    cache = {"top_k": 8, "cache_dir": str(tmp_path / "cache")} if is_cached else {}
    options = Distill(teacher=str(tmp_path), **cache)  # type: ignore[arg-type]
    if is_cached and make in (lacks_its_head, is_cut_off):
        pytest.skip("weights are read when a text is not in the cache")
    with pytest.raises(ValueError, match=message) as caught:
        distiller_of(options, copied=None, student_tokenizer=None, device=CPU)
    assert not asked
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_the_tokenizer_of_a_processor_is_compared_and_one_without_words_is_not(folder: Path) -> None:
    processor = SimpleNamespace(tokenizer=tokenizer(swapped=True))
    with pytest.raises(ValueError, match="2 tokens have different ids"):
        opened(folder, student_tokenizer=processor)
    assert opened(folder, student_tokenizer=SimpleNamespace(size=224)).config.vocab_size == VOCAB


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


def test_an_offloaded_teacher_says_the_same_and_holds_no_weight_between_its_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hf_teacher, "_check_offload", lambda device: None)  # the processor stands for an accelerator
    student, taught = tiny_llama().train(), tiny_llama(seed=1)
    plain = Distiller(Distill(), teacher=self_teacher(taught))
    plain.attach(student, replace_loss=True)
    expected = student(input_ids=token_windows(2), labels=token_windows(2)).loss
    plain.detach()
    copied = self_teacher(taught)
    for _ in range(2):  # the second is that of a training that goes on
        distiller = distiller_of(Distill(offload=True), copied=copied, student_tokenizer=None, device=CPU)
        distiller.attach(student, replace_loss=True)
        assert {parameter.device.type for parameter in copied.parameters()} == {"meta"}
        loss = student(input_ids=token_windows(2), labels=token_windows(2)).loss
        torch.testing.assert_close(loss, expected)
        distiller.detach()
    distiller.attach(student, replace_loss=True)
    for _ in range(2):
        assert {parameter.device.type for parameter in copied.parameters()} == {"meta"}
        loss = student(input_ids=token_windows(2), labels=token_windows(2)).loss
        torch.testing.assert_close(loss, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_an_offloaded_teacher_says_the_same_on_an_accelerator(folder: Path) -> None:
    device, ids = torch.device("cuda"), token_windows(2).cuda()
    student = tiny_llama().to(device).train()
    losses = []
    for offload in (False, True):
        options = Distill(teacher=str(folder), offload=offload)
        distiller = distiller_of(options, copied=None, student_tokenizer=None, device=device)
        distiller.attach(student, replace_loss=True)
        losses.append(student(input_ids=ids, labels=ids).loss)
        distiller.detach()
    torch.testing.assert_close(losses[1], losses[0])


def test_identity_follows_every_byte_of_the_weights_and_the_configuration(folder: Path) -> None:
    first = teacher_id(str(folder))
    assert teacher_id(str(folder)) == first
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    second = teacher_id(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert len({first, second, teacher_id(str(folder))}) == 3


def test_a_hub_id_without_a_commit_cannot_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_teacher, "check_teacher", lambda path: SimpleNamespace(_commit_hash=None))
    with pytest.raises(ValueError, match=r"'some/model' from another, .* or set distill.cache_dir: null"):
        teacher_id("some/model")
    monkeypatch.setattr(hf_teacher, "check_teacher", lambda path: SimpleNamespace(_commit_hash="abc"))
    assert teacher_id("some/model") == "some/model@abc"


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
    with pytest.raises(ValueError, match="let go of when the training has ended"):
        distiller_of(Distill(), copied=None, student_tokenizer=None, device=CPU)
