"""One thread per test process: the models are tiny, and two-process tests share two cores."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what models write for their calibration out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
