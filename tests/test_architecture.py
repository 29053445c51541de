"""Check the shape of the repository from the syntax tree: floors, rooms, who may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_prune"
ADAPTERS = ROOT / "integrations"

# The floors of a room or file; a number between two floors is a file that belongs to the one above and serves it.
FLOORS: dict[str, float] = {
    "types": 0,
    "statistic": 0,
    "names": 0,
    "whole_file": 0,
    "bounds": 0,
    "distributed": 0,
    "granularity": 1,
    "schedules": 1,
    "layouts": 0.5,
    "layers": 0.6,
    "reparametrized": 0.5,
    "stacks": 0.7,
    "blocks": 0.7,
    "binding": 0.8,
    "choice": 0.8,
    "targets": 1,
    "padding": 1,
    "calls": 1.5,
    "masks": 1,
    "registry": 1,
    "guard": 1,
    "recipe_yaml": 1,
    "scorers": 2,
    "allocations": 2,
    "solvers": 2,
    "predictors": 2,
    "conditional": 3.6,
    "conditional.method": 3.5,
    "conditional.task_units": 3.65,
    "predictors.mask_predictor": 2.4,
    "predictors.proof": 3.2,
    "predictors.generation": 2.3,
    "predictors.marked_cache": 2.3,
    "predictors.sub_model": 3.2,
    "predictors.task_scores": 2.4,
    "predictors.unit_masks": 2.1,
    "predictors.unit_importance": 2.3,
    "predictors.head": 2.2,
    "conditional.decoder_call": 3.4,
    "conditional.stand_in": 3.4,
    "conditional.readout": 3.4,
    "conditional.agreement": 3.4,
    "conditional.imitation": 3.4,
    "conditional.sparse_block": 3.5,
    "conditional.sparse_trial": 3.55,
    "conditional.token_router": 3.55,
    "conditional.block_calls": 3.55,
    "conditional.routed_ffn": 3.57,
    "conditional.chosen_tokens": 3.56,
    "statistics": 2,
    "kernels": 2,
    "structured": 4.4,
    "structured.discovery": 2,
    "structured.depth": 3,
    "structured.width": 3,
    "calibration": 3,
    "closing_notes": 2,
    "decision": 3,
    "fitting": 3,
    "start_line": 2,
    "ties": 2,
    "chosen_masks": 3.4,
    "export.folder": 3,
    "held_masks": 3,
    "hooks": 2,
    "guarding": 3.6,
    "optimizer_steps": 2,
    "progress": 3.5,
    "promised_zeros": 2,
    "observation": 3,
    "loss_gradients": 3.3,
    "oneshot": 3.5,
    "report_plots": 2,
    "report_tables": 2,
    "report_pictures": 2.1,
    "report_condition_plots": 2.1,
    "report_condition": 2.2,
    "saved_state": 2,
    "structured.groups": 1,
    "structured.undo": 1,
    "structured.discovery.blueprint": 2,
    "structured.discovery.expert_mask": 2,
    "structured.discovery.routing": 3.2,
    "structured.cutting": 2,
    "structured.discovery.roles": 2,
    "structured.structure": 2,
    "structured.discovery.fields": 2.1,
    "structured.discovery.layouts": 2.1,
    "structured.discovery.compensation": 2.1,
    "structured.discovery.proposals": 2.2,
    "structured.width.norm_readers": 3.15,
    "structured.width.target_shape": 3.15,
    "structured.discovery.probe": 3.1,
    "structured.discovery.probe_inputs": 3.11,
    "structured.discovery.precision": 3.15,
    "structured.discovery.lists": 2.1,
    "structured.build": 3.1,
    "structured.discovery.stack": 3.2,
    "structured.discovery.sample": 3.25,
    "structured.discovery.discover": 3.3,
    "structured.shrink": 3.4,
    "structured.in_place": 3.5,
    "structured.from_zeros": 2.1,
    "structured.overview": 2.1,
    "structured.cut_zeros": 4.2,
    "structured.width.method": 4.1,
    "recipe_sections": 4.5,
    "recipe_values": 4.4,
    "cli_options": 4.5,
    "cli_overrides": 4.5,
    "structured.method": 2.3,
    "structured.gradual": 3.6,
    "structured.depth.search": 3.1,
    "structured.depth.bypass": 3.1,
    "structured.depth.criteria": 3.1,
    "structured.depth.influence": 3.2,
    "structured.depth.alike": 3.1,
    "structured.depth.fusing": 3.2,
    "structured.depth.shared_block": 3.1,
    "structured.depth.group_replay": 3.2,
    "structured.depth.candidates": 3.2,
    "structured.width.unit_scores": 3.2,
    "structured.cost": 3.25,
    "structured.width.budgets": 3.2,
    "structured.depth.planning": 3.3,
    "structured.depth.methods": 3.4,
    "structured.depth.multipruner": 3.4,
    "structured.depth.replace": 3.4,
    "structured.depth.fuse": 3.4,
    "structured.depth.share": 3.4,
    "structured.width.options": 3.4,
    "structured.width.repair": 3.45,
    "structured.width.expert_usage": 3.45,
    "structured.width.block_by_block": 4,
    "structured.width.reader_repair": 4,
    "structured.width.rotate": 4.1,
    "structured.width.subclone": 4.1,
    "structured.width.low_rank": 4.1,
    "report": 3,
    "report_page": 3,
    "sparsifier": 4,
    "recovery.divergences": 2,
    "recovery.matching": 2,
    "recovery.teacher": 2,
    "recovery.student_call": 2,
    "recovery.token_loss": 2.1,
    "recovery.logit_cache": 2.2,
    "recovery.passages": 2.1,
    "recovery.distill_options": 2.3,
    "recovery.reconstruct_options": 2,
    "recovery.lora_options": 4.45,
    "recovery.teacher_targets": 3,
    "recovery": 4,
    "recovery.reading_order": 3,
    "recovery.refit": 3.6,
    "recovery.twins": 3.5,
    "recovery.learning_rate": 3,
    "export": 4,
    "recipe": 5,
    "cli": 5,
    "integrations": 6,
}
CORE_NEEDS = {"torch", "torchmetrics", "jsonargparse", "yaml", "tqdm"}
# Optional needs of the core, imported inside the function that uses them.
LAZY_NEEDS = {
    "report_plots": {"matplotlib"},
    "report_condition_plots": {"matplotlib"},
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
    return sorted(PACKAGE.rglob("*.py"))


def adapter_files() -> list[Path]:
    return sorted(ADAPTERS.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    """Return the dotted name inside the package, `integrations.x` for an adapter, '' for the package itself."""
    base = ROOT if path.is_relative_to(ADAPTERS) else PACKAGE
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(name: str) -> float | None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        floor = FLOORS.get(".".join(parts[:length]))
        if floor is not None:
            return floor
    return None


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
    """List the imports of one file that do not point down."""
    name = name_of(path)
    floor = floor_of(name)
    if name in ("", "__main__"):
        floor = 7
    assert floor is not None, f"{path} has no floor; add its room to FLOORS"
    wrong = []
    for item in imports(path):
        root, _, inner = item.module.partition(".")
        if root != "lightning_prune":
            continue
        target = floor_of(inner) if inner else 7
        assert target is not None, f"{path}:{item.line}: {item.module} has no floor"
        is_door = name == "cli" and item.is_lazy and target >= floor
        is_sideways_adapter = floor == 6 and target == 6
        if target >= floor and not is_door and not is_sideways_adapter:
            wrong.append(f"{path.relative_to(ROOT)}:{item.line} (floor {floor}) imports {item.module} (floor {target})")
    return wrong


@pytest.mark.parametrize("path", library_files() + adapter_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert breaches(path) == []


def test_floors_notice_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scorers").mkdir()
    bad = tmp_path / "scorers" / "bad.py"
    bad.write_text("from lightning_prune.sparsifier import Sparsifier\n")
    sideways = tmp_path / "scorers" / "sideways.py"
    sideways.write_text("from lightning_prune.scorers.bad import x\n")
    good = tmp_path / "scorers" / "good.py"
    good.write_text("from lightning_prune.types import Scorer\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(breaches(bad)) == 1
    assert len(breaches(sideways)) == 1
    assert breaches(good) == []


def test_core_needs_nothing_else() -> None:
    for path in library_files():
        if path.is_relative_to(PACKAGE / "integrations"):
            continue
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
        if path == PACKAGE / "distributed.py":
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
        "import lightning_prune.cli, lightning_prune.integrations\n"
        "for arguments in (['--help'], ['oneshot', '--help'], ['--version']):\n"
        "    try: lightning_prune.cli.main(arguments)\n"
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
        "import lightning_prune.recipe\n"
        "new = {name for name in set(sys.modules) - before if name.split('.')[0] != 'torch'}\n"
        "assert len(new) < 170, sorted(new)"
    )
    imported_by(own)


def test_public_names_arrive_when_they_are_used() -> None:
    import lightning_prune

    assert set(lightning_prune.__all__) <= set(dir(lightning_prune))
    for name in lightning_prune.__all__:
        assert getattr(lightning_prune, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'lightning_prune' has no attribute 'Sparsifer'"):
        lightning_prune.Sparsifer  # noqa: B018
