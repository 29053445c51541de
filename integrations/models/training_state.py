"""Keep a running training as it is while its model is used for something else."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Give a model in evaluation mode, without gradients and with a fixed seed; afterwards all is as before.

    Modes of every submodule, `config.use_cache`, and the random states of Python, numpy and torch are put back, also
    after an error.

    Args:
        model: a model with a `config`.
        seed: of the randomness inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    config: Any = model.config
    use_cache = getattr(config, "use_cache", None)
    with ExitStack() as stack:
        stack.enter_context(_fixed_seed(seed))
        stack.enter_context(torch.no_grad())
        if any(getattr(module, "_compiled_call_impl", None) is not None for module, _ in modes):
            # Sequences of many lengths would be compiled again and again.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in modes:
                module.training = False  # not .eval(), which some modules override to do more
            if use_cache is not None:
                config.use_cache = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            if use_cache is not None:
                config.use_cache = use_cache


@contextmanager
def _fixed_seed(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch; put their states back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
