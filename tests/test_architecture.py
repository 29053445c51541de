"""Check the shape of the repository from the syntax tree: floors, rooms, who may import what."""

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_prune.base import registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_prune"
ADAPTERS = ROOT / "integrations"

# A room imports itself and the rooms before it.
ROOMS = (
    "base",
    "granularity",
    "schedules",
    "allocations",
    "targets",
    "calibration",
    "statistics",
    "scorers",
    "solvers",
    "report",
    "structured",
    "predictors",
    "recovery",
    "conditional",
    "conductor",
    "kernels",
    "export",
    "recipe",
    "cli",
    "integrations.models",
    "integrations.text",
    "integrations.evaluation",
    "integrations.lora",
    "integrations.per_layer",
    "integrations.instruction",
    "integrations.runs",
    "integrations.trainers",
    "integrations.folders",
    "integrations.demo",
    "integrations.programs",
    "hf",
    "lightning",
)
# One method a file: these know nothing of each other.
SIBLINGS = {"allocations", "scorers", "solvers", "statistics"}
CORE_NEEDS = {"torch", "torchmetrics", "jsonargparse", "yaml", "tqdm"}
# Optional needs of the core, imported inside the function that uses them.
LAZY_NEEDS = {
    "report.plots": {"matplotlib"},
    "report.condition_plots": {"matplotlib"},
    "export.dense": {"safetensors"},
    "export.read_back": {"safetensors"},
}
TRAINERS = {"lightning", "pytorch_lightning", "transformers", "accelerate", "peft", "lm_eval", "datasets", "trl"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}


@dataclass(frozen=True)
class Imported:
    """One imported module, and whether the import is put off: inside a function, or for type checkers alone."""

    module: str
    line: int
    is_lazy: bool


def library_files() -> list[Path]:
    paths = PACKAGE.rglob("*.py")
    return sorted(path for path in paths if path.relative_to(PACKAGE).parts[0] != "integrations")  # a link


def adapter_files() -> list[Path]:
    return sorted(ADAPTERS.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    """Return the dotted name inside the package, `integrations.x` for an adapter, '' for the package itself."""
    base = ROOT if path.is_relative_to(ADAPTERS) else PACKAGE
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(name: str) -> str:
    """Return the room that a module stands in."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "integrations" else parts[0]


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def is_deferred(block: ast.AST) -> bool:
    """Return whether what stands in a block is not run when the file is imported."""
    is_for_types = isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
    return is_for_types or isinstance(block, (ast.FunctionDef, ast.AsyncFunctionDef))


def imports(path: Path) -> Iterator[Imported]:
    tree = parse(path)
    inside = {id(node) for block in ast.walk(tree) if is_deferred(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        lazy = id(node) in inside
        if isinstance(node, ast.Import):
            yield from (Imported(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("lightning_prune.")
                is_inner = node.module.partition(".")[0] == "lightning_prune" and is_module(inner)
                yield Imported(f"lightning_prune.{inner}" if is_inner else node.module, node.lineno, lazy)


def breaches(path: Path) -> list[str]:
    """List the imports of one file that do not point to its own room or to one before it."""
    name = name_of(path)
    room = room_of(name)
    if room in ("", "__main__"):
        return []
    assert room in ROOMS, f"{path} stands in no room; add its room to ROOMS"
    wrong = []
    for item in imports(path):
        root, _, inner = item.module.partition(".")
        if root != "lightning_prune" or not inner:
            continue
        other = room_of(inner)
        assert other in ROOMS, f"{path}:{item.line}: {item.module} stands in no room"
        is_door = room == "cli" and item.is_lazy
        is_sideways = other == room and room in SIBLINGS and inner != room
        if not is_door and (is_sideways or ROOMS.index(other) > ROOMS.index(room)):
            wrong.append(f"{path.relative_to(ROOT)}:{item.line} ({room}) imports {item.module} ({other})")
    return wrong


@pytest.mark.parametrize("path", library_files() + adapter_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert breaches(path) == []


def test_no_file_needs_itself() -> None:
    graph = {}
    for path in library_files() + adapter_files():
        at_once = (item.module for item in imports(path) if not item.is_lazy)
        graph[name_of(path)] = {module.removeprefix("lightning_prune.") for module in at_once} - {"lightning_prune"}
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a cycle


def test_rooms_notice_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scorers").mkdir()
    bad = tmp_path / "scorers" / "bad.py"
    bad.write_text("from lightning_prune.conductor.sparsifier import Sparsifier\n")
    sideways = tmp_path / "scorers" / "sideways.py"
    sideways.write_text("from lightning_prune.scorers.bad import x\n")
    good = tmp_path / "scorers" / "good.py"
    good.write_text("from lightning_prune.base.types import Scorer\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(breaches(bad)) == 1
    assert len(breaches(sideways)) == 1
    assert breaches(good) == []


@pytest.mark.parametrize("name", ["hf_trainer", "lightning_trainer", "peft_lora", "text_data"])
def test_an_adapter_is_found_by_its_file_alone(name: str) -> None:
    found = importlib.import_module(f"lightning_prune.integrations.{name}")
    assert room_of(found.__name__.removeprefix("lightning_prune.")) in ROOMS
    assert found is importlib.import_module(found.__name__)
    assert getattr(found.__spec__, "name", None) == found.__name__


def test_an_adapter_that_is_not_there_is_missed_as_usual() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"integrations\.no_such_file"):
        importlib.import_module("lightning_prune.integrations.no_such_file")


def test_core_needs_nothing_else() -> None:
    for path in library_files():
        allowed_lazily = LAZY_NEEDS.get(name_of(path), set())
        for item in imports(path):
            root = item.module.partition(".")[0]
            if root in sys.stdlib_module_names or root in CORE_NEEDS or root == "lightning_prune":
                continue
            assert item.is_lazy, f"{path}:{item.line} imports {root}, which the core does not need"
            assert root in allowed_lazily, f"{path}:{item.line} imports {root}"


def test_trainers_stay_in_integrations() -> None:
    for path in library_files():
        roots = {item.module.partition(".")[0] for item in imports(path)}
        assert not roots & TRAINERS, f"{path} imports {roots & TRAINERS}"


def test_process_groups_are_known_in_one_file() -> None:
    for path in library_files() + adapter_files():
        if path == PACKAGE / "base" / "distributed.py":
            continue
        for item in imports(path):
            assert not item.module.startswith("torch.distributed"), f"{path}:{item.line} imports {item.module}"
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Name):
                assert node.id != "DTensor", f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.distributed", f"{path}:{node.lineno}"
                assert node.attr != "DTensor", f"{path}:{node.lineno}"


def test_no_room_for_leftovers() -> None:
    for path in library_files() + adapter_files():
        assert path.stem not in FORBIDDEN_NAMES, f"{path}: name the file after what it holds"


def test_integrations_is_no_package_and_shadows_nothing() -> None:
    assert not (ADAPTERS / "__init__.py").exists()
    for path in ADAPTERS.iterdir():
        assert path.stem not in TRAINERS, f"{path} would shadow the library it adapts"
        assert path.stem not in sys.stdlib_module_names, f"{path} would shadow the standard library"


@pytest.mark.parametrize("path", library_files() + adapter_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short_and_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), f"{path} holds characters outside ASCII"
    assert text.count("\n") <= 400, f"{path} is over 400 lines"
    tree = parse(path)
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 50, f"{path}:{node.lineno} {node.name} is over 50 lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno} catches everything"


SLOW_TO_IMPORT = TRAINERS | {"torch", "torchmetrics", "jsonargparse", "scipy", "matplotlib", "numpy", "tqdm"}


def imported_by(statements: str) -> tuple[set[str], int]:
    """Return which of the slow packages a program imports, and how many modules in all."""
    program = f"import sys\n{statements}\nprint(*sorted(set(sys.modules) & {SLOW_TO_IMPORT!r}), len(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    *found, number = result.stdout.splitlines()[-1].split()
    return set(found), int(number)


def test_the_command_line_answers_before_anything_slow_is_imported() -> None:
    answer = (
        "import lightning_prune.cli.command, lightning_prune.integrations\n"
        "for arguments in (['--help'], ['oneshot', '--help'], ['--version']):\n"
        "    try: lightning_prune.cli.command.main(arguments)\n"
        "    except SystemExit as ended: assert ended.code == 0"
    )
    found, number = imported_by(answer)
    assert found == set()
    assert number < 300  # 166 measured; torch alone brings over a thousand


def test_a_recipe_imports_torch_and_nothing_slow_beside_it() -> None:
    found, _ = imported_by("from lightning_prune import *\nRecipe.load('train/gradual_magnitude')")
    assert found <= {"torch", "numpy", "tqdm"}
    own = (
        "import torch, torch.distributed.tensor\n"
        "before = set(sys.modules)\n"
        "import lightning_prune.recipe.recipe\n"
        "new = {name for name in set(sys.modules) - before if name.split('.')[0] != 'torch'}\n"
        "assert len(new) < 170, sorted(new)"
    )
    imported_by(own)


def test_public_names_arrive_when_they_are_used() -> None:
    import lightning_prune

    assert set(lightning_prune.__all__) <= set(dir(lightning_prune))
    for name in lightning_prune.__all__:
        assert getattr(lightning_prune, name).__name__ == name
    tree = parse(PACKAGE / "__init__.py")
    (block,) = (node for node in tree.body if isinstance(node, ast.If))  # what editors and type checkers see
    seen = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {f"lightning_prune.{home}.{name}" for home, names in lightning_prune._HOMES.items() for name in names}
    assert seen == homes
    assert {name.rpartition(".")[2] for name in homes} == set(lightning_prune.__all__)
    for room in ("scorers", "allocations", "conditional", "granularity", "schedules"):
        assert {entry.cls.__name__ for entry in registry.entries(room)} <= set(lightning_prune.__all__), room
    with pytest.raises(AttributeError, match="module 'lightning_prune' has no attribute 'Sparsifer'"):
        lightning_prune.Sparsifer  # noqa: B018
