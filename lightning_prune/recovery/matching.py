"""Terms that pull the student's hidden states and attention towards the teacher's, layer by layer.

A layer map says which block of the student answers to which block of the teacher, so a student with fewer blocks works.
Every term is a sum over the tokens that count, so that it adds up over micro-batches like the loss on logits.

Source: hidden states and their weight, arXiv 2407.14679, section 3 (cosine distance was best; worth it where depth was
    cut); relations and attention of the last layer, Wang et al., MiniLM, arXiv 2002.10957, sections 3.1 and 3.2.
Defaults: every block of the student, evenly spaced over the teacher's; attention of the last layer alone, as in MiniLM.
Limits: the state after the last block is the one after the model's final norm. Attention needs a model that returns it.

Shapes: B sequences, T tokens, S the same tokens as keys, D width of the student or of the teacher, H heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Attention", "Cosine", "Hidden", "Relation", "SquaredError", "StateDistance", "Tokens", "map_layers"]

Pairs = tuple[tuple[int, int], ...]
Weight = float | Literal["balanced"]


@dataclass(frozen=True)
class Tokens:
    """Which tokens count, and which may be looked at: keys_BST is True where key S stands in the text of token T."""

    counts_BT: Tensor
    keys_BTS: Tensor


class StateDistance(ABC):
    """A distance between two hidden states of the same token."""

    @abstractmethod
    def per_token(self, student_BTD: Tensor, teacher_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return distance_BT, float32.

        Args:
            student_BTD: states in float32.
            teacher_BTD: states in float32, of another width perhaps.
            tokens: which tokens count.

        Raises:
            ValueError: if the widths differ and the distance compares feature by feature.
        """


@dataclass(frozen=True, kw_only=True)
class Cosine(StateDistance):
    """One minus the cosine between the two states.

    Source: arXiv 2407.14679, section 3.
    """

    def per_token(self, student_BTD: Tensor, teacher_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return 1 - cos."""
        _check_widths(self, student_BTD, teacher_BTD)
        return 1 - functional.cosine_similarity(student_BTD, teacher_BTD, dim=-1)


@dataclass(frozen=True, kw_only=True)
class SquaredError(StateDistance):
    """The squared difference, averaged over features.

    Source: arXiv 2407.14679, section 3.
    """

    def per_token(self, student_BTD: Tensor, teacher_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return the mean over features."""
        _check_widths(self, student_BTD, teacher_BTD)
        return (student_BTD - teacher_BTD).square().mean(-1)


@dataclass(frozen=True, kw_only=True)
class Relation(StateDistance):
    """How a token relates to the other tokens of its text; works between different widths.

    Each side's states, scaled to root mean square 1, give a softmax over the other tokens of the scaled products; the
    distance is KL(teacher || student) of the two, averaged over heads.

    Source: arXiv 2002.10957, section 3.2, there between values of one layer. A token's relation to itself, which is the
    same for all after the scaling, is left out.

    Args:
        heads: equal parts that the states of both sides are cut into.
    """

    heads: int = 1

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads must be 1 or more, got {self.heads}")

    def per_token(self, student_BTD: Tensor, teacher_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return KL(teacher || student) of each token's relations."""
        is_other_TS = ~torch.eye(student_BTD.shape[1], dtype=torch.bool, device=student_BTD.device)
        hidden_BTS = ~(tokens.keys_BTS & is_other_TS)
        log_q_BHTS = self._log_relation(student_BTD, hidden_BTS)
        log_p_BHTS = self._log_relation(teacher_BTD, hidden_BTS)
        kl_BHTS = log_p_BHTS.exp() * (log_p_BHTS - log_q_BHTS)
        return kl_BHTS.masked_fill(hidden_BTS[:, None], 0.0).sum(-1).mean(1)

    def _log_relation(self, state_BTD: Tensor, hidden_BTS: Tensor) -> Tensor:
        width = state_BTD.shape[-1]
        if width % self.heads:
            raise ValueError(f"Relation cuts states into {self.heads} heads, but a width of {width} is no multiple")
        state_BHTD = state_BTD.unflatten(-1, (self.heads, width // self.heads)).transpose(1, 2)
        state_BHTD = functional.rms_norm(state_BHTD, state_BHTD.shape[-1:])
        product_BHTS = state_BHTD @ state_BHTD.transpose(-1, -2) / state_BHTD.shape[-1] ** 0.5
        # A finite floor, because a token alone in its text has no other and its row must not become NaN.
        return product_BHTS.masked_fill(hidden_BTS[:, None], torch.finfo(state_BHTD.dtype).min / 2).log_softmax(-1)


def _check_widths(distance: StateDistance, student_BTD: Tensor, teacher_BTD: Tensor) -> None:
    if student_BTD.shape[-1] != teacher_BTD.shape[-1]:
        raise ValueError(
            f"{type(distance).__name__} compares hidden states feature by feature, but the student's width is "
            f"{student_BTD.shape[-1]} and the teacher's {teacher_BTD.shape[-1]}; use Relation, which compares tokens"
        )


def _check(weight: Weight, layers: Pairs | None) -> None:
    if weight != "balanced" and not (isinstance(weight, (int, float)) and weight > 0):
        raise ValueError(f"weight must be a positive number or balanced, got {weight!r}; null leaves the term out")
    if layers is not None and (not layers or any(index < 0 for pair in layers for index in pair)):
        raise ValueError(f"layers must be pairs [student block, teacher block] counted from 0, got {list(layers)}")


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """States after blocks of the student against the teacher's.

    Args:
        distance: between two states.
        layers: pairs (student block, teacher block) from 0; None pairs every block of the student with one of the
            teacher, evenly spaced.
        embeddings: also compare the inputs of the first blocks.
        weight: of the sum over pairs; `balanced` makes the term as large as the one on logits, anew in every batch.
    """

    distance: StateDistance = field(default_factory=Cosine)
    layers: Pairs | None = None
    embeddings: bool = False
    weight: Weight = "balanced"

    def __post_init__(self) -> None:
        _check(self.weight, self.layers)

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], tokens: Tokens) -> Tensor:
        """Sum the distance over pairs and over the tokens that count.

        Args:
            student: the input of the first block, then the state after every block, each _BTD.
            teacher: the same of the teacher.
            tokens: which tokens count.

        Raises:
            ValueError: if a pair names a block that does not exist, or the widths do not fit the distance.
        """
        pairs = _pairs(self.layers, len(student) - 1, len(teacher) - 1)
        indices = [(one + 1, other + 1) for one, other in pairs] + [(0, 0)] * self.embeddings
        total = student[0].new_zeros((), dtype=torch.float32)
        for own, others in indices:
            value_BT = self.distance.per_token(student[own].float(), teacher[others].float(), tokens)
            total = total + value_BT.masked_fill(~tokens.counts_BT, 0.0).sum()
        return total


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where the student's heads look against where the teacher's do: KL(teacher || student) over keys.

    Heads are compared one by one and averaged; where the two differ in their number, the distributions are averaged
    over heads first.

    Args:
        layers: pairs (student block, teacher block) from 0; None pairs the last ones.
        weight: of the sum over pairs; `balanced` makes the term as large as the one on logits, anew in every batch.
    """

    layers: Pairs | None = None
    weight: Weight = "balanced"

    def __post_init__(self) -> None:
        _check(self.weight, self.layers)

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], tokens: Tokens) -> Tensor:
        """Sum the divergence over pairs and over the tokens that count.

        Args:
            student: attention of every block, each _BHTS.
            teacher: the same of the teacher.
            tokens: which tokens count.

        Raises:
            ValueError: if a pair names a block that does not exist.
        """
        last = ((len(student) - 1, len(teacher) - 1),)
        total = student[0].new_zeros((), dtype=torch.float32)
        for own, others in _pairs(self.layers or last, len(student), len(teacher)):
            value_BT = _attention_kl(student[own].float(), teacher[others].float())
            total = total + value_BT.masked_fill(~tokens.counts_BT, 0.0).sum()
        return total


def _attention_kl(student_BHTS: Tensor, teacher_BHTS: Tensor) -> Tensor:
    """Return value_BT."""
    if student_BHTS.shape[1] != teacher_BHTS.shape[1]:
        student_BHTS, teacher_BHTS = student_BHTS.mean(1, keepdim=True), teacher_BHTS.mean(1, keepdim=True)
    # Masked keys hold exact zeros on both sides; the floor keeps their logarithm finite and drops out by p = 0.
    tiny = torch.finfo(torch.float32).tiny
    ratio_BHTS = teacher_BHTS.clamp_min(tiny).log() - student_BHTS.clamp_min(tiny).log()
    return (teacher_BHTS * ratio_BHTS).sum(-1).mean(1)


def map_layers(num_student: int, num_teacher: int) -> Pairs:
    """Pair every block of the student with one of the teacher, evenly spaced, last with last.

    Args:
        num_student: blocks, 1 or more.
        num_teacher: blocks, 1 or more.

    Returns:
        pairs (student block, teacher block), from 0.
    """
    ends = [round((index + 1) * num_teacher / num_student) for index in range(num_student)]
    return tuple((index, max(end, 1) - 1) for index, end in enumerate(ends))


def _pairs(layers: Pairs | None, num_student: int, num_teacher: int) -> Pairs:
    for own, others in layers or ():
        if own >= num_student or others >= num_teacher:
            raise ValueError(
                f"layers names the pair [{own}, {others}], but the student has blocks 0 to {num_student - 1} and the "
                f"teacher 0 to {num_teacher - 1}"
            )
    return layers or map_layers(num_student, num_teacher)
