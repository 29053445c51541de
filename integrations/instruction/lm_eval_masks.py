"""lm-eval with a model that chooses its sub-network: one mask per request, or one per task.

Per request, the mask is read off the context, as it would be when the model answers; the continuation that is scored
never decides which units score it. Whole texts (rolling log-likelihoods) have no context, so their mask is that of the
token that begins a text. Per task, it is read off the task's description or a given text, once for all its requests.

Requests with different masks share a batch: the parent runs masked, each row under its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor, nn

from lightning_prune.conditional.instruction import InstructionCondition
from lightning_prune.integrations.evaluation.lm_eval_progress import OneBarHFLM
from lightning_prune.integrations.instruction.request import padded, tokens_of
from lightning_prune.predictors.mask_predictor import MaskPredictor

__all__ = ["ConditionedHFLM", "condition_of", "instructions_of"]

Row = tuple[int, ...]


def condition_of(model: nn.Module) -> InstructionCondition | None:
    """Return the predictor's condition at work in a model, or None."""
    found = next((module for module in model.modules() if isinstance(module, MaskPredictor)), None)
    condition: InstructionCondition | None = None if found is None else found.condition
    return condition


def instructions_of(tasks: Mapping[str, Any], text: str | None) -> dict[str, str]:
    """Return the text that stands for each task: a given one for all, or else the task's own description.

    Raises:
        ValueError: if a task has none.
    """
    found = {name: text or str(task.get_config("description") or "") for name, task in tasks.items()}
    for name, instruction in found.items():
        if not instruction.strip():
            raise ValueError(
                f"the task {name} has no description to read a mask from; give the text of an instruction, or take "
                "one mask per request"
            )
    return found


class ConditionedHFLM(OneBarHFLM):
    """Score as HFLM does, under the masks of a condition.

    Args:
        condition: at work in the model.
        instructions: task -> text that its mask is read from; None for one mask per request.
        options: of HFLM.
    """

    def __init__(
        self, *, condition: InstructionCondition, instructions: Mapping[str, str] | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.condition, self.instructions = condition, instructions
        self._context_lengths: dict[Row, int] | None = None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the most likely one."""
        return self._by_task(requests, lambda some: super(ConditionedHFLM, self).loglikelihood(some, disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what is generated after each context."""
        return self._by_task(requests, lambda some: super(ConditionedHFLM, self).generate_until(some, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text."""

        def score(some: list[Instance]) -> list[float]:
            return super(ConditionedHFLM, self).loglikelihood_rolling(some, disable_tqdm)

        if self.instructions is not None:
            return self._by_task(requests, score)
        with self._masks_of((int(self.prefix_token_id),)):
            return score(requests)

    def _by_task(self, requests: list[Instance], score: Callable[[list[Instance]], list[Any]]) -> list[Any]:
        """Score the requests of one task after the other, each under the mask of its task."""
        if self.instructions is None:
            return score(requests)
        answers: dict[int, Any] = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            rows = [row for row, request in enumerate(requests) if request.task_name == task]
            with self._masks_of(tokens_of(self.instructions[str(task)], self.tokenizer)):
                answers |= zip(rows, score([requests[row] for row in rows]), strict=True)
        return [answers[row] for row in range(len(requests))]

    @contextmanager
    @torch.no_grad()
    def _masks_of(self, tokens: Row) -> Iterator[None]:
        """Run the calls inside under the mask of one instruction."""
        ids, there = (tensor.to(self.device) for tensor in padded([tokens], pad=0, side="right"))
        with self.condition.fixed(
            self.condition.masks_of(self.condition.prompt({"input_ids": ids, "attention_mask": there}))
        ):
            yield

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if self.instructions is not None or self._bar is not None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        answers: dict[int, Any] = {}
        for lengths, members in self._waves(requests):
            self._context_lengths = lengths
            try:
                scored = super()._loglikelihood_tokens([requests[idx] for idx in members], disable_tqdm, override_bs)
            finally:
                self._context_lengths = None
            answers |= zip(members, scored, strict=True)
        return [answers[idx] for idx in range(len(requests))]

    def _waves(self, requests: Sequence[Any]) -> list[tuple[dict[Row, int], list[int]]]:
        """Sort requests into waves; in each, equal inputs have contexts of one length, so that a row tells its own."""
        waves: list[tuple[dict[Row, int], list[int]]] = []
        for idx, (_, context, continuation) in enumerate(requests):
            inputs = (context + continuation)[-(self.max_length + 1) :][:-1]
            length, row = len(inputs) - (len(continuation) - 1), _row(inputs)
            wave = next((wave for wave in waves if wave[0].get(row, length) == length), None)
            if wave is None:
                waves.append(wave := ({}, []))
            wave[0][row] = length
            wave[1].append(idx)
        return waves

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        if self._context_lengths is None:
            return super()._model_call(inps, attn_mask, labels)
        lengths = torch.tensor([self._context_lengths[_row(row)] for row in inps.tolist()], device=inps.device)
        is_context_BT = torch.arange(inps.shape[1], device=inps.device) < lengths[:, None]
        with torch.no_grad():
            return self.model(inps, instruction_mask=is_context_BT).logits


def _row(ids: Sequence[int]) -> Row:
    """Return a row without the zeros behind it, which padding may be."""
    length = len(ids)
    while length and ids[length - 1] == 0:
        length -= 1
    return tuple(ids[:length])
