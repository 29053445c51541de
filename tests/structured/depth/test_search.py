"""The greedy loop on made-up criteria, against exhaustive search, and interrupted in the middle."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from lightning_prune.structured.depth.bypass import bypassed
from lightning_prune.structured.depth.criteria import NextTokenLoss
from lightning_prune.structured.depth.search import (
    Candidate,
    Removal,
    Step,
    Stop,
    fingerprint_batches,
    fingerprint_model,
    greedy_search,
)
from tests.structured.depth_models import padded_batches, sampled, shake, stories3m, tiny_model
from tests.tiny_models import tiny_llama

Removed = Callable[[], AbstractContextManager[object]]


class Toy:
    """Candidates a, b, c, ... whose removal costs given numbers; counts evaluations and can fail at one."""

    def __init__(self, cost: Callable[[frozenset[str]], float], *, fails_at: int | None = None) -> None:
        self.cost, self.fails_at = cost, fails_at
        self.off: list[str] = []
        self.evaluated: list[tuple[str, ...]] = []

    @contextmanager
    def switch(self, label: str) -> Iterator[None]:
        self.off.append(label)
        yield
        self.off.remove(label)

    def candidate(self, label: str, *, size: int = 1, after: str | None = None, not_before: int = 0) -> Candidate:
        return Candidate(
            label=label, switch=lambda: self.switch(label), num_parameters=size, after=after, not_before=not_before
        )

    def __call__(self, removed: Removed) -> float:
        if self.fails_at == len(self.evaluated):
            raise KeyboardInterrupt
        with removed():
            self.evaluated.append(tuple(self.off))
            return self.cost(frozenset(self.off))


def additive(costs: Mapping[str, float]) -> Callable[[frozenset[str]], float]:
    return lambda off: 1 + sum(costs[label] for label in off)


COSTS = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}


def test_cheapest_goes_first_and_ties_go_to_the_first() -> None:
    toy = Toy(additive(COSTS))
    found = greedy_search(toy, [toy.candidate(x) for x in "abcd"], Stop(count=3), num_parameters=10, progress=False)
    assert found == Removal(1.0, (Step("b", 2.0, 0.1), Step("d", 3.0, 0.2), Step("c", 5.0, 0.3)))
    assert toy.evaluated == [
        (), ("a",), ("b",), ("c",), ("d",), ("b", "a"), ("b", "c"), ("b", "d"), ("b", "d", "a"), ("b", "d", "c")
    ]  # fmt: skip


def test_search_notices_that_removals_interact() -> None:
    # b and d do the same thing: either can go, not both
    def cost(off: frozenset[str]) -> float:
        return additive(COSTS)(off) + (10 if {"b", "d"} <= off else 0)

    toy = Toy(cost)
    found = greedy_search(toy, [toy.candidate(x) for x in "abcd"], Stop(count=2), progress=False)
    assert found.labels == ("b", "c")


@pytest.mark.parametrize(
    ("stop", "labels"),
    [
        (Stop(parameter_share=0.1), ("b",)),
        (Stop(parameter_share=0.11), ("b", "d")),
        (Stop(parameter_share=0.9), ("b", "d", "c", "a")),
        (Stop(max_ratio=2.99), ("b",)),
        (Stop(max_ratio=3.0), ("b", "d")),
        (Stop(count=1, max_ratio=3.0), ("b",)),
    ],
)
def test_stops(stop: Stop, labels: tuple[str, ...]) -> None:
    toy = Toy(additive(COSTS))
    found = greedy_search(toy, [toy.candidate(x) for x in "abcd"], stop, num_parameters=10, progress=False)
    assert found.labels == labels


def test_candidates_can_wait_for_another_or_for_a_number_of_removals() -> None:
    toy = Toy(additive({"a": 9.0, "b": 0.0, "c": 1.0, "d": 5.0}))
    candidates = [
        toy.candidate("a"),
        toy.candidate("b", after="a"),
        toy.candidate("c", not_before=1),
        toy.candidate("d"),
    ]
    assert greedy_search(toy, candidates, Stop(count=4), progress=False).labels == ("d", "c", "a", "b")


def test_what_is_already_gone_stays_off_and_counts() -> None:
    toy = Toy(additive(COSTS))
    found = greedy_search(
        toy,
        [toy.candidate(x) for x in "ab"],
        Stop(parameter_share=0.6),
        already=[toy.candidate("c", size=5)],
        num_parameters=10,
        progress=False,
    )
    assert found.steps == (Step("b", 4.0, 0.6),)
    assert ("c", "b") in toy.evaluated


def test_a_state_file_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.json"

    def search() -> Removal:
        toy = Toy(additive(COSTS))
        candidates = [toy.candidate(x) for x in "abcd"]
        return greedy_search(toy, candidates, Stop(count=3), state_file=path, progress=False)

    search()
    whole = path.read_text()
    for damaged in (whole.replace("2.0", "1.5", 1), whole[:-4], "3", '{"format": 2}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"search\.json is damaged.*; give another state_file, or delete it"):
            search()
    path.write_text('{"format": 1, "scores": {}}')
    with pytest.raises(ValueError, match=r"has format 1; this version reads format 2; give another state_file"):
        search()


@pytest.mark.parametrize("fails_at", range(10))
def test_interrupted_search_goes_on_where_it_stopped(tmp_path: Path, fails_at: int) -> None:
    straight = Toy(additive(COSTS))
    expected = greedy_search(straight, [straight.candidate(x) for x in "abcd"], Stop(count=3), progress=False)
    assert len(straight.evaluated) == 10
    path = tmp_path / "search.json"
    first = Toy(additive(COSTS), fails_at=fails_at)
    with pytest.raises(KeyboardInterrupt):
        greedy_search(first, [first.candidate(x) for x in "abcd"], Stop(count=3), state_file=path, progress=False)
    second = Toy(additive(COSTS))
    found = greedy_search(second, [second.candidate(x) for x in "abcd"], Stop(count=3), state_file=path, progress=False)
    assert found == expected
    assert first.evaluated + second.evaluated == straight.evaluated
    assert [entry.name for entry in tmp_path.iterdir()] == ["search.json"]


def test_longer_search_uses_the_scores_of_a_shorter_one(tmp_path: Path) -> None:
    toy = Toy(additive(COSTS))
    candidates = [toy.candidate(x) for x in "abcd"]
    greedy_search(toy, candidates, Stop(count=1), state_file=tmp_path / "s", progress=False)
    toy.evaluated.clear()
    greedy_search(toy, candidates, Stop(count=2), state_file=tmp_path / "s", progress=False)
    assert toy.evaluated == [("b", "a"), ("b", "c"), ("b", "d")]


def test_infinite_scores_survive_the_file(tmp_path: Path) -> None:
    toy = Toy(lambda off: math.inf if "a" in off else 1.0)
    candidates = [toy.candidate(x) for x in "ab"]
    for _ in range(2):
        found = greedy_search(toy, candidates, Stop(count=2), state_file=tmp_path / "s", progress=False)
        assert [step.score for step in found.steps] == [1.0, math.inf]
    assert len(toy.evaluated) == 4


def test_state_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    toy = Toy(additive(COSTS))
    candidates = [toy.candidate(x) for x in "abcd"]
    greedy_search(toy, candidates, Stop(count=1), state_file=path, fingerprint="one", progress=False)
    with pytest.raises(ValueError, match=r"another model, calibration or options \(one, here two\)"):
        greedy_search(toy, candidates, Stop(count=1), state_file=path, fingerprint="two", progress=False)
    path.write_text(json.dumps({"format": 3}))
    with pytest.raises(ValueError, match="format 3"):
        greedy_search(toy, candidates, Stop(count=1), state_file=path, fingerprint="one", progress=False)


def test_fingerprints_depend_on_every_number() -> None:
    model, batches = tiny_model("llama"), padded_batches()
    model_print, batch_print = fingerprint_model(model), fingerprint_batches(batches)
    assert fingerprint_model(tiny_model("llama")) == model_print
    assert fingerprint_batches(padded_batches()) == batch_print
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert fingerprint_model(model) != model_print
    assert fingerprint_batches(padded_batches()[::-1]) == batch_print
    assert fingerprint_batches(padded_batches(1)) != batch_print
    batches[1]["attention_mask"][0, -1] = 0
    assert fingerprint_batches(batches) != batch_print
    assert fingerprint_model(tiny_model("llama").to(torch.bfloat16)) != model_print


def test_table_by_hand() -> None:
    removal = Removal(1.25, (Step("attention 5", 2.0, 0.1), Step("mlp 4", 123.456, 0.25)))
    assert str(removal).splitlines() == [
        "    removed       criterion  parameters gone",
        "    nothing            1.25             0.0%",
        "  1 attention 5           2            10.0%",
        "  2 mlp 4             123.5            25.0%",
    ]


def test_errors() -> None:
    toy = Toy(additive(COSTS))
    with pytest.raises(ValueError, match="a search needs an end"):
        Stop()
    with pytest.raises(ValueError, match="count must be 1 or more, got -1"):
        Stop(count=-1)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"parameter_share must be in \(0, 1\), got {share}"):
            Stop(parameter_share=share)
    with pytest.raises(ValueError, match="max_ratio must be >= 1"):
        Stop(max_ratio=0.5)
    with pytest.raises(ValueError, match="'a' twice"):
        greedy_search(toy, [toy.candidate("a")] * 2, Stop(count=1), progress=False)
    with pytest.raises(ValueError, match="cannot remove 3 of 1 candidates"):
        greedy_search(toy, [toy.candidate("a")], Stop(count=3), progress=False)
    with pytest.raises(ValueError, match="needs num_parameters"):
        greedy_search(toy, [toy.candidate("a")], Stop(parameter_share=0.5), progress=False)
    with pytest.raises(ValueError, match="max_ratio needs a criterion above 0"):
        greedy_search(lambda removed: 0.0, [toy.candidate("a")], Stop(max_ratio=2), progress=False)
    with pytest.raises(ValueError, match="not a number after removing a"):
        broken = Toy(lambda off: math.nan if off else 1.0)
        greedy_search(broken, [broken.candidate("a")], Stop(count=1), progress=False)


@pytest.mark.parametrize("seed", range(3))
def test_one_step_equals_exhaustive_search_and_two_steps_where_greedy_is_right(seed: int) -> None:
    model = tiny_llama(layers=4, seed=seed)
    shake(model, seed=seed)
    evaluate = NextTokenLoss().prepare(model, padded_batches())

    def loss(layers: tuple[int, ...]) -> float:
        return evaluate(lambda: bypassed(model, [], layers=layers))

    candidates = [
        Candidate(label=str(i), switch=lambda i=i: bypassed(model, [], layers=[i]))  # type: ignore[misc]
        for i in range(4)
    ]
    found = greedy_search(evaluate, candidates, Stop(count=2), progress=False)
    singles = {layers: loss(layers) for layers in itertools.combinations(range(4), 1)}
    pairs = {layers: loss(layers) for layers in itertools.combinations(range(4), 2)}
    assert found.intact == loss(())
    assert found.labels[0] == str(min(singles, key=singles.__getitem__)[0])
    pair = tuple(sorted(int(label) for label in found.labels))
    assert found.steps[1].score == pairs[pair]
    assert pairs[pair] == min(value for key, value in pairs.items() if int(found.labels[0]) in key)


@pytest.mark.long
def test_greedy_pair_of_the_trained_model_is_the_exhaustive_best() -> None:
    model = stories3m()
    batches = sampled(model, seed=1, num=64)
    evaluate = NextTokenLoss().prepare(model, batches)
    candidates = [
        Candidate(label=str(i), switch=lambda i=i: bypassed(model, [], layers=[i]))  # type: ignore[misc]
        for i in range(6)
    ]
    found = greedy_search(evaluate, candidates, Stop(count=2), progress=False)
    pairs = {
        layers: evaluate(lambda layers=layers: bypassed(model, [], layers=layers))  # type: ignore[misc]
        for layers in itertools.combinations(range(6), 2)
    }
    assert found.labels == ("2", "5")
    assert min(pairs, key=pairs.__getitem__) == (2, 5)
    assert math.exp(found.steps[0].score) == pytest.approx(17.7, rel=0.1)
    assert math.exp(found.steps[1].score) == pytest.approx(68.8, rel=0.1)
