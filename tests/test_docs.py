"""README.md and docs/ say what is so: code runs, recipes load, commands parse, messages, links and figures exist."""

import doctest
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lightning_prune
import lightning_prune.hf
import lightning_prune.lightning
import lightning_prune.structured
from lightning_prune import Once, Recipe, Sparsifier
from lightning_prune.cli import command as cli
from lightning_prune.cli import overrides as cli_overrides
from lightning_prune.conductor.chosen_masks import choose
from lightning_prune.recipe.recipe import packaged_recipes
from tests.tiny_models import TokenDataset, tiny_llama, tiny_mlp, token_windows

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OWN_PAGES = [*PAGES, *sorted(ROOT.glob("C*.md")), ROOT / "SECURITY.md"]
MOST_WORDS = 1_000  # of README.md
# Files that a user's run writes, and a model folder holds.
WRITTEN = {"results.json", "lightning_prune.json", "sparsity.json", "config.json", "search.json", "tasks.json"}


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    page: Path
    line: int
    text: str
    is_slow: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(kind: str, pages: list[Path] = PAGES) -> Iterator[Block]:
    for page in pages:
        text = text_of(page)
        for found in re.finditer(rf"(<!-- test: slow -->\n\n)?^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield Block(page, text[: found.start(2)].count("\n"), found[2], found[1] is not None)


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with_code(*, slow: bool) -> list[Path]:
    return sorted({block.page for block in blocks("python") if block.is_slow == slow})


# Code


def prepared(folder: Path) -> dict[str, Any]:
    """Return what the snippets take as given."""
    from lightning.pytorch import LightningDataModule
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments

    from tests.integrations.trainings import TinyModule

    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TokenDataset(token_windows(16)), batch_size=2)

    model, pruned = tiny_llama(), tiny_llama()
    Sparsifier(schedule=Once(sparsity=0.5)).prune_once(pruned, progress=False)
    pruned.save_pretrained(folder / "pruned")
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return {
        "model": model,
        "pruned": pruned,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batches": [{"input_ids": ids} for ids in token_windows(32, 32).split(8)],
        "data": TokenDataset(token_windows(16)),
        "args": TrainingArguments(str(folder / "out"), max_steps=8, per_device_train_batch_size=2, **quiet),
        "module": TinyModule(),
        "datamodule": Data(),
    }


def run(page: Path, folder: Path, *, slow: bool) -> None:
    """Run the blocks of a page one after the other, in a folder of its own."""
    found = prepared(folder) | {"__name__": "docs"}
    for block in blocks("python", [page]):
        if block.is_slow == slow:
            code = block.text.replace("10_000", "8")
            exec(compile("\n" * block.line + code, str(block.page), "exec"), found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with_code(slow=False), ids=names)
def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_slow_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.integrations.instruction.folder import save_conditional
    from tests.integrations.instruction.test_serving import conditioned
    from tests.model_folders import character_tokenizer

    monkeypatch.chdir(tmp_path)
    save_conditional(conditioned(), tmp_path / "OUT", tokenizer=character_tokenizer())
    assert pages_with_code(slow=True)
    for page in pages_with_code(slow=True):
        run(page, tmp_path, slow=True)


def modules_with_doctests() -> list[str]:
    paths = sorted((ROOT / "lightning_prune").rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if ">>> " in text_of(path)]


@pytest.mark.parametrize("module", modules_with_doctests())
def test_examples_in_docstrings_hold(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("block", list(blocks("yaml")), ids=str)
def test_a_recipe_loads(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text, encoding="utf-8")
    recipe = Recipe.load(path)
    assert Recipe.load(recipe.as_dict()) == recipe


def commands() -> Iterator[tuple[str, str]]:
    for block in blocks("bash", OWN_PAGES):
        for number, line in enumerate(block.text.splitlines()):
            if "lightning-prune" in line:
                yield f"{block.page.name}:{block.line + number + 1}", line[line.index("lightning-prune") :]


@pytest.mark.parametrize(("place", "line"), list(commands()))
def test_a_command_parses(place: str, line: str) -> None:
    options, rest = cli._parse(shlex.split(line, comments=True)[1:])
    takes_recipe = options.command in (cli._run, cli._oneshot, cli._exec, cli._quickstart, cli._inspect)
    if takes_recipe and getattr(options, "config", None) not in (None, "FILE"):
        overrides, _ = cli_overrides.split(rest)
        assert Recipe.load(options.config, overrides=overrides).name == options.config
    else:
        cli_overrides.refuse(rest)
    assert options.program or options.command is not cli._exec


def test_recipes_are_named_as_they_are() -> None:
    known = set(packaged_recipes())
    rooms = "|".join(sorted({name.partition("/")[0] for name in known}))
    for page in OWN_PAGES:
        for found in re.findall(rf"[`\"= ]((?:{rooms})/[a-z0-9_]+)[`\" \n)]", text_of(page)):
            is_folder = (ROOT / "lightning_prune" / found).is_dir()
            assert found in known or is_folder, f"{page.name} names {found}"


# Links and figures


@pytest.mark.parametrize("page", OWN_PAGES, ids=names)
def test_links_and_named_files_exist(page: Path) -> None:
    text = text_of(page)
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`(?:[\w/]*/)?(\w+\.json)`", text):
        assert name in WRITTEN or (ROOT / "benchmarks" / "results" / name).is_file(), f"{page.name} names {name}"
    for name in re.findall(r"`(?:python )?((?:benchmarks|docs|tests|\.ci)/[\w/]+(?:\.py)?)[ `]", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_hold_the_figures_of_the_results() -> None:
    writer = tables()
    for page in PAGES:
        assert writer.filled(text_of(page)) == text_of(page), f"{page.name} is stale: run python docs/tables.py"
    shown = {name for page in PAGES for name in re.findall(r"<!-- table (\w+) -->", text_of(page))}
    assert shown == set(writer.TABLES)


def test_a_stale_table_is_noticed() -> None:
    writer = tables()
    page = text_of(ROOT / "docs" / "recovery.md")
    assert page.count("| full fine-tuning | 100 % | 7.15 ") == 1
    assert writer.filled(page.replace("7.15 ", "7.05 ")) == page


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) < MOST_WORDS


def test_the_files_of_the_repository_are_read_as_they_should() -> None:
    hidden = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    found = {path.name: yaml.safe_load(text_of(path)) for path in hidden}
    assert {"run": ".ci/run"}.items() <= found["ci.yml"]["jobs"]["run"]["steps"][-1].items()
    assert found["CITATION.cff"]["version"] == lightning_prune.__version__
    assert f"## {lightning_prune.__version__}" in text_of(ROOT / "CHANGELOG.md")
    for form in ("bug.yml", "idea.yml"):
        assert all(field["attributes"]["label"] for field in found[form]["body"])
    for hook in found[".pre-commit-config.yaml"]["repos"][0]["hooks"]:
        assert hook["language"] == "system"


def test_public_names_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text_of(ROOT / "docs" / "versions.md"), re.MULTILINE)
    doors = (lightning_prune.lightning, lightning_prune.hf)
    for module in (lightning_prune, lightning_prune.structured, *doors):
        assert sorted(re.findall(r"`(\w+)`", dict(rows)[module.__name__])) == sorted(module.__all__)


# Messages


def messages_of_the_library() -> list[str]:
    """Return the lines of the library, strings that go over several lines joined."""
    paths = [*(ROOT / "lightning_prune").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(text_of(path) for path in paths)).splitlines()


def test_messages_of_the_faq_are_those_of_the_library() -> None:
    messages = re.findall(r"^\*\*(.+)\*\*$", text_of(ROOT / "docs" / "faq.md"), re.MULTILINE)
    assert len(messages) > 20
    lines = messages_of_the_library()
    for message in messages:
        parts = message.split("...")
        pattern, longest = re.compile(".*".join(map(re.escape, parts))), max(parts, key=len)
        assert any(longest in line and pattern.search(line) for line in lines), f"docs/faq.md: no message {message!r}"


# The walks


@dataclass(frozen=True)
class Arrow:
    """One line of a walk: this module calls this function of that module."""

    place: str
    caller: str
    function: str
    home: str


def arrows() -> Iterator[Arrow]:
    for block in blocks("walk"):
        for line in block.text.splitlines():
            found = re.fullmatch(r"([\w.]+) +--(\w+)--> +([\w.]+)", line)
            assert found, f"{block}: cannot read {line!r}"
            yield Arrow(str(block), *found.groups())


def source(module: str) -> str:
    folder = ROOT if module.startswith("integrations.") else ROOT / "lightning_prune"
    return text_of(folder / f"{module.replace('.', '/')}.py")


@pytest.mark.parametrize("arrow", list(arrows()), ids=lambda arrow: f"{arrow.caller}-{arrow.function}")
def test_a_walk_follows_the_source(arrow: Arrow) -> None:
    text, home = source(arrow.caller), arrow.home.rpartition(".")
    whole = f"lightning_prune.{arrow.home}"
    parent = f"from lightning_prune{'.' if home[0] else ''}{home[0]} import "
    is_named = whole in text or re.search(rf"^{parent}.*\b{home[2]}\b", text, re.MULTILINE)
    assert is_named, f"{arrow.place}: {arrow.caller} does not import {arrow.home}"
    assert re.search(rf"\b{arrow.function}\(", text), f"{arrow.place}: {arrow.caller} does not call {arrow.function}"
    found = re.search(rf"^\s*(?:def|class) {arrow.function}\b", source(arrow.home), re.MULTILINE)
    assert found, f"{arrow.place}: {arrow.home} has no {arrow.function}"


def test_a_step_goes_in_the_order_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.calibration import hooks
    from lightning_prune.calibration.observation import Observation
    from lightning_prune.conductor import sparsifier
    from lightning_prune.conductor.held_masks import HeldMasks

    seen: list[str] = []

    def watched(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return plain(*args, **kwargs)

        return call

    model = tiny_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    conductor = Sparsifier(schedule=lightning_prune.Linear(sparsity=0.5, start=0, end=4, interval=1))
    conductor.attach(model, [optimizer], total_steps=8)
    for place, name in ((HeldMasks, "apply"), (HeldMasks, "set"), (Observation, "feed_step")):
        monkeypatch.setattr(place, name, watched(name, getattr(place, name)))
    monkeypatch.setattr(hooks, "zero_pruned_gradient", watched("zero_pruned_gradient", hooks.zero_pruned_gradient))
    monkeypatch.setattr(sparsifier, "choose", watched("choose", choose))
    for _ in range(2):
        seen.clear()
        nn.functional.mse_loss(model(torch.randn(4, 8)), torch.zeros(4, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    (block,) = blocks("order")
    assert list(dict.fromkeys(seen)) == [line.split()[0] for line in block.text.splitlines()]
