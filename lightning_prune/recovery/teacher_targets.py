"""The teacher's side of a distillation, for one call of the student: from the teacher, or from its logits on disk.

Source: top-k targets stored in advance, arXiv 2407.14679, section 3.

Shapes: B sequences, T tokens, N = B * T, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_prune.recovery.distill_options import Distill
from lightning_prune.recovery.logit_cache import CacheHeader, LogitCache, Passages
from lightning_prune.recovery.teacher import Teacher
from lightning_prune.recovery.token_loss import FullTargets, TopTargets, check_vocabulary

__all__ = ["TeacherTargets", "logits_of"]


def logits_of(outputs: Any) -> Tensor:
    """Return logits_BTV of a model's output.

    Raises:
        ValueError: if there are none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"distillation compares logits, but the model returned {type(outputs).__name__} without them; use a model "
            "with a language-model head, return_dict=True, and no fused loss that skips the logits (Liger: "
            "fused_linear_cross_entropy=False)"
        )
    return logits


class TeacherTargets:
    """Asks the teacher, or the cache first if there is one.

    Args:
        options: what is compared.
        teacher: runs on a cache miss, or always.
        teacher_id: of the cache's header; None takes a fingerprint of the weights.
        rank: of this process.
    """

    def __init__(self, options: Distill, teacher: Teacher, *, teacher_id: str | None, rank: int) -> None:
        self._options = options
        self._teacher = teacher
        self._teacher_id = teacher_id
        self._rank = rank
        self.cache: LogitCache | None = None

    def __call__(self, inputs: Mapping[str, object], logits_BTV: Tensor) -> tuple[FullTargets | TopTargets, Any]:
        """Return targets of the N rows of logits, without meaning for padding, and the teacher's outputs if it ran.

        Args:
            inputs: of the student's call.
            logits_BTV: of the student.

        Raises:
            ValueError: if teacher, cache and student do not fit each other.
        """
        if self._options.cache_dir is not None:
            return self._cached(inputs, logits_BTV), None
        outputs = self._run(inputs, logits_BTV)
        logits_NV = logits_of(outputs).flatten(0, 1).to(logits_BTV.device)
        return self._top(logits_NV) if self._options.top_k else FullTargets(logits_NV), outputs

    def _run(self, inputs: Mapping[str, object], logits_BTV: Tensor) -> Any:
        wanted = dict.fromkeys(self._options.wanted.values(), True)
        outputs = self._teacher(inputs, device=logits_BTV.device, **wanted)
        shape = logits_of(outputs).shape
        if shape[:-1] != logits_BTV.shape[:-1]:
            raise ValueError(
                f"the teacher returns logits of shape {tuple(shape)}, the student {tuple(logits_BTV.shape)}; both must "
                "see the same tokens"
            )
        check_vocabulary(logits_BTV.shape[-1], shape[-1], self._options.num_tokens)
        return outputs

    def _top(self, logits_NV: Tensor) -> TopTargets:
        assert self._options.top_k is not None
        logits_NV = logits_NV[:, : self._options.num_tokens]
        return TopTargets.of(logits_NV, k=self._options.top_k, temperature=self._options.temperature)

    def _cached(self, inputs: Mapping[str, object], logits_BTV: Tensor) -> TopTargets:
        passages = Passages.of(inputs)
        cache = self.cache or self._open(logits_BTV.shape[-1])
        targets = cache.get(passages, device=logits_BTV.device)
        if targets is None:
            outputs = self._run(inputs, logits_BTV)
            targets = self._top(logits_of(outputs).flatten(0, 1).to(logits_BTV.device))
            cache.put(passages, targets)
        return targets

    def _open(self, num_logits: int) -> LogitCache:
        options = self._options
        assert options.cache_dir is not None
        assert options.top_k is not None
        header = CacheHeader(
            teacher=self._teacher_id or self._teacher.fingerprint,
            vocab_size=options.num_tokens or num_logits,
            top_k=options.top_k,
            temperature=options.temperature,
            dtype=options.teacher_dtype or "stored",
        )
        self.cache = LogitCache(options.cache_dir, header=header, rank=self._rank)
        return self.cache
