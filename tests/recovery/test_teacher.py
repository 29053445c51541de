"""The teacher: frozen, beside the student, in its own dtype, opened when needed."""

import pytest
import torch
from torch import nn

from lightning_prune.recovery.teacher import Teacher, fingerprint, frozen, self_teacher
from tests.tiny_models import tiny_llama, tiny_mlp, token_windows

CPU = torch.device("cpu")


def test_self_teacher_stays_what_the_model_was() -> None:
    model = tiny_llama().train()
    model(input_ids=token_windows(2), labels=token_windows(2)).loss.backward()
    teacher = self_teacher(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert model.training


def test_it_is_opened_once_and_on_first_need() -> None:
    opened: list[nn.Module] = []

    def source() -> nn.Module:
        opened.append(tiny_llama())
        return opened[-1]

    teacher = Teacher(source, dtype="bfloat16")
    assert opened == []
    inputs = {"input_ids": token_windows(2)}
    first, second = (teacher(inputs, device=CPU).logits for _ in range(2))
    assert len(opened) == 1
    assert first.dtype == torch.bfloat16
    assert not first.requires_grad
    assert torch.equal(first, second)


def test_autocast_does_not_reach_it() -> None:
    inputs = {"input_ids": token_windows(2)}
    teacher = Teacher(tiny_llama())
    plain = teacher(inputs, device=CPU).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(inputs, device=CPU).logits, plain)


def test_arguments_that_only_the_student_takes_are_left_out() -> None:
    class Named(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    assert Teacher(Named())({"input_ids": torch.ones(1), "token_type_ids": None}, device=CPU).item() == 1


def test_fingerprints_tell_weights_apart() -> None:
    assert fingerprint(tiny_mlp()) == fingerprint(tiny_mlp())
    names = {fingerprint(tiny_mlp(seed=1)), fingerprint(tiny_mlp()), fingerprint(frozen(tiny_mlp(), dtype="bfloat16"))}
    assert len(names) == 3


def test_frozen_changes_in_place() -> None:
    model = tiny_mlp()
    assert frozen(model) is model
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(torch.ones(1, 8)).sum().backward()
