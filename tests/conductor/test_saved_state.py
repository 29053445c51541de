"""What is saved comes back bit for bit, and what was damaged, changed or made by others is refused."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import NM, Cubic, Sparsifier, Targets
from lightning_prune.conductor import saved_state
from lightning_prune.conductor.guard import GoodMasks, GuardMemory
from lightning_prune.statistics.input_norm import InputNorm
from lightning_prune.statistics.weight_grad import WeightGrad
from lightning_prune.targets.targets import Binding
from tests.tiny_models import tiny_mlp


@pytest.fixture
def bindings() -> list[Binding]:
    return Targets(include=("*",)).resolve(tiny_mlp())


def random_masks(bindings: list[Binding]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {b.name: torch.rand(b.parameter.shape, generator=generator) < 0.5 for b in bindings}


def valid_state(step: int = 3) -> dict[str, Any]:
    """Return the state of a short training."""
    model = tiny_mlp()
    conductor = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    conductor.attach(model, [optimizer], total_steps=6)
    for _ in range(step):
        model(torch.rand(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return conductor.state_dict()


def fresh() -> Sparsifier:
    return Sparsifier(schedule=Cubic(sparsity=0.5, start=1, end=4, interval=1), targets=Targets(include=("*",)))


def test_options_are_described_by_class_and_fields() -> None:
    assert saved_state.describe(NM(n=1, m=8)) == {"class": "NM", "n": 1, "m": 8}
    assert saved_state.describe(Targets(include=("a.*",))) == {"class": "Targets", "include": ["a.*"], "exclude": []}
    assert saved_state.describe(None) is None
    assert saved_state.describe(3) == 3
    assert saved_state.describe(NM) is NM  # a class is no options object


def test_masks_come_back(bindings: list[Binding]) -> None:
    held = random_masks(bindings)
    packed = saved_state.pack_masks(held, bindings)
    assert {name: bits.numel() for name, bits in packed.items()} == {"0.weight": 16, "2.weight": 8}
    found = saved_state.unpack_masks(packed, bindings)
    assert all(torch.equal(found[name], held[name]) for name in held)
    del held["0.weight"]
    assert list(saved_state.unpack_masks(saved_state.pack_masks(held, bindings), bindings)) == ["2.weight"]


def statistics_of(bindings: list[Binding]) -> dict[str, dict[str, Any]]:
    return {
        b.name: {
            "input_norm": InputNorm(b.parameter, b.shape_OI[1]),
            "weight_grad": WeightGrad(b.parameter, 0, beta=0.5),
        }
        for b in bindings
    }


def test_statistics_come_back(bindings: list[Binding]) -> None:
    first, second = statistics_of(bindings), statistics_of(bindings)
    for binding in bindings:
        first[binding.name]["input_norm"].update(torch.rand(5, binding.shape_OI[1]))
        first[binding.name]["weight_grad"].update(binding.parameter.detach(), torch.rand_like(binding.parameter))
    saved = saved_state.gather_statistics(first, bindings)
    assert all(
        isinstance(value, torch.Tensor) for by in saved.values() for one in by.values() for value in one.values()
    )
    saved_state.restore_statistics(saved, second, bindings)
    for binding in bindings:
        for name, statistic in first[binding.name].items():
            restored = second[binding.name][name]
            assert torch.equal(restored.compute(), statistic.compute())
            assert restored.update_called
    # what was saved does not follow what is observed later
    before = saved["0.weight"]["input_norm"]["sum_of_squares"].clone()
    first["0.weight"]["input_norm"].update(torch.ones(1, 8))
    second["0.weight"]["input_norm"].update(torch.ones(1, 8))
    assert torch.equal(saved["0.weight"]["input_norm"]["sum_of_squares"], before)


def test_the_memory_of_a_guard_comes_back(bindings: list[Binding]) -> None:
    weights = {b.name: b.parameter.detach().clone() for b in bindings}
    memory = GuardMemory(
        is_held=True, is_late=True, has_seen=True, good=GoodMasks(0.25, random_masks(bindings), weights)
    )
    found = saved_state.unpack_guard(saved_state.pack_guard(memory, bindings), bindings)
    assert (found.is_held, found.is_late, found.has_seen) == (True, True, True)
    assert memory.good is not None
    assert found.good is not None
    assert found.good.sparsity == 0.25
    for name in weights:
        assert torch.equal(found.good.weights[name], weights[name])
        assert torch.equal(found.good.masks[name], memory.good.masks[name])
    empty = saved_state.unpack_guard(saved_state.pack_guard(GuardMemory(), bindings), bindings)
    assert empty == GuardMemory()


def test_a_state_passes_through_a_file_without_pickled_objects(tmp_path: Path) -> None:
    state = valid_state()
    torch.save(state, tmp_path / "state.pt")
    loaded = saved_state.load_file(str(tmp_path / "state.pt"))
    fresh().load_state_dict(loaded)
    assert loaded.keys() == state.keys()
    assert loaded["digest"] == state["digest"]
    assert all(torch.equal(loaded["masks"][name], bits) for name, bits in state["masks"].items())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    buffer = io.BytesIO()
    torch.save(valid_state(), buffer)
    content = buffer.getvalue()
    path = tmp_path / "state.pt"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cannot read .*state\.pt: it is truncated, damaged or not ours.*earlier"):
        saved_state.load_file(str(path))


def test_text_in_place_of_a_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_text("this is not a checkpoint\n" * 10)
    with pytest.raises(ValueError, match="truncated, damaged or not ours"):
        saved_state.load_file(str(path))


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "state.pt", tmp_path / "executed"
    if kind == "torch":
        torch.save({"format_version": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"format_version": Bomb(mark)}, protocol=2))
    with pytest.raises(ValueError, match="truncated, damaged or not ours"):
        saved_state.load_file(str(path))
    assert not mark.exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"cannot read .*list\.pt: .*\(it is not a file of tensors\)"):
        saved_state.load_file(str(tmp_path / "list.pt"))
    with pytest.raises(FileNotFoundError):
        saved_state.load_file(str(tmp_path / "absent.pt"))


@pytest.mark.parametrize("place", ["open", "read"])
def test_a_disk_that_cannot_be_read_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "state.pt"
    torch.save(valid_state(), path)

    def stale(*args: Any, **kwargs: Any) -> Any:
        raise OSError(116, "Stale file handle")

    if place == "open":
        monkeypatch.setattr("builtins.open", stale)
    else:
        monkeypatch.setattr(torch, "load", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        saved_state.load_file(str(path))


def test_one_flipped_bit_of_a_mask_is_refused() -> None:
    state = valid_state()
    for name in state["masks"]:
        for byte in (0, -1):
            bits = state["masks"][name].clone()
            bits[byte] ^= 1
            changed = state | {"masks": state["masks"] | {name: bits}}
            with pytest.raises(
                ValueError, match="the saved state does not match its digest; the file was changed or damaged"
            ):
                fresh().load_state_dict(changed)
    masks = dict(state["masks"])
    masks["0.weight"], masks["renamed"] = masks["2.weight"], masks.pop("0.weight")
    with pytest.raises(ValueError, match="does not match its digest"):
        fresh().load_state_dict(state | {"masks": masks})


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_format_is_refused(version: object) -> None:
    with pytest.raises(ValueError, match=f"format version {version}, this release reads 1; resume with the release"):
        fresh().load_state_dict(valid_state() | {"format_version": version})


@pytest.mark.parametrize("key", ["step", "settings", "plan", "shapes", "masks", "digest", "statistics", "guard"])
def test_a_state_that_lacks_a_part_is_refused(key: str) -> None:
    state = valid_state()
    del state[key]
    with pytest.raises(ValueError, match=rf"saved pruning state lacks \['{key}'\]; the file is damaged"):
        fresh().load_state_dict(state)


def test_another_recipe_is_refused_by_the_part_that_differs() -> None:
    schedule = Cubic(sparsity=0.6, start=1, end=4, interval=1)
    other = Sparsifier(schedule=schedule, targets=Targets(include=("*",)))
    with pytest.raises(
        ValueError, match=r"written with another recipe: schedule was .*0\.5.*is now .*0\.6.*same recipe"
    ):
        other.load_state_dict(valid_state())


def test_another_model_is_refused_when_attached() -> None:
    conductor = fresh()
    conductor.load_state_dict(valid_state())
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    message = r"written with another model: 0\.weight was \[16, 8\], is now \[12, 8\]; resume with the same model"
    with pytest.raises(ValueError, match=message):
        conductor.attach(model, [torch.optim.SGD(model.parameters(), lr=0.1)], total_steps=6)
    assert not conductor.is_attached


def test_another_plan_is_refused() -> None:
    saved_state.check_plan([1, 4, 1], (1, 4, 1))
    with pytest.raises(
        ValueError, match=r"ran over steps 1 to 4 every 1, now it would be 1 to 8 every 2: the number of"
    ):
        saved_state.check_plan([1, 4, 1], (1, 8, 2))


def test_only_single_numbers_are_metrics() -> None:
    metrics = {
        "loss": 1.5,
        "step": 3,
        "tensor": torch.tensor(2.5),
        "one": torch.tensor([4]),
        "many": torch.ones(2),
        "flag": True,
        "name": "wanda",
        "flag_tensor": torch.tensor(True),
        "none": None,
    }
    assert saved_state.only_numbers(metrics) == {"loss": 1.5, "step": 3.0, "tensor": 2.5, "one": 4.0}


def test_the_digest_covers_every_value_of_a_state() -> None:
    state = {"step": 3, "notes": ["a"], "masks": {"w": torch.tensor([1, 255], dtype=torch.uint8)}, "guard": None}
    first = saved_state.digest(state)
    assert saved_state.digest(dict(reversed(state.items())) | {"digest": "anything"}) == first
    for other in (
        state | {"step": 4},
        state | {"notes": ["b"]},
        state | {"guard": 0},
        state | {"masks": {"w": torch.tensor([1, 254], dtype=torch.uint8)}},
        state | {"masks": {"v": torch.tensor([1, 255], dtype=torch.uint8)}},
        state | {"masks": {"w": torch.tensor([1, 255], dtype=torch.int16)}},
    ):
        assert saved_state.digest(other) != first
