"""Optimizers are found inside wrappers and heard of whoever steps them; what changes weights unseen is refused."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightning_prune.conductor import optimizer_steps


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0]))


class SharpnessAware(torch.optim.Optimizer):
    """SAM in its usual form: two passes, and an optimizer of its own that moves the weights."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["before"] = param.clone()
                    param.add_(param.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.copy_(self.state[param]["before"])
        self.base_optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """Lookahead as it is published: the base class is not initialized, so torch runs no hook around its step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Rescaled(torch.optim.SGD):
    """An optimizer whose step calls that of its parent."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_plain_optimizer_is_one_level() -> None:
    plain = torch.optim.SGD([parameter()], lr=0.1)
    assert optimizer_steps.levels(plain) == [plain]


def test_trainers_wrappers_are_looked_through() -> None:
    plain = torch.optim.SGD([parameter()], lr=0.1)
    assert optimizer_steps.levels(LightningOptimizer(plain)) == [plain]
    assert optimizer_steps.levels(Accelerator(cpu=True).prepare_optimizer(plain)) == [plain]


def test_an_optimizer_around_another_comes_first() -> None:
    outer = SharpnessAware([parameter()], lr=0.1)
    assert optimizer_steps.levels(outer) == [outer, outer.base_optimizer]
    assert optimizer_steps.levels(LightningOptimizer(outer)) == [outer, outer.base_optimizer]


def test_what_changes_weights_around_the_hooks_is_refused_by_type() -> None:
    hidden = Lookahead(torch.optim.AdamW([parameter()]))
    for wrapped in (hidden, LightningOptimizer(hidden)):
        with pytest.raises(ValueError, match=r"Lookahead steps an optimizer of its own .* train with its AdamW alone"):
            optimizer_steps.levels(wrapped)
    with pytest.raises(ValueError, match=r"builtins\.object is not stepped by torch"):
        optimizer_steps.levels(object())
    with pytest.raises(ValueError, match="Foreign is not stepped by torch"):
        optimizer_steps.levels(type("Wrapper", (), {"optimizer": type("Foreign", (), {})()})())


def test_a_step_inside_a_step_of_the_same_optimizer_is_known() -> None:
    torch.optim.SGD([parameter()], lr=0.1)  # makes torch run hooks around the parent's step too
    optimizer = Rescaled([parameter()], lr=0.1)
    other = torch.optim.SGD([parameter()], lr=0.1)
    seen: list[bool] = []
    optimizer.register_step_post_hook(lambda own, *_: seen.append(optimizer_steps.is_inside_own_step(own)))
    other.register_step_post_hook(lambda own, *_: seen.append(optimizer_steps.is_inside_own_step(own)))
    optimizer.step()
    assert seen == [True, False]
    optimizer.register_step_pre_hook(lambda *_: other.step())
    seen.clear()
    optimizer.step()
    assert seen == [False, False, True, False]  # the other's two steps are inside no step of its own


def test_skipped_steps_are_known_from_the_flag_of_fused_optimizers() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    assert not optimizer_steps.was_skipped(optimizer)
    for flag in (0.0, 1.0):
        optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]
        assert optimizer_steps.was_skipped(optimizer) == bool(flag)
