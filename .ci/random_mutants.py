"""Change the library at random places and count how often a test notices.

Run:  python .ci/random_mutants.py [--num 100] [--seed N] [--jobs 2] [--out FILE.json]

A mutant is one change of the syntax tree of one file: a comparison turned (`<` to `<=`, `==` to `!=`, `is` to
`is not`, `in` to `not in`), a sign turned (`+` to `-`, a minus dropped), a call whose result is not used dropped, or a
`raise` dropped. It is tried in a copy of the checkout, against the tests that mirror its file, those that import it,
and a few that reach it through what imports it.
Without `--seed` one is drawn and printed. What survives, and what no test had noticed when the time was over, is shown
as a difference, to be read by a person: a change that alters nothing is no gap in the tests.
"""

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from difflib import unified_diff
from functools import cache
from pathlib import Path
from queue import Queue

import pytest

ROOT = Path(__file__).resolve().parents[1]
TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
LOGGING = re.compile(r"(^|\.)(logger|log|warn|warning|debug|info|set_description|set_postfix)\b")
TIMEOUT_S = 420
NUM_FAR = 6


@dataclass(frozen=True)
class Mutant:
    """One change, where it stands, and what became of it."""

    file: str
    line: int
    kind: str
    difference: str
    outcome: str = ""
    seconds: float = 0.0


def is_left_out(node: ast.AST) -> bool:
    """Return whether a node is no behaviour: assertions about our own mistakes, and imports for type checkers."""
    return isinstance(node, ast.Assert) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def places(node: ast.AST, path: tuple[tuple[str, int], ...] = ()) -> Iterator[tuple[tuple[tuple[str, int], ...], str]]:
    """Yield (path in the tree, kind of change) of everything below a node that can be changed."""
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, ast.AST) or is_left_out(child):
                continue
            here = (*path, (field, index if isinstance(value, list) else -1))
            kind = kind_of(child)
            if kind is not None:
                yield here, kind
            if not isinstance(child, ast.Raise):  # the words of a message are not behaviour
                yield from places(child, here)


def kind_of(node: ast.AST) -> str | None:
    """Return what can be changed about a node."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in TURNED:
            return "comparison"
        case ast.BinOp(op=ast.Add() | ast.Sub(), left=left) if not isinstance(left, ast.Constant | ast.JoinedStr):
            return "sign"
        case ast.UnaryOp(op=ast.USub()):
            return "sign"
        case ast.Expr(value=ast.Call(func=func)) if not LOGGING.search(ast.unparse(func)):
            return "dropped call"
        case ast.Raise():
            return "dropped raise"
    return None


def changed(node: ast.AST) -> ast.AST:
    """Return a node after its change."""
    match node:
        case ast.Compare(ops=[op]):
            node.ops = [TURNED[type(op)]()]
            return node
        case ast.BinOp(op=op):
            node.op = ast.Sub() if isinstance(op, ast.Add) else ast.Add()
            return node
        case ast.UnaryOp(operand=operand):
            return operand
        case _:
            return ast.Pass()


def mutated(tree: ast.Module, path: tuple[tuple[str, int], ...]) -> tuple[str, int]:
    """Return the source of a tree with the node at a path changed, and its line."""
    tree = copy.deepcopy(tree)
    node: ast.AST = tree
    for field, index in path[:-1]:
        value = getattr(node, field)
        node = value if index < 0 else value[index]
    field, index = path[-1]
    value = getattr(node, field)
    old = value if index < 0 else value[index]
    line = old.lineno
    if index < 0:
        setattr(node, field, changed(old))
    else:
        value[index] = changed(old)
    return ast.unparse(ast.fix_missing_locations(tree)), line


@cache
def test_texts() -> dict[Path, str]:
    """Return the text of every test file."""
    return {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}


def dotted(file: Path) -> str:
    """Return the name by which a file of the library is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "lightning_prune" else ("lightning_prune", *parts))


@cache
def library() -> list[Path]:
    """Return the files that are changed."""
    return [*sorted((ROOT / "lightning_prune").rglob("*.py")), *sorted((ROOT / "integrations").rglob("*.py"))]


@cache
def importers() -> dict[str, list[Path]]:
    """Return, of every name a file of the library is imported by, the files that import it, inside functions too."""
    known = {dotted(file) for file in library()}
    found: dict[str, list[Path]] = {name: [] for name in known}
    for file in library():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=aliases):
                    names |= {alias.name for alias in aliases}
                case ast.ImportFrom(module=str(module), names=aliases):
                    names |= {module, *(f"{module}.{alias.name}" for alias in aliases)}
                case ast.Constant(value=str(value)):
                    names.add(value)  # given to importlib
        for name in names & known - {dotted(file)}:
            found[name].append(file)
    return found


def mirrors_of(file: Path) -> list[Path]:
    """Return the tests that are named after a file."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    inner = parts[1:] if parts[0] == "lightning_prune" else parts
    mirror = ROOT.joinpath("tests", *inner[:-1], f"test_{inner[-1]}.py")
    sibling = [path for path in test_texts() if path.stem.startswith(f"test_{inner[-1]}_")]
    return [*([mirror] if mirror.exists() else []), *sibling]


def tests_of(file: Path) -> list[str]:
    """Return the tests that mirror a file, those that import it, then some that reach it through what imports it.

    Of the last there are at most `NUM_FAR`: those that mirror a file that imports it, nearest first. A change that the
    first tests notice costs none of their time, since tests stop at the first failure.
    """
    name = dotted(file)
    package, _, leaf = name.rpartition(".")
    says = re.compile(rf"{re.escape(name)}\b|from {re.escape(package)} import [^\n]*\b{leaf}\b")
    near = dict.fromkeys([*mirrors_of(file), *(path for path, text in test_texts().items() if says.search(text))])
    far: dict[Path, None] = {}
    reached, seen = [file], {file}
    while reached and len(far) < NUM_FAR:
        above = dict.fromkeys(path for one in reached for path in importers()[dotted(one)] if path not in seen)
        seen |= set(above)
        reached = list(above)
        far |= dict.fromkeys(test for one in reached for test in mirrors_of(one) if test not in near)
    return [str(path.relative_to(ROOT)) for path in [*near, *list(far)[:NUM_FAR]]]


def draw(num: int, seed: int) -> list[tuple[Path, ast.Module, tuple[tuple[str, int], ...], str]]:
    """Draw places at random: a file first, so that long files do not take all, then a kind in it, then a place."""
    rng = random.Random(seed)
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in library()}
    found = {path: list(places(tree)) for path, tree in trees.items() if tests_of(path)}
    found = {path: spots for path, spots in found.items() if spots}
    drawn: dict[
        tuple[Path, tuple[tuple[str, int], ...]], tuple[Path, ast.Module, tuple[tuple[str, int], ...], str]
    ] = {}
    while len(drawn) < num:
        path = rng.choice(list(found))
        kind = rng.choice(sorted({kind for _, kind in found[path]}))
        spot = rng.choice([spot for spot, its in found[path] if its == kind])
        drawn[path, spot] = (path, trees[path], spot, kind)
    return list(drawn.values())


def fresh_copy(folder: Path) -> Path:
    """Copy the checkout, links as links: through a folder copied twice a change would not reach what is imported."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def run_tests(folder: Path, tests: list[str]) -> tuple[str, float]:
    """Run tests in a copy; return 'noticed', 'SURVIVED' or 'OUT OF TIME', and the seconds."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, timeout=TIMEOUT_S)
        is_unseen = done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        outcome = "SURVIVED" if is_unseen else "noticed"
    except subprocess.TimeoutExpired:
        outcome = "OUT OF TIME"
    return outcome, time.monotonic() - began


def try_mutant(
    file: Path, tree: ast.Module, spot: tuple[tuple[str, int], ...], kind: str, copies: "Queue[Path]"
) -> Mutant:
    """Put a change into a free copy, run the tests, take it back."""
    name = file.relative_to(ROOT)
    before = ast.unparse(tree)
    after, line = mutated(tree, spot)
    difference = "\n".join(unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2))
    folder = copies.get()
    try:
        (folder / name).write_text(after, encoding="utf-8")
        outcome, seconds = run_tests(folder, tests_of(file))
    finally:
        shutil.copy2(file, folder / name)
        copies.put(folder)
    mutant = Mutant(str(name), line, kind, difference, outcome, round(seconds, 1))
    print(f"{outcome:14} {seconds:6.1f} s  {name}:{line}  {kind}", flush=True)
    return mutant


def main() -> int:
    """Try the mutants and print those that no test notices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    chosen = draw(options.num, seed)
    print(f"{len(chosen)} mutants of {len({file for file, *_ in chosen})} files, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants_") as place:
        copies: Queue[Path] = Queue()
        for number in range(options.jobs):
            copies.put(fresh_copy(Path(place, str(number))))
        with ThreadPoolExecutor(options.jobs) as pool:
            mutants = list(pool.map(lambda drawn: try_mutant(*drawn, copies), chosen))
    survived = [mutant for mutant in mutants if mutant.outcome != "noticed"]
    for mutant in survived:
        print(f"\n{mutant.file}:{mutant.line} ({mutant.kind}, {mutant.outcome})\n{mutant.difference}")
    print(f"\n{len(mutants) - len(survived)} of {len(mutants)} noticed, seed {seed}")
    if options.out is not None:
        result = {"seed": seed, "num": len(mutants), "mutants": [asdict(mutant) for mutant in mutants]}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return len(survived)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
