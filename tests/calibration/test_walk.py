"""The walk over blocks: it computes what the model computes, holds one block's inputs, and leaves no trace."""

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.calibration.walk import evaluating, forward_all, to_device, walk_blocks
from lightning_prune.targets.targets import find_blocks
from tests.tiny_models import tiny_family, tiny_llama, token_windows

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3_moe", "t5", "bert"]
Visit = Callable[[nn.Module, Callable[[], None]], None]


def just_run(block: nn.Module, run: Callable[[], None]) -> None:
    run()


def walk(model: nn.Module, batches: list[dict[str, Any]], visit: Visit = just_run, **options: Any) -> None:
    blocks = options.pop("blocks", None) or find_blocks(model)
    options = {"device": CPU, "stop_after_blocks": True, "progress": False} | options
    walk_blocks(model, batches, blocks, visit, **options)


def batches_for(family: str) -> list[dict[str, Any]]:
    """Return three batches of different lengths."""
    ids = [token_windows(2, length, seed=length) for length in (5, 8, 3)]
    return [{"input_ids": each} | ({"decoder_input_ids": each[:, :2]} if family == "t5" else {}) for each in ids]


def first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def block_inputs(model: nn.Module, compute: Callable[[], None]) -> list[list[Tensor]]:
    """Return the inputs that every block was called with, in order, one list per block."""
    seen: list[list[Tensor]] = [[] for _ in find_blocks(model)]
    handles = []
    for block, inputs in zip(find_blocks(model), seen, strict=True):
        layer = next(
            module for module in block.modules() if not list(module.children())
        )  # inside: runs where block runs
        handles.append(layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].clone())))
    compute()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_that_changes_nothing_is_a_plain_forward(family: str) -> None:
    model = tiny_family(family)
    batches = batches_for(family)
    outputs: list[Tensor] = []
    with evaluating(model):
        handle = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
        expected = block_inputs(model, lambda: forward_all(model, batches, CPU, progress=False, title=""))
        seen = block_inputs(model, lambda: walk(model, batches, lambda block, run: None, stop_after_blocks=False))
        handle.remove()
    assert len(outputs) == 6
    assert all(torch.equal(walked, plain) for walked, plain in zip(outputs[3:], outputs[:3], strict=True))
    assert [len(inputs) for inputs in seen] == [3] * len(seen)
    for walked_inputs, plain_inputs in zip(seen, expected, strict=True):
        assert all(torch.equal(walked, plain) for walked, plain in zip(walked_inputs, plain_inputs, strict=True))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_block_sees_what_the_changed_blocks_before_it_give(family: str) -> None:
    model, changed = tiny_family(family), tiny_family(family)
    batches = batches_for(family)

    @torch.no_grad()
    def halve(block: nn.Module) -> None:
        for parameter in block.parameters():
            parameter.mul_(0.5)

    observed: list[list[Tensor]] = []

    def visit(block: nn.Module, run: Callable[[], None]) -> None:
        index = find_blocks(model).index(block)
        observed.append(block_inputs(model, run)[index])
        halve(block)

    with evaluating(model), evaluating(changed):
        walk(model, batches, visit)
        for index, block in enumerate(find_blocks(changed)):
            # a plain forward through the blocks changed so far
            plain = block_inputs(changed, lambda: forward_all(changed, batches, CPU, progress=False, title=""))[index]
            assert all(torch.equal(walked, want) for walked, want in zip(observed[index], plain, strict=True))
            halve(block)


class Recorder(nn.Module):
    """A block that remembers, weakly, every tensor it made."""

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.made = made
        self.num_alive_before: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.num_alive_before.append(num_alive(self.made))
        output = inputs @ self.weight
        self.made.append(weakref.ref(output))
        return output


def num_alive(made: list[weakref.ref[Tensor]]) -> int:
    return sum(ref() is not None for ref in made)


class Chain(nn.Module):
    """Blocks in a list, then a head."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head or nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


def test_no_more_than_the_inputs_of_one_block_are_alive() -> None:
    made: list[weakref.ref[Tensor]] = []
    model = Chain([Recorder(made) for _ in range(5)])
    batches = [{"inputs": torch.rand(2, 4)} for _ in range(6)]
    alive_at_visit = []
    gc.disable()  # what only the collector frees counts as alive
    try:
        with torch.no_grad():
            walk(
                model,
                batches,
                lambda block, run: (run(), alive_at_visit.append(num_alive(made)))[0],
                blocks=list(model.blocks),
            )
    finally:
        gc.enable()
    assert alive_at_visit == [0, 6, 6, 6, 6]
    # one batch more while its output replaces its input
    assert max(count for block in model.blocks for count in block.num_alive_before) <= 7
    assert num_alive(made) == 0


class Fails(nn.Module):
    """Raises in its forward for batches of a given size."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.batch_size = batch_size

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == self.batch_size:
            raise KeyError("broken on purpose")
        return inputs @ self.weight


def left_behind(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("where", ["block", "head", "before"])
def test_an_exception_inside_the_model_comes_out_and_leaves_no_trace(where: str) -> None:
    linear, failing = [nn.Linear(4, 4), nn.Linear(4, 4)], Fails(2)
    model: nn.Module = {
        "block": Chain([linear[0], failing, linear[1]]),
        "head": Chain([*linear], head=failing),
        "before": nn.Sequential(failing, Chain([*linear])),
    }[where]
    if where == "before":
        model = type("Wrapped", (nn.Module,), {"forward": lambda self, inputs: self.chain(self.first(inputs))})()
        model.first, model.chain = failing, Chain([*linear])
    num_threads = threading.active_count()
    batches = [{"inputs": torch.rand(size, 4)} for size in (1, 2, 3)]
    with pytest.raises(KeyError, match="broken on purpose"):
        walk(model, batches, stop_after_blocks=False)
    assert left_behind(model) == []
    assert threading.active_count() == num_threads
    assert torch.is_grad_enabled()


def test_an_exception_in_a_visit_comes_out_and_leaves_no_trace() -> None:
    model = tiny_llama()
    num_threads = threading.active_count()

    def visit(block: nn.Module, run: Callable[[], None]) -> None:
        raise ZeroDivisionError("in a visit")

    with pytest.raises(ZeroDivisionError, match="in a visit"):
        walk(model, batches_for("llama"), visit)
    assert left_behind(model) == []
    assert threading.active_count() == num_threads


def test_a_model_that_swallows_exceptions_does_not_go_on() -> None:
    class Swallows(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            try:
                return super().forward(inputs)
            except Exception:  # noqa: BLE001 - what such models do
                return self.head(inputs)

    calls: list[int] = []
    head = nn.Identity()
    head.register_forward_hook(lambda module, args, output: calls.append(1))
    walk(Swallows([nn.Linear(4, 4), nn.Linear(4, 4)], head), [{"inputs": torch.rand(2, 4)}])
    assert calls == []


def test_what_follows_the_last_block_runs_only_when_asked() -> None:
    for stop_after_blocks, expected in ((True, 0), (False, 2)):
        calls: list[int] = []
        head = nn.Identity()
        head.register_forward_hook(lambda module, args, output, calls=calls: calls.append(1))
        model = Chain([nn.Linear(4, 4), nn.Linear(4, 4)], head)
        batches = [{"inputs": torch.rand(2, 4)}, {"inputs": torch.rand(1, 4)}]
        walk(model, batches, blocks=list(model.blocks), stop_after_blocks=stop_after_blocks)
        assert len(calls) == expected


def test_a_block_with_a_forward_of_its_own_gets_it_back() -> None:
    model = Chain([nn.Linear(4, 4), nn.Linear(4, 4)])
    own = model.blocks[1].forward
    model.blocks[1].forward = own
    walk(model, [{"inputs": torch.rand(2, 4)}])
    assert left_behind(model) == [model.blocks[1]]
    assert model.blocks[1].forward is own


def test_a_shared_block_is_visited_at_its_first_call_and_runs_at_the_next() -> None:
    shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model = Chain([shared, other, shared])
    inputs = torch.rand(2, 4)
    visited = []
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    walk(
        model,
        [{"inputs": inputs}],
        lambda block, run: visited.append(block),
        blocks=[shared, other],
        stop_after_blocks=False,
    )
    assert visited == [shared, other]
    assert torch.equal(outputs[0], shared(other(shared(inputs))))


def test_batches_may_pass_by_a_block() -> None:
    class Skips(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            for block in self.blocks[len(inputs) % 2 :]:
                inputs = block(inputs)
            return inputs

    model = Skips([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    inputs = [torch.rand(size, 4) for size in (1, 2, 3)]
    reached: list[list[int]] = []

    def visit(block: nn.Module, run: Callable[[], None]) -> None:
        sizes: list[int] = []
        handle = block.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        run()
        handle.remove()
        reached.append(sizes)

    walk(model, [{"inputs": each} for each in inputs], visit)
    assert reached[0] == [2]
    assert [sorted(sizes) for sizes in reached[1:]] == [[1, 2, 3], [1, 2, 3]]


def test_hooks_on_a_block_itself_are_called() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    calls = []

    def visit(block: nn.Module, run: Callable[[], None]) -> None:
        with_hook = block.register_forward_pre_hook(lambda module, args: calls.append(module))
        run()
        with_hook.remove()

    walk(model, [{"input": torch.rand(3, 4)}], visit)
    assert calls == [model[0], model[1]]


def test_hooks_on_a_block_change_its_output_once() -> None:
    model = Chain([nn.Linear(4, 4), nn.Linear(4, 4)])
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: 3 * output)
    inputs = torch.rand(2, 4)
    expected = model(inputs)
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    walk(model, [{"inputs": inputs}], stop_after_blocks=False)
    assert torch.equal(outputs[0], expected)


def test_autocast_reaches_what_lies_before_the_blocks() -> None:
    class Projected(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(self.first(inputs))

    model = Projected([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.first = nn.Linear(4, 4)
    inputs = torch.rand(8, 4)
    dtypes = []
    with torch.autocast("cpu", torch.bfloat16):
        seen = block_inputs(model, lambda: walk(model, [{"inputs": inputs}]))
        dtypes = [each.dtype for each in seen[0]]
    assert set(dtypes) == {torch.bfloat16}


def test_bars_are_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    batches = batches_for("llama")
    walk(tiny_llama(), batches, progress=False)
    forward_all(tiny_llama(), batches, CPU, progress=False, title="calibrating")
    assert capsys.readouterr().err == ""
    walk(tiny_llama(), batches, progress=True)
    forward_all(tiny_llama(), batches, CPU, progress=True, title="calibrating")
    shown = capsys.readouterr().err
    assert "pruning blocks: 100%" in shown
    assert "2/2" in shown
    assert "calibrating: 100%" in shown
    assert "3/3" in shown


def test_batches_are_moved_and_run_without_gradients() -> None:
    moved = to_device({"ids": torch.ones(2), "use_cache": False}, torch.device("meta"))
    assert moved["ids"].device.type == "meta"  # type: ignore[attr-defined]
    assert moved["use_cache"] is False
    model = nn.Linear(2, 2)
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    forward_all(model, ({"input": torch.rand(1, 2)} for _ in range(3)), CPU, progress=False, title="")
    assert [output.requires_grad for output in outputs] == [False] * 3


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("error", [None, RuntimeError("inside")])
def test_modes_and_cache_come_back_as_they_were(family: str, error: Exception | None) -> None:
    model = tiny_family(family)
    model.train()
    next(iter(find_blocks(model))).eval()
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    modes = [module.training for module in model.modules()]
    caches = [config.use_cache for config in configs.values()]
    assert True in caches
    with nullcontext() if error is None else pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not any(config.use_cache for config in configs.values())
        if error is not None:
            raise error
    assert [module.training for module in model.modules()] == modes
    assert [config.use_cache for config in configs.values()] == caches


def test_a_model_without_cache_or_config_is_left_alone() -> None:
    model = tiny_llama()
    model.config.use_cache = False
    with evaluating(model):
        assert model.config.use_cache is False
    assert model.config.use_cache is False
    with evaluating(nn.Linear(2, 2).train()) as nothing:
        assert nothing is None
