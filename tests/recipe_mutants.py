"""Recipes that are wrong in one place, made from right ones: what a slip of the hand, a tool or malice may leave."""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    10**30,
    -0.5,
    1.5,
    1e30,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "Wanda",
    "no.such.Class",
    "os.system",
    "lightning_prune.base.types.Scorer",
    [],
    [None],
    [1, [2]],
    {},
    {"x": 1},
    {3: 4},
    {"class_path": None},
    {"class_path": "Magnitude", "init_args": []},
    {"class_path": "Once", "init_args": {"sparsity": None}},
)


@dataclass(frozen=True)
class Mutant:
    """The text of a recipe, and the keys of which a message about it names one; none where any message will do."""

    text: str
    keys: tuple[str, ...] = ()


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside lists and mappings."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed_values(content: dict[str, Any], rng: random.Random) -> Mutant:
    """Return the recipe with one value replaced, left out, or put under another name."""
    mutant = copy.deepcopy(content)
    *path, last = rng.choice(list(places(mutant)))
    node: Any = mutant
    for key in path:
        node = node[key]
    way = rng.randrange(4)
    keys = [str(key) for key in (*path, last) if isinstance(key, str) and key not in ("class_path", "init_args")]
    if way == 0 and isinstance(node, dict):
        name = rng.choice([f"{last}s", "x", 3, "class_path"])
        node[name] = node.pop(last)
        keys.append(str(name))
    elif way == 1:
        del node[last]
    else:
        node[last] = rng.choice(VALUES)
    is_section_gone = not path and last not in mutant
    return Mutant(yaml.safe_dump(mutant, sort_keys=False), () if is_section_gone else tuple(keys[-2:]))


def changed_text(text: str, rng: random.Random) -> Mutant:
    """Return the file with one line doubled, dropped or cut, or one character replaced."""
    lines = text.splitlines(keepends=True)
    idx = rng.randrange(len(lines))
    way = rng.randrange(5)
    if way == 0:
        lines.insert(idx, lines[idx])
    elif way == 1:
        del lines[idx]
    elif way == 2:
        lines[idx] = lines[idx][: rng.randrange(len(lines[idx]) + 1)]
    elif way == 3:
        lines[idx] = rng.choice(["\t", "  ", "- ", "? ", "&a ", "*a ", "!!python/name:os.system "]) + lines[idx]
    else:
        column = rng.randrange(len(lines[idx]))
        sign = rng.choice("{}[]:,#&*!|>'\"%@`\t\x00\x07\ufeff")
        lines[idx] = lines[idx][:column] + sign + lines[idx][column + 1 :]
    return Mutant("".join(lines))


def mutants(files: list[Path], number: int, seed: int) -> Iterator[Mutant]:
    """Yield recipes, half of them with a wrong value and half with a slip in the text."""
    rng = random.Random(seed)
    for idx in range(number):
        text = rng.choice(files).read_text(encoding="utf-8")
        yield changed_text(text, rng) if idx % 2 else changed_values(yaml.safe_load(text), rng)
