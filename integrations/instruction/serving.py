"""Serve a model that chooses its sub-network: one small stock model for each instruction.

    served = InstructionModel.from_pretrained("DIR")
    small = served.select("Translate into French:")      # a stock model, to be called, saved or compiled
    texts = served.generate(["1 + 1 =", "Once upon a time"])

The predictor reads an instruction once; its sub-model is gathered and kept until the budget of bytes is full. Prompts
with equal masks run in one batch, others one after the other, each on its own sub-model.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base.bounds import at_least
from lightning_prune.base.names import unknown
from lightning_prune.conditional.instruction import NAME, InstructionCondition
from lightning_prune.integrations.instruction.folder import open_conditional, read_tasks, save_conditional
from lightning_prune.integrations.instruction.request import padded, tokens_of
from lightning_prune.predictors.model_cache import ModelCache
from lightning_prune.predictors.sub_model import Selection, SubModels

__all__ = ["CACHE_BYTES", "InstructionModel"]

CACHE_BYTES = 1 << 30  # of gathered rows that are kept, where nothing else is said
Key = str | tuple[int, ...]  # the name of a task, or the tokens that the predictor reads


class InstructionModel:
    """A model, its predictor, and the small models that were selected last.

    The parent's matrices are laid out for gathering, and it is put into evaluation mode; its values stay.

    Args:
        condition: at work in the model.
        tokenizer: of the model; None where prompts are given as tokens.
        tasks: name -> scores of the units of each group, (U,).
        cache_bytes: how many bytes of gathered tensors are kept.
    """

    def __init__(
        self,
        condition: InstructionCondition,
        tokenizer: Any = None,
        *,
        tasks: Mapping[str, Sequence[Tensor]] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.condition, self.tokenizer = condition, tokenizer
        self.model: Any = condition.model.eval()
        self.sub_models = SubModels(self.model, condition.predictor.units.groups, without=NAME)
        self.sub_models.lay_out()
        self.tasks = {name: list(scores) for name, scores in (tasks or {}).items()}
        self.cache = ModelCache(cache_bytes)
        self._version: Hashable = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        device: str = "auto",
        cache_bytes: int = CACHE_BYTES,
        trust_remote_code: bool = False,
    ) -> "InstructionModel":
        """Open a folder that `save_pretrained`, or a training with a section `condition`, wrote.

        Raises:
            ValueError: if it is no such folder, of another version, damaged, or its files do not belong together.
        """
        tasks = read_tasks(folder)
        _, condition, tokenizer = open_conditional(folder, device=device, trust_remote_code=trust_remote_code)
        return cls(condition, tokenizer, tasks=tasks, cache_bytes=cache_bytes)

    def save_pretrained(self, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the parent, its tokenizer, the predictor and the named tasks into a new folder, and return it."""
        return save_conditional(self.condition, folder, tokenizer=self.tokenizer, tasks=self.tasks, overwrite=overwrite)

    def add_task(self, name: str, instruction: Any) -> None:
        """Give the sub-network of an instruction a name, under which all inputs of a task can be served.

        Args:
            name: of the task.
            instruction: see `select`.
        """
        if not name:
            raise ValueError("a task needs a name that is not empty")
        scores = self._scores([self._read(instruction)])
        self.tasks[name] = [one[0].cpu() for one in scores]

    def select(self, prompt: Any = None, *, task: str | None = None, keep: float | None = None) -> nn.Module:
        """Return the small model of one instruction or named task.

        It is of the parent's class, and shares with it the memory of all tensors that are not cut.

        Args:
            prompt: text, the messages of a chat, or token ids, (T,) or (1, T).
            task: the name of a task instead.
            keep: share of the units, within the range that the model was trained over.

        Raises:
            ValueError: if there is no instruction or several, the predictor was not trained, or keep does not fit.
        """
        key, numbers = self._key(prompt, task), self._numbers(keep)
        self._forget_what_changed()
        return self._small(key, numbers)

    def selection(self, prompt: Any = None, *, task: str | None = None, keep: float | None = None) -> Selection:
        """Return which units `select` would keep; nothing is gathered."""
        return self._selected([self._key(prompt, task)], self._numbers(keep))[0]

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        task: str | None = None,
        keep: float | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> list[str]:
        """Continue prompts, each on the sub-model of its own instruction; those with equal masks together.

        Args:
            prompts: texts, or messages of chats.
            task: serve all of them with the sub-model of this task.
            keep: see `select`.
            batch_size: prompts at a time.
            options: of the model's own `generate`.

        Returns:
            what was generated for each prompt, without the prompt.

        Raises:
            ValueError: as `select` does, or if there is no tokenizer.
        """
        at_least(1, batch_size=batch_size)
        if isinstance(prompts, str):
            raise ValueError("generate takes a list of prompts, got one text; write [text]")
        if self.tokenizer is None:
            raise ValueError("generate needs the tokenizer of the model, and there is none; use select with token ids")
        tokens = [tokens_of(prompt, self.tokenizer) for prompt in prompts]
        numbers = self._numbers(keep)
        self._forget_what_changed()
        rows_of: dict[Key, list[int]] = {}
        for row, ids in enumerate(tokens):
            rows_of.setdefault(self._read(ids) if task is None else task, []).append(row)
        texts: dict[int, str] = {}
        for window in _chunks(list(rows_of), batch_size):
            for small, keys in self._by_mask(window, numbers):
                for rows in _chunks([row for key in keys for row in rows_of[key]], batch_size):
                    found = self._continued(small, [tokens[row] for row in rows], options)
                    texts.update(zip(rows, found, strict=True))
        return [texts[row] for row in range(len(prompts))]

    def _by_mask(self, keys: Sequence[Key], numbers: Sequence[int]) -> Iterator[tuple[Any, list[Key]]]:
        """Yield small models one after the other, each with the keys that it serves."""
        new = [key for key in keys if self.cache.digest((key, *numbers)) is None]
        selected = dict(zip(new, self._selected(new, numbers), strict=True)) if new else {}
        groups: dict[str | None, list[Key]] = {}
        for key in keys:
            digest = selected[key].digest if key in selected else self.cache.digest((key, *numbers))
            groups.setdefault(digest, []).append(key)
        for digest, members in groups.items():
            small = self._small(members[0], numbers, selected.get(members[0]))
            for key in members[1:]:
                self.cache.get((key, *numbers), digest)
            yield small, members

    def _small(self, key: Key, numbers: Sequence[int], selection: Selection | None = None) -> nn.Module:
        """Return the small model of a key, gathered if it is not there."""
        asked = (key, *numbers)
        if (found := self.cache.get(asked)) is not None:
            return found
        selection = self._selected([key], numbers)[0] if selection is None else selection
        if (found := self.cache.get(asked, selection.digest)) is not None:
            return found
        small = self.sub_models.gather(selection)
        self.cache.put(asked, selection.digest, small, self.sub_models.num_bytes(selection))
        return small

    @torch.no_grad()
    def _selected(self, keys: Sequence[Key], numbers: Sequence[int]) -> list[Selection]:
        """Return the selections of tasks, or of instructions, which are predicted in one pass."""
        tasks = [key for key in keys if isinstance(key, str)]
        scores = [self._task(key) for key in tasks] if tasks else [self._scores(keys)]
        masks = [self.condition.predictor.masks(one, numbers) for one in scores]
        rows = [(one, row) for one in masks for row in range(len(one[0]))]
        return [Selection.of(one, numbers, row) for one, row in rows]

    def _task(self, name: str) -> list[Tensor]:
        """Return the scores of a named task, (1, U) for each group."""
        if name not in self.tasks:
            if not self.tasks:
                raise ValueError(f"this model has no task {name!r}, nor any other; name one with add_task")
            raise ValueError(unknown("task", name, self.tasks))
        return [scores.to(self.model.device)[None] for scores in self.tasks[name]]

    @torch.no_grad()
    def _scores(self, keys: Sequence[Any]) -> list[Tensor]:
        """Return the scores of instructions, given as tokens, (B, U) for each group."""
        predictor = self.condition.predictor
        if not predictor.is_trained:
            known = f"; its tasks are {', '.join(self.tasks)}" if self.tasks else ""
            raise ValueError(
                f"the predictor of this model was not trained, so it would choose units by chance; train it with a "
                f"recipe's section condition{known}"
            )
        ids, there = (tensor.to(self.model.device) for tensor in padded(keys, pad=0, side="right"))
        prompt = self.condition.prompt({"input_ids": ids, "attention_mask": there})
        return predictor.scores(prompt.ids, prompt.attention)

    def _numbers(self, keep: float | None) -> tuple[int, ...]:
        """Return how many units of each group stay."""
        predictor, budget = self.condition.predictor, self.condition.options.budget
        if keep is None:
            return predictor.keep
        if budget.keep_from is None or budget.keep is None:
            raise ValueError(
                f"keep {keep} cannot be chosen: this model has one budget, {budget.keep or budget.num_units}; a range "
                "to choose from is trained with budget.keep_from"
            )
        if not budget.keep_from <= keep <= budget.keep:
            allowed = f"{budget.keep_from} to {budget.keep}"
            raise ValueError(f"keep must lie in the range that this model was trained over, {allowed}, got {keep}")
        return budget.numbers(predictor.units.groups, keep=keep)

    def _key(self, prompt: Any, task: str | None) -> Key:
        if (prompt is None) == (task is None):
            raise ValueError("select takes either a prompt or the name of a task; give one of them")
        return self._read(prompt) if task is None else task

    def _read(self, prompt: Any) -> tuple[int, ...]:
        """Return the tokens that the predictor reads of a prompt."""
        return tokens_of(prompt, self.tokenizer)[: self.condition.options.reads.max_tokens]

    def _forget_what_changed(self) -> None:
        """Let small models go that were selected by, or gathered from, weights that have changed since."""
        predictor = self.condition.predictor.state_dict(keep_vars=True).values()
        version = (self.sub_models.version, sum(0 if one.is_inference() else one._version for one in predictor))
        if version != self._version:
            self.cache.clear()
            self._version = version

    @torch.no_grad()
    def _continued(self, small: Any, tokens: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[str]:
        """Return what a small model generates after some prompts."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids, there = padded(tokens, pad=pad or 0, side="left")
        ids, there = ids.to(small.device), there.to(small.device)
        found = small.generate(ids, attention_mask=there, **{"pad_token_id": pad or 0, **options})
        texts: list[str] = self.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        return texts


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
