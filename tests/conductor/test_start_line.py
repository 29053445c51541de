"""What is said before anything is changed."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune import Cubic, Existing, Once, Sparsifier, Targets
from lightning_prune.conductor.start_line import announce, start_line
from tests.tiny_models import tiny_llama


def test_the_line_counts_targets_parameters_and_share_and_names_the_ramp() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    line = start_line(model, Targets().select(model), Cubic(sparsity=0.75, start=10, end=30, interval=5), 40)
    assert line == (
        "pruning 0.75 from step 10 to step 30, every 5, of 40 of 2 weights of 128 parameters, 80.0% of the model; "
        "left out: 1 x output head (2.weight)"
    )


def test_pruning_at_once_has_no_ramp() -> None:
    model = nn.Linear(4, 4, bias=False)
    selection = Targets().select(model)
    assert start_line(model, selection, Once(sparsity=0.5)) == (
        "pruning 0.5 at once of 1 weights of 16 parameters, 100.0% of the model"
    )
    assert start_line(model, selection, Once(sparsity=0.5, at=3), 9).startswith("pruning 0.5 at step 3 of 9 of 1 w")


def test_without_pruning_it_tells_whether_there_are_zeros_to_hold() -> None:
    model = nn.Linear(4, 4, bias=False)
    selection = Targets().select(model)
    assert start_line(model, selection, Existing(), 9).startswith("pruning nothing, and no zeros to hold, in 1 weights")
    with torch.no_grad():
        model.weight[0, 0] = 0
    assert start_line(model, selection, Existing(), 9).startswith("holding the zeros of 1 weights")


@pytest.mark.parametrize(("width", "words"), [(30, "900"), (55, "3.02 k"), (1400, "1.96 M")])
def test_large_numbers_are_rounded(width: int, words: str) -> None:
    model = nn.Linear(width, width, bias=False)
    assert f" {words} parameters" in start_line(model, Targets().select(model), Once(sparsity=0.5))


def test_what_is_frozen_and_what_a_spectral_norm_scales_is_said() -> None:
    model = nn.ModuleList(parametrizations.spectral_norm(nn.Linear(4, 4)) for _ in range(2))
    selection = Targets().select(model)
    line = start_line(model, selection, Once(sparsity=0.5))
    assert "kept weights grow under the spectral norm of 2 of them (0.parametrizations.weight.original)" in line
    assert "frozen" not in line
    assert "; all of them are frozen" in start_line(model.requires_grad_(False), selection, Once(sparsity=0.5))
    model[0].requires_grad_(True)
    line = start_line(model, selection, Once(sparsity=0.5))
    assert "; 1 of them are frozen (1.parametrizations.weight.original)" in line


def test_attaching_and_pruning_once_say_it(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    with caplog.at_level(logging.INFO, logger="lightning_prune"):
        conductor = Sparsifier(schedule=Once(sparsity=0.5, at=1))
        conductor.attach(model, [torch.optim.SGD(model.parameters(), lr=0.1)], total_steps=4)
        Sparsifier(schedule=Once(sparsity=0.5)).prune_once(tiny_llama(), progress=False)
    first, second = (record.message for record in caplog.records if "weights of" in record.message)
    assert first.startswith("pruning 0.5 at step 1 of 4 of 14 weights of ")
    assert second.startswith("pruning 0.5 at once of 14 weights of ")


def test_it_reaches_the_terminal_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("lightning_prune")
    monkeypatch.setattr(library, "level", logging.NOTSET)
    monkeypatch.setattr(logging.Logger, "isEnabledFor", lambda self, level: level >= logging.WARNING)
    announce("three weights")
    assert "three weights" in capsys.readouterr().err
    monkeypatch.setattr(library, "level", logging.WARNING)
    announce("three weights")
    assert capsys.readouterr().err == ""
