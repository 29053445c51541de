"""Read an exported folder from disk and compare its zeros with those of the model it was written from."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.base.types import Report
from lightning_prune.targets.targets import clean_name

__all__ = ["zeros_lost"]


def zeros_lost(folder: str | Path, report: Report) -> str | None:
    """Say whether an exported folder holds fewer zeros than the model.

    A tensor of the same name is compared by itself. What a class writes under other names, split, stacked or tied, is
    compared in sum: renaming and cutting apart keep the number of zeros.

    Args:
        folder: with `model.pt` or any number of safetensors files.
        report: of the model as it was written.

    Returns:
        a sentence with the first target that differs; None if every zero is there.

    Raises:
        ValueError: if the folder holds no weights.
    """
    files = _files(Path(folder).expanduser())
    expected = {target.name: target for target in report.targets}
    target_of = _renaming(list(expected), {clean_name(name) for file in files for name in _names(file)})
    zeros: dict[str, int] = {}
    others = 0
    for name, tensor in (item for file in files for item in _tensors(file)):
        num_zeros = tensor.numel() - int(torch.count_nonzero(tensor))
        found = target_of.get(clean_name(name))
        if found is None or expected[found].num_weights != tensor.numel():
            others += num_zeros
        else:
            zeros[found] = num_zeros
    short = [target for name, target in expected.items() if name in zeros and zeros[name] < target.num_zeros]
    if short:
        lost = sum(target.num_zeros - zeros[target.name] for target in short)
        return f"the exported folder {folder} lacks {lost} zeros of {len(short)} targets, first {short[0].name}"
    elsewhere = [target for name, target in expected.items() if name not in zeros]
    missing = sum(target.num_zeros for target in elsewhere) - others
    if missing > 0:
        return f"the exported folder {folder} lacks {missing} zeros or more, of {elsewhere[0].name} and others"
    return None


def _renaming(targets: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Return what a file calls each target; what is in front of the written part of a model is left out."""
    depths = range(max((target.count(".") for target in targets), default=0) + 1)
    ways = [{target.split(".", depth)[-1]: target for target in targets} for depth in depths]
    return max(ways, key=lambda way: sum(name in names for name in way))


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("model.pt"))
    if not files:
        raise ValueError(f"{folder} holds no weights that can be read back")
    return files


def _names(file: Path) -> list[str]:
    return [name for name, _ in _tensors(file)] if file.suffix == ".pt" else list(_header(file))


def _header(file: Path) -> Iterator[str]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as content:
        yield from content.keys()


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".pt":
        yield from torch.load(file, map_location="cpu", weights_only=True).items()
        return
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as content:
        for name in _header(file):
            yield name, content.get_tensor(name)
