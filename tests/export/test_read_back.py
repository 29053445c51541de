"""What an exported folder holds is compared with the model it was written from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_prune.base.types import Report, TargetReport
from lightning_prune.export.read_back import zeros_lost


def half(*shape: int) -> Tensor:
    """Return a tensor in which every other number is zero."""
    flat = torch.arange(1.0, 1 + torch.Size(shape).numel())
    flat[::2] = 0.0
    return flat.view(shape)


def report(**zeros: int) -> Report:
    targets = tuple(TargetReport(name.replace("__", "."), (4, 4), 16, number) for name, number in zeros.items())
    return Report(4, targets, 99, 50, 0, 0, 0, 0)


def written(folder: Path, *parts: dict[str, Tensor]) -> Path:
    for idx, tensors in enumerate(parts):
        save_file(tensors, str(folder / f"model-{idx}.safetensors"))
    return folder


def test_every_zero_is_there(tmp_path: Path) -> None:
    folder = written(tmp_path, {"a.weight": half(4, 4)}, {"b.weight": torch.ones(4, 4), "c": torch.ones(2)})
    assert zeros_lost(folder, report(a__weight=8, b__weight=0)) is None


def test_a_target_that_lost_zeros_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, {"a.weight": half(4, 4), "b.weight": half(4, 4), "c": torch.zeros(40)})
    lost = zeros_lost(folder, report(a__weight=8, b__weight=9))
    assert lost == f"the exported folder {folder} lacks 1 zeros of 1 targets, first b.weight"


def test_names_in_front_of_the_written_part_are_left_out(tmp_path: Path) -> None:
    folder = written(tmp_path, {"layers.0.weight": half(4, 4), "layers.1.weight": torch.ones(4, 4)})
    assert zeros_lost(folder, report(net__layers__0__weight=8, net__layers__1__weight=0)) is None
    assert "first net.layers.1.weight" in str(
        zeros_lost(folder, report(net__layers__0__weight=8, net__layers__1__weight=8))
    )


def test_what_is_written_under_other_names_counts_in_sum(tmp_path: Path) -> None:
    folder = written(tmp_path, {"experts.0": half(2, 4), "experts.1": half(2, 4), "a.weight": half(4, 4)})
    assert zeros_lost(folder, report(a__weight=8, fused=8)) is None
    assert "lacks 1 zeros or more, of fused and others" in str(zeros_lost(folder, report(a__weight=8, fused=9)))


def test_a_tensor_of_another_size_is_no_target(tmp_path: Path) -> None:
    folder = written(tmp_path, {"a.weight": half(2, 4), "a.rest": half(2, 4)})
    assert zeros_lost(folder, report(a__weight=8)) is None


def test_a_torch_file_is_read_too(tmp_path: Path) -> None:
    torch.save({"a.weight": half(4, 4)}, tmp_path / "model.pt")
    assert zeros_lost(tmp_path, report(a__weight=8)) is None
    assert "first a.weight" in str(zeros_lost(tmp_path, report(a__weight=9)))


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights that can be read back"):
        zeros_lost(tmp_path, report(a__weight=1))
