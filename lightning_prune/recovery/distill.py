"""Train a pruned model on what a teacher says, inside the user's own loop.

The teacher is usually the model before pruning. Best alone: KL on logits at temperature 1 without cross-entropy; hidden
states help where many layers were cut.

Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, arXiv 2407.14679, section
    3; Sreenivas et al., LLM Pruning and Distillation in Practice, arXiv 2408.11796; the mixture with cross-entropy and
    the squared temperature, AST, arXiv 2407.20584.
Cost: a forward pass of the teacher per step, or its top-k logits on disk; one gradient of the size of the logits.
Tokens that count: those with a label, as for cross-entropy, but never padding.
Limits: encoder-decoders by logits alone. A loss that the caller sums over several calls of the model per step is taken
    call by call.

Shapes: B sequences, T tokens, S the same tokens as keys, N = B * T, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.recovery.distill_options import Distill
from lightning_prune.recovery.matching import Tokens
from lightning_prune.recovery.student_call import StudentCall, StudentCalls
from lightning_prune.recovery.teacher import Teacher
from lightning_prune.recovery.teacher_targets import TeacherTargets, logits_of
from lightning_prune.recovery.token_loss import IGNORED, cross_entropy_sum

__all__ = ["Distill", "Distiller"]

# What Transformers calls the losses over tokens of a vocabulary.
_LANGUAGE_LOSSES = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")


class Distiller:
    """Gives the loss of a distillation, either as a function that a trainer calls or as the model's own loss.

    Args:
        options: what to learn.
        teacher: the model, or what opens it, called on first need only. It must not be part of the student.
        teacher_id: tells this teacher from others in a cache; None takes a fingerprint of its weights.
        is_placed: whether the teacher cares for its devices itself, as an offloaded one does.
        rank: of this process, for its own files in the cache.
    """

    def __init__(
        self,
        options: Distill,
        *,
        teacher: nn.Module | Callable[[], nn.Module],
        teacher_id: str | None = None,
        is_placed: bool = False,
        rank: int = 0,
    ) -> None:
        self.options = options
        source = Teacher(teacher, dtype=options.teacher_dtype, is_placed=is_placed)
        self._teacher = source
        self._targets = TeacherTargets(options, source, teacher_id=teacher_id, rank=rank)
        self._token_loss = options.token_loss
        self._label_smoothing = 0.0
        self._num_taught = 0
        self._calls: StudentCalls | None = None
        self._model: nn.Module | None = None
        self._shifts = True
        self._means: dict[str, Tensor] = {}

    def attach(
        self,
        model: nn.Module,
        *,
        replace_loss: bool,
        shifts_labels: bool | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        """Set hooks on the student; attaching again detaches first.

        Args:
            model: the language model inside the trainer; not wrapped in DDP.
            replace_loss: put the loss into the model's output in training calls with labels. If false, the trainer
                calls `loss`.
            shifts_labels: whether a token's label is the next token. None decides by the model: not for
                encoder-decoders and masked language models.
            label_smoothing: of the trainer, for the cross-entropy, in [0, 1].

        Raises:
            ValueError: if an option does not fit this kind of model, or it is the teacher.
        """
        self.detach()
        self._teacher.check_apart(model)
        _check_speaks(model)
        self._take_smoothing(label_smoothing)
        config = getattr(model, "config", None)
        is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        if is_encoder_decoder and (self.options.wanted or self.options.cache_dir):
            raise ValueError(
                "hidden, attention and cache_dir work for decoders; for an encoder-decoder distill logits alone"
            )
        _check_attention_dropout(config, self.options)
        # Transformers names the loss of a class so; there is no other mark of a masked language model.
        is_masked = getattr(model, "loss_type", None) == "ForMaskedLM"
        self._shifts = not (is_encoder_decoder or is_masked) if shifts_labels is None else shifts_labels
        self._model, self._num_taught = model, 0
        self._calls = StudentCalls(
            model, wanted=self.options.wanted, replace_loss=self._loss_of_call if replace_loss else None
        )

    def _take_smoothing(self, label_smoothing: float) -> None:
        if label_smoothing and not self.options.ce_weight:
            raise ValueError(
                f"label smoothing ({label_smoothing}) softens the labels, but distill.ce_weight 0 leaves them out of "
                "the loss; set distill.ce_weight above 0, or label_smoothing_factor to 0"
            )
        self._label_smoothing = label_smoothing
        self._token_loss = dataclasses.replace(self.options.token_loss, label_smoothing=label_smoothing)

    def check_taught(self) -> None:
        """Check that the student has learned something; to be called after its first optimizer step.

        Raises:
            ValueError: if no gradient of the distillation's loss was taken since it was attached.
        """
        if not self._num_taught:
            raise ValueError(
                "recover.distill changes nothing in this training: an optimizer step was taken, but not the gradient "
                "of the distillation's loss, because the trainer makes a loss of its own (as those for preferences and "
                "rewards do, or a training_step that does not use output.loss); train with the model's own loss "
                "(Trainer, SFTTrainer, output.loss), or leave out recover.distill"
            )

    def detach(self) -> None:
        """Take the hooks off the student; harmless when there are none."""
        if self._calls is not None:
            self._calls.remove()
        self._calls = self._model = None

    def loss(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of the model's last call, as Transformers' `compute_loss_func`.

        In evaluation mode or without gradients it is the ordinary cross-entropy, so that it stays comparable.

        Args:
            outputs: of the student.
            labels: token ids, -100 where a token does not count.
            num_items_in_batch: what the sum over tokens is divided by; None divides by the tokens that count.

        Raises:
            ValueError: if there are no labels, no logits or no call of the model, or teacher and student do not fit.
        """
        if self._calls is None or self._model is None:
            raise ValueError("the distillation is not attached to a model; call attach(model, replace_loss=False)")
        if self._model.training and torch.is_grad_enabled():
            call = self._calls.take()
            call.labels, call.num_items = labels, num_items_in_batch
            return self._loss_of_call(call, outputs)
        logits_NV = logits_of(outputs).flatten(0, -2)
        labels_N = self._next_labels(labels, self._calls.shift_labels).to(logits_NV.device).flatten()
        total = cross_entropy_sum(logits_NV, labels_N, label_smoothing=self._label_smoothing)
        return total / _divisor(num_items_in_batch, labels_N != IGNORED)

    def metrics(self) -> dict[str, float]:
        """Return the terms of the last training call, each per token that counted: kd, ce, hidden, attention, loss."""
        return {name: float(value) for name, value in self._means.items()}

    def _loss_of_call(self, call: StudentCall, outputs: Any) -> Tensor:
        logits_BTV = logits_of(outputs)
        labels_BT = self._next_labels(call.labels, call.shift_labels).to(logits_BTV.device)
        if labels_BT.shape != logits_BTV.shape[:-1] or labels_BT.ndim != 2:
            raise ValueError(
                f"the labels have shape {tuple(labels_BT.shape)}, the logits {tuple(logits_BTV.shape)}; distillation "
                "needs one row of logits per label (no logits_to_keep, no virtual tokens)"
            )
        is_padding_BT = _padding(call)
        if is_padding_BT is not None and is_padding_BT.shape == labels_BT.shape:
            labels_BT = labels_BT.masked_fill(is_padding_BT.to(labels_BT.device), IGNORED)
        with torch.autocast(logits_BTV.device.type, enabled=False):
            targets, taught = self._targets(call.inputs, logits_BTV)
            total, kd, ce = self._token_loss(logits_BTV.flatten(0, 1), targets, labels_BT.flatten())
            sums = {"kd": kd, "ce": ce}
            for name, term in self._further_terms(call, taught, labels_BT).items():
                sums[name] = term.detach()
                total = total + self._weight(name, kd, sums[name]) * term
            sums["loss"] = total.detach()
            counts_BT = labels_BT != IGNORED
            num_counting = counts_BT.sum().clamp_min(1)
            self._means = {name: value / num_counting for name, value in sums.items()}
            loss = total / _divisor(call.num_items, counts_BT) + _router_loss(self._model, outputs)
        if loss.requires_grad:
            loss.register_hook(self._count)
        return loss

    def _count(self, grad: Tensor) -> None:
        self._num_taught += 1

    def _next_labels(self, labels_BT: Tensor | None, shift_labels_BT: Tensor | None) -> Tensor:
        """Return the label of each row of logits."""
        if shift_labels_BT is not None:
            return shift_labels_BT
        if labels_BT is None:
            raise ValueError("distillation needs labels: they say which tokens count (-100 where one does not)")
        return nn.functional.pad(labels_BT[..., 1:], (0, 1), value=IGNORED) if self._shifts else labels_BT

    def _further_terms(self, call: StudentCall, taught: Any, labels_BT: Tensor) -> dict[str, Tensor]:
        """Return the sums on hidden states and attention, by name."""
        options = {"hidden": self.options.hidden, "attention": self.options.attention}
        outputs = {"hidden": "hidden_states", "attention": "attentions"}
        tokens = _tokens(call, labels_BT) if self.options.wanted else None
        terms = {}
        for name, term in options.items():
            if term is not None:
                assert tokens is not None
                student = _layers(call.outputs.get(outputs[name]), outputs[name], "student")
                teacher = _layers(taught.get(outputs[name]), outputs[name], "teacher")
                terms[name] = term.loss(student, teacher, tokens)
                if not terms[name].requires_grad:
                    raise ValueError(
                        f"distill.{name} would teach nothing, since no gradient reaches it: train layers before it, "
                        "and checkpoint activations with use_reentrant=False"
                    )
        return terms

    def _weight(self, name: str, kd: Tensor, term: Tensor) -> Tensor | float:
        """Return what a term is multiplied with: a number, or what makes it as large as the divergence."""
        term_options = self.options.hidden if name == "hidden" else self.options.attention
        assert term_options is not None
        if term_options.weight != "balanced":
            return term_options.weight
        return torch.where(term > 0, self._token_loss.scale * kd / term, 0.0)


def _padding(call: StudentCall) -> Tensor | None:
    """Return where there is padding, of a decoder. With padding on the left, it would be asked for the first token."""
    mask = call.inputs.get("attention_mask")
    is_decoder = call.inputs.get("decoder_input_ids") is None
    return mask == 0 if isinstance(mask, Tensor) and mask.ndim == 2 and is_decoder else None


def _tokens(call: StudentCall, labels_BT: Tensor) -> Tokens:
    """Return which tokens count, and which stand in the same text."""
    is_padding_BT, positions = _padding(call), call.inputs.get("position_ids")
    is_key_BT = torch.ones_like(labels_BT, dtype=torch.bool) if is_padding_BT is None else ~is_padding_BT
    keys_BTS = is_key_BT[:, None, :].expand(-1, labels_BT.shape[1], -1)
    if isinstance(positions, Tensor) and positions.ndim == 2:
        text_BT = (positions == 0).expand_as(labels_BT).cumsum(1)
        keys_BTS = keys_BTS & (text_BT[:, :, None] == text_BT[:, None, :])
    return Tokens(labels_BT != IGNORED, keys_BTS)


def _layers(outputs: Any, name: str, side: str) -> Sequence[Tensor]:
    """Return one tensor per layer."""
    layers = [] if outputs is None else list(outputs)
    if not layers or any(not isinstance(layer, Tensor) for layer in layers):
        do = (
            "load it with attn_implementation='eager', since other kernels never form attention"
            if name == "attentions"
            else "leave out distill.hidden for this model"
        )
        raise ValueError(f"the {side} returns no {name}; {do}")
    return layers


def _divisor(num_items: Tensor | int | None, counts_BT: Tensor) -> Tensor | int:
    """Return what a sum over tokens is divided by; where none counts, 1, so that the loss is zero."""
    if num_items is None:
        return counts_BT.sum().clamp_min(1)
    return num_items.to(counts_BT.device).clamp_min(1) if isinstance(num_items, Tensor) else max(num_items, 1)


def _router_loss(model: nn.Module | None, outputs: Any) -> Tensor | float:
    """Return the loss that a mixture of experts adds to its own to balance them; zero if it computes none."""
    config = getattr(model, "config", None)
    loss = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    coefficient: float = getattr(config, "router_aux_loss_coef", 0.0)
    return coefficient * loss if isinstance(loss, Tensor) else 0.0


def _check_speaks(model: nn.Module) -> None:
    """Refuse a model that gives one answer per text, or labels that are no tokens."""
    loss = getattr(model, "loss_type", None)
    if isinstance(loss, str) and not loss.endswith(_LANGUAGE_LOSSES):
        raise ValueError(
            f"recover.distill teaches the next token, but {type(model).__name__} is no language model (its loss is "
            f"{loss}); recover it without distill, by lora, retrain or further training"
        )


def _check_attention_dropout(config: object, options: Distill) -> None:
    """Refuse attention with dropout: models return it after the dropout, with entries missing."""
    if options.attention is None:
        return
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        value = getattr(config, name, None)
        if isinstance(value, float) and value > 0:
            raise ValueError(
                f"distill.attention compares attention, but the model drops entries of it in training ({name} "
                f"{value}); load it with {name}=0.0"
            )
