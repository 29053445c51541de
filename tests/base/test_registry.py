"""The registry finds classes by file, and near names."""

from pathlib import Path

import pytest

import lightning_prune
from lightning_prune.allocations.owl import OWL
from lightning_prune.base import registry
from lightning_prune.granularity import NM, Block, Channel, Unstructured
from lightning_prune.schedules import Cosine, Cubic, Existing, Geometric, Linear, Once
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.statistics.input_norm import InputNorm

PACKAGE = Path(lightning_prune.__file__).parent


@pytest.mark.parametrize("room", ["scorers", "allocations"])
def test_every_file_of_a_folder_is_listed_under_its_name(room: str) -> None:
    files = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
    assert {entry.name for entry in registry.entries(room)} == files


def test_rooms_of_one_file_list_their_concrete_classes() -> None:
    assert [entry.cls for entry in registry.entries("granularity")] == [Block, Channel, NM, Unstructured]
    assert [entry.cls for entry in registry.entries("schedules")] == [Cosine, Cubic, Existing, Geometric, Linear, Once]


def test_entry_reads_summary_and_source_from_the_module_text() -> None:
    entry = next(entry for entry in registry.entries("scorers") if entry.name == "wanda")
    assert entry.cls is Wanda
    assert entry.summary == "Score weights by magnitude times the norm of their input."
    assert "arXiv 2306.11695" in entry.source
    assert "\n" not in entry.source
    assert "Default scope" not in entry.source


@pytest.mark.parametrize("room", ["scorers", "allocations", "schedules"])
def test_every_method_names_its_source(room: str) -> None:
    for entry in registry.entries(room):
        assert entry.summary.endswith((".", ":", ")")), entry
        assert entry.source, f"{entry.name} has no Source: line"


def test_get_takes_file_and_class_names() -> None:
    assert registry.get("scorers", "wanda") is Wanda
    assert registry.get("scorers", "Wanda") is Wanda
    assert registry.get("allocations", "owl") is OWL
    assert registry.statistic("input_norm") is InputNorm


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown scorer 'wnda'; did you mean 'Wanda'\? known: Activation, Fluctuation, Gradient, Magnitude",
    ):
        registry.get("scorers", "wnda")
    with pytest.raises(ValueError, match=r"unknown schedule 'cubik'; did you mean 'Cubic'\?"):
        registry.get("schedules", "cubik")
    with pytest.raises(ValueError, match="unknown scorer 'zzz'; known: Activation"):
        registry.get("scorers", "zzz")
    with pytest.raises(ValueError, match="unknown room 'scorer'; did you mean 'scorers'"):
        registry.entries("scorer")
    with pytest.raises(ValueError, match="unknown statistic 'input_nrm'"):
        registry.statistic("input_nrm")


def test_nearest_ignores_case() -> None:
    assert registry.nearest("WANDA", ["Wanda", "Taylor"]) == "Wanda"
    assert registry.nearest("xyz", ["Wanda", "Taylor"]) is None


def test_unknown_says_when_there_is_no_choice() -> None:
    assert registry.unknown("recipe", "x", []) == "unknown recipe 'x'; there is nothing to choose from here"
