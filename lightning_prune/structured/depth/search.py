"""Remove one candidate after the other, always the one whose removal harms the model least.

A candidate is anything that can be switched off for a while: a block, a sub-block, some units of one group. Every
finished evaluation goes into a state file, so that an interrupted search goes on where it stopped.

Source: the greedy loop of SLEB, arXiv 2402.09025, and BlockPruner, arXiv 2406.10594; stops and resuming are ours.
Cost: one evaluation per candidate and removal.
Limits: greedy; the first removal is the best one, a set of several need not be.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune.base import distributed
from lightning_prune.base.whole_file import written_aside
from lightning_prune.structured.groups import check_seal, sealed

__all__ = ["Candidate", "Removal", "Step", "Stop", "fingerprint_batches", "fingerprint_model", "greedy_search"]

_STATE_FORMAT = 2

Removed = Callable[[], AbstractContextManager[object]]
Evaluate = Callable[[Removed], float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that can be removed.

    Args:
        label: its name in results and state files, unique in a search.
        switch: returns a context in which it is switched off; contexts of several candidates are nested.
        num_parameters: how many parameters go with it.
        after: label of the candidate that must have been removed before, None if there is none.
        not_before: how many removals must have been made before.
    """

    label: str
    switch: Removed
    num_parameters: int = 0
    after: str | None = None
    not_before: int = 0


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a search ends: at the first of the given limits, or when no candidate is left.

    Args:
        count: number of removals.
        parameter_share: removed parameters / all parameters of the model; the removal that reaches it is the last.
        max_ratio: a removal that makes the criterion larger than this many times that of the intact model is not made.
    """

    count: int | None = None
    parameter_share: float | None = None
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.count is None and self.parameter_share is None and self.max_ratio is None:
            raise ValueError("a search needs an end: give count, parameter_share or max_ratio")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be 1 or more, got {self.count}; at 0 nothing goes")
        if self.parameter_share is not None and not 0 < self.parameter_share < 1:
            raise ValueError(f"parameter_share must be in (0, 1), got {self.parameter_share}")
        if self.max_ratio is not None and self.max_ratio < 1:
            raise ValueError(f"max_ratio must be >= 1, the intact model's own, got {self.max_ratio}")


@dataclass(frozen=True)
class Step:
    """One removal: what went, the criterion afterwards, and the share of all parameters gone by then."""

    label: str
    score: float
    parameter_share: float


@dataclass(frozen=True)
class Removal:
    """What a search removed, in order, and the criterion of the intact model."""

    intact: float
    steps: tuple[Step, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Return what was removed, in order."""
        return tuple(step.label for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {"intact": self.intact, "order": [[step.label, step.score, step.parameter_share] for step in self.steps]}

    def __str__(self) -> str:
        width = max([len("removed"), len("nothing"), *(len(step.label) for step in self.steps)])
        lines = [f"    {'removed':{width}}  {'criterion':>10}  parameters gone"]
        lines.append(f"    {'nothing':{width}}  {self.intact:10.4g}  {0:15.1%}")
        for number, step in enumerate(self.steps, 1):
            lines.append(f"{number:3d} {step.label:{width}}  {step.score:10.4g}  {step.parameter_share:15.1%}")
        return "\n".join(lines)


def fingerprint_batches(batches: Sequence[Mapping[str, Tensor]], device: torch.device | None = None) -> str:
    """Return a hash of the token ids, masks and labels that all processes hold together, in whatever order.

    Args:
        batches: this process's part.
        device: where the processes exchange numbers; only needed with several.
    """
    total = 0
    for batch in batches:
        digest = hashlib.sha256()
        for key in ("input_ids", "attention_mask", "labels"):
            if key in batch:
                _add_tensor(digest, key, batch[key])
        total += int(digest.hexdigest()[:12], 16)
    everywhere = distributed.sum_everywhere(torch.tensor(total % 2**48, dtype=torch.int64, device=device))
    return f"{int(everywhere) % 2**48:012x}"


def fingerprint_model(model: nn.Module) -> str:
    """Return a hash of the class, names, shapes and values of all parameters that this process holds."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, parameter in model.named_parameters():
        _add_tensor(digest, name, distributed.local(parameter.detach()))
    return digest.hexdigest()[:16]


def _add_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


class _State:
    """Finished scores by the labels that were removed, kept in a file; the first rank's file counts for all ranks."""

    def __init__(self, path: Path | None, fingerprint: str, device: torch.device) -> None:
        self.path, self.fingerprint, self.device = path, fingerprint, device
        self.scores: dict[str, float] = {}
        if path is not None and path.exists() and distributed.is_first_rank():
            self.scores = self._read(path)

    def _read(self, path: Path) -> dict[str, float]:
        anew = "give another state_file, or delete it to search anew"
        try:
            values = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or holds no state of a search ({error}); {anew}") from error
        if values.get("format") != _STATE_FORMAT:
            raise ValueError(
                f"{path} has format {values.get('format')!r}; this version reads format {_STATE_FORMAT}; {anew}"
            )
        check_seal(values, what=str(path), cure=anew)
        if values["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{path} belongs to a search with another model, calibration or options ({values['fingerprint']}, "
                f"here {self.fingerprint}); {anew}"
            )
        return dict(values["scores"])

    def score(self, labels: Sequence[str], evaluate: Callable[[], float]) -> float:
        """Return the score of a set of removals, evaluated only if it is not known."""
        key = json.dumps(list(labels))
        known = distributed.broadcast_number(self.scores.get(key, math.nan), self.device)
        if not math.isnan(known):
            return known
        value = distributed.broadcast_number(evaluate(), self.device)
        if math.isnan(value):
            raise ValueError(f"the criterion is not a number after removing {' + '.join(labels) or 'nothing'}")
        self.scores[key] = value
        if self.path is not None and distributed.is_first_rank():
            values = {"format": _STATE_FORMAT, "fingerprint": self.fingerprint, "scores": self.scores}
            with written_aside(self.path) as aside:
                aside.write_text(json.dumps(sealed(values), indent=1), encoding="utf-8")
        return value


@contextmanager
def _all_switched(candidates: Sequence[Candidate]) -> Iterator[None]:
    with ExitStack() as stack:
        for candidate in candidates:
            stack.enter_context(candidate.switch())
        yield


def _check(candidates: Sequence[Candidate], stop: Stop, num_parameters: int) -> None:
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) < len(labels):
        raise ValueError(f"candidates need unique labels, got {next(x for x in labels if labels.count(x) > 1)!r} twice")
    if stop.parameter_share is not None and num_parameters < 1:
        raise ValueError("a stop by parameter_share needs num_parameters, the parameters of the whole model")
    if stop.count is not None and stop.count > len(candidates):
        raise ValueError(f"cannot remove {stop.count} of {len(candidates)} candidates; protect less or remove fewer")


def greedy_search(
    evaluate: Evaluate,
    candidates: Sequence[Candidate],
    stop: Stop,
    *,
    already: Sequence[Candidate] = (),
    num_parameters: int = 0,
    state_file: str | os.PathLike[str] | None = None,
    fingerprint: str = "",
    device: torch.device | None = None,
    progress: bool = True,
) -> Removal:
    """Remove candidates one after the other, each time the one with the lowest criterion; ties go to the first.

    Args:
        evaluate: the criterion of the model inside the context that it is called with; lower is better.
        candidates: what may be removed.
        stop: when to end.
        already: what earlier searches removed: switched off throughout, and its parameters count as gone.
        num_parameters: of the whole intact model, for shares.
        state_file: JSON file for finished scores; if it exists, the search goes on from it.
        fingerprint: what the scores depend on (model, calibration, criterion); a file with another one is refused.
        device: where the processes exchange scores; only needed with several.
        progress: whether to show a bar.

    Raises:
        ValueError: if the stop cannot be reached, the criterion is not a number, or the file is another search's.
    """
    _check(candidates, stop, num_parameters)
    state = _State(None if state_file is None else Path(state_file), fingerprint, device or torch.device("cpu"))
    gone, left = list(already), list(candidates)
    intact = state.score([], lambda: evaluate(lambda: _all_switched([])))
    if stop.max_ratio is not None and intact <= 0:
        raise ValueError("max_ratio needs a criterion above 0 for the intact model; use a loss, not a divergence")
    steps: list[Step] = []
    while not _is_reached(stop, steps, gone, num_parameters):
        removed = {candidate.label for candidate in gone}
        ready = [c for c in left if len(steps) >= c.not_before and (c.after is None or c.after in removed)]
        if not ready:
            break
        hidden = not (progress and distributed.is_first_rank())
        bar = tqdm(ready, desc=f"removal {len(steps) + 1}", disable=hidden)
        scores = [_score_with(state, evaluate, [*gone, candidate]) for candidate in bar]
        best = min(range(len(ready)), key=scores.__getitem__)
        if stop.max_ratio is not None and scores[best] > stop.max_ratio * intact:
            break
        gone.append(ready[best])
        left.remove(ready[best])
        steps.append(Step(ready[best].label, scores[best], _share(gone, num_parameters)))
    return Removal(intact, tuple(steps))


def _score_with(state: _State, evaluate: Evaluate, gone: Sequence[Candidate]) -> float:
    return state.score([candidate.label for candidate in gone], lambda: evaluate(lambda: _all_switched(gone)))


def _share(gone: Sequence[Candidate], num_parameters: int) -> float:
    return sum(candidate.num_parameters for candidate in gone) / num_parameters if num_parameters else 0.0


def _is_reached(stop: Stop, steps: Sequence[Step], gone: Sequence[Candidate], num_parameters: int) -> bool:
    if stop.count is not None and len(steps) >= stop.count:
        return True
    return stop.parameter_share is not None and _share(gone, num_parameters) >= stop.parameter_share
