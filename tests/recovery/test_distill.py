"""The distillation in a training step: the gradients of a plain loop, however a batch is cut, padded or masked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from lightning_prune.recovery.distill import Distill, Distiller
from lightning_prune.recovery.divergences import JensenShannon
from lightning_prune.recovery.matching import Attention, Cosine, Hidden, Relation, SquaredError
from lightning_prune.recovery.teacher import self_teacher
from tests.tiny_models import recompute_activations, tiny_family, tiny_llama, token_windows

IDS = token_windows(4)
LABELS = IDS.clone()
LABELS[0, :9] = -100
LABELS[2, 12:] = -100


def teacher(layers: int = 2) -> nn.Module:
    model = tiny_llama(seed=1, layers=layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return self_teacher(model)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def reference(student: PreTrainedModel, taught: nn.Module, ids: Tensor, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Return the mean of KL over the tokens that count, in plain torch."""
    counts = labels[:, 1:] != -100
    logits = student(input_ids=ids, **inputs).logits[:, :-1][counts]
    with torch.no_grad():
        soft = taught(input_ids=ids, **inputs).logits[:, :-1][counts].softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), soft, reduction="batchmean")


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("replace_loss", [True, False])
def test_loss_and_gradient_are_those_of_a_plain_loop(replace_loss: bool) -> None:
    student, taught = tiny_llama().train(), teacher()
    expected = reference(student, taught, IDS, LABELS)
    expected.backward()
    grads = gradients(student)
    distiller = Distiller(Distill(), teacher=taught)
    distiller.attach(student, replace_loss=replace_loss)
    if replace_loss:
        loss = student(input_ids=IDS, labels=LABELS).loss
    else:
        loss = distiller.loss(student(input_ids=IDS), LABELS)
    loss.backward()
    close(loss, expected)
    close(gradients(student), grads)
    assert distiller.metrics()["kd"] == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        ordinary = student(input_ids=IDS, labels=LABELS).loss
    assert distiller.metrics()["ce"] == pytest.approx(ordinary.item(), rel=1e-5)
    distiller.detach()
    close(student.train()(input_ids=IDS, labels=LABELS).loss, ordinary)


@pytest.mark.parametrize(
    "options",
    [
        Distill(ce_weight=0.5, temperature=2.0, squared_temperature=True),
        Distill(loss=JensenShannon(), top_k=8),
        Distill(hidden=Hidden(distance=Relation(), weight=0.3), attention=Attention(weight=2.0)),
    ],
    ids=["mixed", "top_k", "layers"],
)
def test_accumulated_gradients_are_those_of_one_large_batch(options: Distill) -> None:
    student = tiny_llama().train()
    student.set_attn_implementation("eager")
    taught = teacher(layers=3)
    taught.set_attn_implementation("eager")  # type: ignore[operator]
    distiller = Distiller(options, teacher=taught)
    distiller.attach(student, replace_loss=False)
    loss = distiller.loss(student(input_ids=IDS), LABELS)
    loss.backward()
    grads = gradients(student)
    num_items = (LABELS[:, 1:] != -100).sum()
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        outputs = student(input_ids=IDS[rows])
        parts.append(distiller.loss(outputs, LABELS[rows], num_items_in_batch=num_items))
        parts[-1].backward()
    close(parts[0] + parts[1], loss)
    close(gradients(student), grads)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left: bool, tmp_path: Path) -> None:
    layers = Hidden(distance=Relation(), weight=1.0)
    for options in (Distill(hidden=layers), Distill(top_k=8, cache_dir=str(tmp_path))):
        student = tiny_llama().train()
        distiller = Distiller(options, teacher=teacher())
        distiller.attach(student, replace_loss=True)
        expected = student(input_ids=IDS, labels=LABELS).loss
        expected.backward()
        grads = gradients(student)
        ends = (5, 0) if left else (0, 5)
        loss = student(
            input_ids=functional.pad(IDS, ends),
            attention_mask=functional.pad(torch.ones_like(IDS), ends),
            labels=functional.pad(LABELS, ends, value=-100),
        ).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-3 if options.cache_dir else 1e-5)
        torch.testing.assert_close(gradients(student), grads, atol=1e-5, rtol=1e-3)


def test_evaluation_gives_the_ordinary_cross_entropy() -> None:
    student = tiny_llama().eval()
    distiller = Distiller(Distill(), teacher=teacher())
    expected = student(input_ids=IDS, labels=LABELS).loss
    distiller.attach(student, replace_loss=True)
    with torch.no_grad():
        close(student(input_ids=IDS, labels=LABELS).loss, expected)
        close(distiller.loss(student(input_ids=IDS), LABELS), expected)
        close(
            distiller.loss(student(input_ids=IDS), LABELS, num_items_in_batch=7),
            student(input_ids=IDS, labels=LABELS, num_items_in_batch=7).loss,
        )
    close(distiller.loss(student(input_ids=IDS), LABELS), expected)


def test_a_model_that_is_trained_in_evaluation_mode_learns_from_the_teacher() -> None:
    student, taught = tiny_llama().eval(), teacher()
    distiller = Distiller(Distill(), teacher=taught)
    distiller.attach(student, replace_loss=True)
    assert student(input_ids=IDS).logits.requires_grad  # a call without labels is left alone
    loss = student(input_ids=IDS, labels=LABELS).loss
    distiller.detach()
    close(loss, reference(student, taught, IDS, LABELS))


# What a trainer gives the loss when a whole optimizer step has nothing to learn: no count, none, or one micro-batch.
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), torch.tensor(7)])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_batch_without_a_counted_label_gives_zero_loss_and_zero_gradient(num_items: Any, is_bf16: bool) -> None:
    student = tiny_llama().train()
    student.set_attn_implementation("eager")
    taught = teacher()
    taught.set_attn_implementation("eager")  # type: ignore[operator]
    nothing = torch.full_like(IDS, -100)
    for options in (
        Distill(ce_weight=1.0, loss=JensenShannon(), temperature=2.0),
        Distill(top_k=8, hidden=Hidden(distance=Relation()), attention=Attention()),
        Distill(hidden=Hidden(embeddings=True), attention=Attention(weight=0.5)),
    ):
        distiller = Distiller(options, teacher=taught)
        distiller.attach(student, replace_loss=False, label_smoothing=0.1 if options.ce_weight else 0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            loss = distiller.loss(student(input_ids=IDS), nothing, num_items_in_batch=num_items)
        loss.backward()
        assert loss.item() == 0
        assert all(not grad.any() for grad in gradients(student))  # NaN would be true
        assert set(distiller.metrics().values()) == {0.0}
        distiller.check_taught()
        distiller.detach()


def test_label_smoothing_is_that_of_transformers() -> None:
    student, taught = tiny_llama().train(), teacher()
    smoother = LabelSmoother(epsilon=0.3)
    output = student(input_ids=IDS)
    expected = reference(student, taught, IDS, LABELS) + 0.5 * smoother(output, LABELS, shift_labels=True)
    expected.backward()
    grads = gradients(student)
    distiller = Distiller(Distill(ce_weight=0.5), teacher=taught)
    distiller.attach(student, replace_loss=False, label_smoothing=0.3)
    loss = distiller.loss(student(input_ids=IDS), LABELS)
    loss.backward()
    close(loss, expected)
    close(gradients(student), grads)
    with torch.no_grad():
        smoothed = distiller.loss(student(input_ids=IDS), LABELS)
    close(smoothed, smoother(output, LABELS, shift_labels=True).detach())
    with pytest.raises(ValueError, match=r"distill.ce_weight 0 leaves them out of the loss; set distill.ce_weight"):
        Distiller(Distill(), teacher=taught).attach(student, replace_loss=False, label_smoothing=0.1)


@pytest.mark.parametrize("label", [-1, 64, 1000])
def test_a_label_outside_the_vocabulary_is_named(label: int) -> None:
    student = tiny_llama().train()
    labels = LABELS.clone()
    labels[1, 3] = label
    distiller = Distiller(Distill(), teacher=teacher())
    distiller.attach(student, replace_loss=True)
    with pytest.raises(ValueError, match=rf"a label is {label}, but 64 tokens are compared, so it must be 0 to 63"):
        student(input_ids=IDS, labels=labels)
    with pytest.raises(ValueError, match=rf"a label is {label}"), torch.no_grad():
        distiller.loss(student(input_ids=IDS), labels)


def test_a_loss_that_is_not_trained_on_is_an_error_after_the_first_step() -> None:
    student = tiny_llama().train()
    distiller = Distiller(Distill(), teacher=teacher())
    distiller.attach(student, replace_loss=True)
    output = student(input_ids=IDS, labels=LABELS)
    output.logits.sum().backward()  # a loss of the program's own
    with pytest.raises(ValueError, match=r"recover.distill changes nothing in this training"):
        distiller.check_taught()
    student(input_ids=IDS, labels=LABELS).loss.backward()
    distiller.check_taught()
    distiller.attach(student, replace_loss=True)  # another training begins
    with pytest.raises(ValueError, match=r"recover.distill changes nothing in this training"):
        distiller.check_taught()


def test_a_classifier_and_a_student_that_is_its_own_teacher_are_refused() -> None:
    student = tiny_llama().train()
    for name in ("LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForQuestionAnswering"):
        model = getattr(transformers, name)(student.config)
        with pytest.raises(ValueError, match=rf"{name} is no language model .* recover it without distill"):
            attached(Distill(), model)
    with pytest.raises(ValueError, match="the teacher shares weights with the student"):
        attached(Distill(), student, student)
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(ValueError, match=r"the labels have shape \(4,\)"):
        attached(Distill(), student).loss(student(input_ids=IDS), LABELS[:, 0])


def test_shifted_labels_are_taken_as_they_are() -> None:
    student = tiny_llama().train()
    distiller = Distiller(Distill(), teacher=teacher())
    distiller.attach(student, replace_loss=True)
    shifted = functional.pad(LABELS[:, 1:], (0, 1), value=-100)
    expected = student(input_ids=IDS, labels=LABELS).loss
    close(student(input_ids=IDS, labels=LABELS, shift_labels=shifted).loss, expected)


def test_hidden_states_pull_by_their_weight_and_balanced_makes_them_as_large_as_the_divergence() -> None:
    student, taught = tiny_llama().train(), teacher(layers=4)
    hidden = Hidden(distance=Cosine(), layers=((0, 2),), weight=0.25)
    distiller = Distiller(Distill(hidden=hidden), teacher=taught)
    distiller.attach(student, replace_loss=True)
    loss = student(input_ids=IDS, labels=LABELS).loss
    distiller.detach()
    counts = functional.pad(LABELS[:, 1:], (0, 1), value=-100) != -100
    own = student(input_ids=IDS, output_hidden_states=True).hidden_states[1][counts]
    others = taught(input_ids=IDS, output_hidden_states=True).hidden_states[3][counts]
    distance = 1 - functional.cosine_similarity(own, others, dim=-1).mean()
    close(loss, reference(student, taught, IDS, LABELS) + 0.25 * distance)
    balanced = Distiller(Distill(hidden=Hidden(layers=((0, 2),))), teacher=taught)
    balanced.attach(student, replace_loss=True)
    student(input_ids=IDS, labels=LABELS).loss.backward()
    values = balanced.metrics()
    assert values["hidden"] == pytest.approx(distance.item(), rel=1e-5)
    assert values["loss"] == pytest.approx(2 * values["kd"], rel=1e-5)


def test_a_student_equal_to_its_teacher_stays() -> None:
    student = tiny_llama().train()
    distiller = Distiller(Distill(hidden=Hidden(distance=SquaredError())), teacher=self_teacher(student))
    distiller.attach(student, replace_loss=True)
    loss = student(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    assert loss.abs().item() < 1e-6
    assert max(grad.abs().max().item() for grad in gradients(student)) < 1e-6


def test_the_teacher_runs_once_per_step_under_checkpointing_and_not_at_all_when_cached(tmp_path: Path) -> None:
    taught = teacher()
    runs: list[int] = []
    taught.register_forward_hook(lambda *_: runs.append(1))

    def losses(options: Distill) -> Iterator[Tensor]:
        student = tiny_llama().train()
        distiller = Distiller(options, teacher=taught)
        distiller.attach(student, replace_loss=True)
        for checkpoints in (False, True):
            if checkpoints:
                recompute_activations(student, use_reentrant=False)
            loss = student(input_ids=IDS, labels=LABELS, use_cache=False).loss
            loss.backward()
            yield loss.detach()
            yield torch.cat([grad.flatten() for grad in gradients(student)])

    first, grads, again, grads_again = losses(Distill(hidden=Hidden(weight=1.0)))
    close((again, grads_again), (first, grads))
    assert len(runs) == 2
    list(losses(Distill(top_k=8, cache_dir=str(tmp_path))))
    assert len(runs) == 3


def test_bf16_autocast_changes_the_student_alone() -> None:
    student, taught = tiny_llama().train(), teacher()
    distiller = Distiller(Distill(), teacher=taught)
    distiller.attach(student, replace_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(input_ids=IDS, labels=LABELS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distiller.detach()
        logits = student(input_ids=IDS).logits.float()
    counts = LABELS[:, 1:] != -100
    soft = taught(input_ids=IDS).logits[:, :-1][counts].softmax(-1)
    close(loss, functional.kl_div(logits[:, :-1][counts].log_softmax(-1), soft, reduction="batchmean"))
    loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(student))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3_moe", "t5", "bert"])
def test_other_architectures(family: str) -> None:
    student = tiny_family(family).train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    taught = self_teacher(student)
    with torch.no_grad():
        for parameter in taught.parameters():
            parameter.mul_(1.5)
    distiller = Distiller(Distill(), teacher=taught)
    distiller.attach(student, replace_loss=True)
    loss = student(input_ids=IDS, labels=LABELS).loss
    distiller.detach()
    shift = family not in ("t5", "bert")
    counts = LABELS[:, 1:] != -100 if shift else LABELS != -100
    own, others = (model(input_ids=IDS, labels=LABELS).logits for model in (student.eval(), taught))
    own, others = (own[:, :-1], others[:, :-1]) if shift else (own, others)
    expected = functional.kl_div(own[counts].log_softmax(-1), others[counts].softmax(-1), reduction="batchmean")
    close(loss, expected.detach().requires_grad_() * 1)


def test_what_a_mixture_of_experts_adds_to_balance_its_experts_stays() -> None:
    student = tiny_family("qwen3_moe").train()
    distiller = Distiller(Distill(), teacher=self_teacher(student))
    distiller.attach(student, replace_loss=True)
    output = student(input_ids=IDS, labels=LABELS, output_router_logits=True)
    assert output.loss.item() == pytest.approx(student.config.router_aux_loss_coef * output.aux_loss.item(), rel=1e-4)


def test_texts_packed_into_a_row_relate_to_themselves_alone() -> None:
    student = tiny_llama().train()
    distiller = Distiller(Distill(hidden=Hidden(distance=Relation(), weight=1.0)), teacher=teacher())
    distiller.attach(student, replace_loss=True)
    expected = student(input_ids=IDS[:2], labels=LABELS[:2]).loss
    labels = LABELS[:2].clone()
    labels[:, 0] = -100
    packed = student(
        input_ids=IDS[:2].reshape(1, -1),
        labels=labels.reshape(1, -1),
        position_ids=torch.arange(16).repeat(2)[None],
        use_cache=False,
    ).loss
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"squared_temperature": True}, "no effect at temperature 1"),
        ({"ce_weight": -1.0}, "ce_weight must be 0 or more"),
        ({"top_k": 0}, "top_k must be 1 or more"),
        ({"cache_dir": "x"}, "set distill.top_k"),
        ({"cache_dir": "x", "top_k": 4, "hidden": Hidden()}, "leave out one"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distill(**options)


def attached(options: Distill, model: nn.Module, taught: nn.Module | None = None) -> Distiller:
    distiller = Distiller(options, teacher=taught or teacher())
    distiller.attach(model, replace_loss=False)
    return distiller


def test_a_term_that_no_gradient_reaches_is_refused() -> None:
    student = tiny_llama(tied=False).train().requires_grad_(False)
    student.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"distill.hidden would teach nothing"):
        attached(Distill(hidden=Hidden()), student).loss(student(input_ids=IDS), LABELS)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("missing", [[0], [1], [0, 1, 2]])
def test_hidden_states_that_are_missing_in_part_are_refused(side: str, missing: list[int]) -> None:
    def without(module: nn.Module, args: object, output: Any) -> Any:
        states = list(output.hidden_states)
        output.hidden_states = tuple(None if index in missing else state for index, state in enumerate(states))
        return output

    student, taught = tiny_llama().train(), teacher()
    (student if side == "student" else taught).register_forward_hook(without)
    distiller = attached(Distill(hidden=Hidden()), student, taught)
    with pytest.raises(ValueError, match=rf"the {side} returns no hidden_states; leave out distill.hidden"):
        distiller.loss(student(input_ids=IDS), LABELS)


def test_a_teacher_in_bfloat16_teaches_what_its_rounded_logits_say() -> None:
    student, taught = tiny_llama().train(), teacher().to(torch.bfloat16)
    distiller = attached(Distill(hidden=Hidden(weight=0.5, distance=SquaredError())), student, taught)
    loss = distiller.loss(student(input_ids=IDS), LABELS)
    loss.backward()
    with torch.no_grad():
        others = taught(input_ids=IDS).logits.float()
    own = student(input_ids=IDS).logits
    counts = LABELS[:, 1:] != -100
    log_q, p = own[:, :-1][counts].log_softmax(-1), others[:, :-1][counts].softmax(-1)
    expected = functional.kl_div(log_q, p, reduction="batchmean").item()
    assert distiller.metrics()["kd"] == pytest.approx(expected, rel=1e-5)
    assert all(grad.isfinite().all() for grad in gradients(student))


def test_a_teacher_with_a_padded_head_teaches_over_the_tokens_they_share(tmp_path: Path) -> None:
    student, taught = tiny_llama().train(), tiny_llama(seed=1)
    expected = reference(student, taught, IDS, LABELS)
    taught.resize_token_embeddings(72)
    for options in (
        Distill(num_tokens=64),
        Distill(num_tokens=64, top_k=63),
        Distill(num_tokens=64, top_k=63, cache_dir=str(tmp_path)),
    ):
        for _ in range(2 if options.cache_dir else 1):  # from the teacher, then from the disk
            loss = attached(options, student, taught).loss(student(input_ids=IDS), LABELS)
            torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-3 if options.cache_dir else 1e-5)
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 72 tokens, the student of 64"):
        attached(Distill(), student, taught).loss(student(input_ids=IDS), LABELS)


def test_models_that_do_not_fit_are_refused() -> None:
    student = tiny_llama().train()
    with pytest.raises(ValueError, match="returned BaseModelOutputWithPast without them"):
        attached(Distill(), student.model).loss(student.model(input_ids=IDS), LABELS)
    with pytest.raises(ValueError, match="the student returns no attentions; load it with attn_implementation='eager'"):
        attached(Distill(attention=Attention()), student).loss(student(input_ids=IDS), LABELS)
    with pytest.raises(ValueError, match="for an encoder-decoder distill logits alone"):
        attached(Distill(hidden=Hidden()), tiny_family("t5"))
    with pytest.raises(ValueError, match=r"drops entries of it in training \(attn_pdrop 0.1\)"):
        attached(Distill(attention=Attention()), tiny_family("gpt2"))
    with pytest.raises(ValueError, match="was not called with gradients"):
        attached(Distill(), student).loss(None, LABELS)
    distiller = attached(Distill(), student)
    with pytest.raises(ValueError, match="distillation needs labels"):
        distiller.loss(student(input_ids=IDS), None)
    with pytest.raises(ValueError, match="one row of logits per label"):
        distiller.loss(student(input_ids=IDS, logits_to_keep=3), LABELS)
    distiller.detach()
    with pytest.raises(ValueError, match="not attached to a model"):
        distiller.loss(None, LABELS)
    student.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="teacher has a vocabulary of 64 tokens, the student of 70"):
        attached(Distill(), student).loss(student(input_ids=IDS), LABELS)
