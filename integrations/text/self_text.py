"""Text that a model writes itself: sampled from its own distribution, seeded, and kept for the next time.

A model that is pruned on text unlike its own loses what it was trained for, and its training text is seldom at hand;
what it writes is the nearest thing. Documents are sampled at temperature 1 from the token that begins a text, end where
the model ends them, and stand one after the other in windows, as other calibration text does.

Source: our own; a similar use of generated text for calibration is Williams et al., Self-calibration for Language Model
    Quantization and Pruning, arXiv 2410.17170. Our measurement: benchmarks/calibration_text.py.
Cost: as many forward passes as a sequence has tokens, for every few sequences, with the model's cache.
Limits: models that predict the next token. The kept text is found again by a sample of the weights, not all of them.

Shapes: N sequences, T tokens of each, B documents at a time.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lightning_prune.base.names import shorten
from lightning_prune.base.whole_file import written_aside
from lightning_prune.integrations.models.hf_open import predicts_next_token

__all__ = ["cache_folder", "own_text"]

logger = logging.getLogger(__name__)

_SAMPLED = 512  # values of each weight that tell one model from another
_MAX_ROUNDS = 16  # of short documents, for every one that would do if each filled its window
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)  # of foreign code


def own_text(
    model: PreTrainedModel, *, num_sequences: int, sequence_length: int, batch_size: int = 32, seed: int = 0
) -> Tensor:
    """Return text that a model writes, or wrote before with the same weights and settings.

    Args:
        model: in evaluation mode.
        num_sequences: how many windows.
        sequence_length: tokens in each.
        batch_size: documents sampled at a time.
        seed: of the sampling.

    Returns:
        ids_NT, on the CPU.

    Raises:
        ValueError: if the model predicts no next token, fails to write, or ends its documents at once.
    """
    if not predicts_next_token(model):
        raise ValueError(f"{type(model).__name__} writes no text of its own; name a text with --data")
    settings = [num_sequences, sequence_length, batch_size, seed]
    path = cache_folder() / f"{_fingerprint(model, settings)}.json"
    kept_NT = _kept(path, num_sequences, sequence_length)
    if kept_NT is not None:
        logger.info("calibration text: the model's own, kept in %s", path)
        return kept_NT
    ids_NT = _write(model, num_sequences, sequence_length, batch_size, seed)
    _keep(path, ids_NT)
    return ids_NT


def cache_folder() -> Path:
    """Return where texts are kept: LIGHTNING_PRUNE_CACHE, else a folder in the user's cache."""
    home = os.environ.get("LIGHTNING_PRUNE_CACHE")
    if home is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = f"{base}/lightning_prune"
    return Path(home).expanduser() / "own_text"


def _write(model: PreTrainedModel, num_sequences: int, sequence_length: int, batch_size: int, seed: int) -> Tensor:
    wanted = num_sequences * sequence_length
    batch_size = min(batch_size, num_sequences)
    devices = [] if model.device.type == "cpu" else [model.device.index or 0]
    ids: list[int] = []
    with (
        torch.random.fork_rng(devices, device_type="cuda" if not devices else model.device.type),
        tqdm(total=wanted, desc="the model writes its calibration text", unit="token") as bar,
    ):
        torch.manual_seed(seed)
        for _ in range(_MAX_ROUNDS * -(-num_sequences // batch_size)):
            for document in _documents(model, batch_size, sequence_length):
                ids += document
            bar.update(min(wanted, len(ids)) - bar.n)
            if len(ids) >= wanted:
                return torch.tensor(ids[:wanted]).reshape(num_sequences, sequence_length)
    raise ValueError(
        f"{type(model).__name__} ends its own texts too early ({len(ids)} tokens where {wanted} were asked for); name "
        "a text with --data"
    )


def _documents(model: PreTrainedModel, number: int, length: int) -> list[list[int]]:
    """Sample documents from the token that begins a text; each ends with the model's end of text or at a length."""
    ends = _as_list(_special(model, "eos_token_id"))
    first = _as_list(_special(model, "bos_token_id")) or ends
    if first:
        start_B1 = torch.full((number, 1), first[0])
    else:
        start_B1 = torch.randint(int(model.config.get_text_config().vocab_size), (number, 1))
    pad = _as_list(_special(model, "pad_token_id")) or ends or [0]
    start_B1 = start_B1.to(model.device)
    generator: Any = model
    try:
        with torch.no_grad():
            ids_BT = generator.generate(
                input_ids=start_B1,
                attention_mask=torch.ones_like(start_B1),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=max(1, length - 1),
                pad_token_id=pad[0],
            )
    except _FAILURES as error:
        raise ValueError(
            f"{type(model).__name__} cannot write its own calibration text ({shorten(str(error), 160)}); name a text "
            "with --data"
        ) from error
    return [_up_to_end(row, ends) for row in ids_BT.tolist()]


def _up_to_end(ids: list[int], ends: list[int]) -> list[int]:
    end = next((idx for idx, token in enumerate(ids[1:], start=1) if token in ends), len(ids))
    return ids[: end + 1]


def _special(model: PreTrainedModel, name: str) -> Any:
    """Return the number of a special token, as the model generates with it or as its configuration says."""
    places: tuple[Any, ...] = (getattr(model, "generation_config", None), model.config.get_text_config(), model.config)
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def _as_list(token: Any) -> list[int]:
    return [] if token is None else list(token) if isinstance(token, list | tuple) else [int(token)]


def _fingerprint(model: PreTrainedModel, settings: list[int]) -> str:
    digest = hashlib.sha256(json.dumps([type(model).__name__, *settings]).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _kept(path: Path, num_sequences: int, sequence_length: int) -> Tensor | None:
    """Return a text kept before; None where there is none, and, said aloud, where it is damaged."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        ids_NT = torch.tensor(content["ids"], dtype=torch.int64)
        if ids_NT.shape == (num_sequences, sequence_length) and content.get("sha256") == _sum(content["ids"]):
            return ids_NT
    except (OSError, ValueError, LookupError, TypeError):
        pass
    logger.warning("the text kept in %s is damaged or cannot be read; the model writes it anew", path)
    return None


def _keep(path: Path, ids_NT: Tensor) -> None:
    content = {"ids": ids_NT.tolist(), "sha256": _sum(ids_NT.tolist())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(json.dumps(content), encoding="ascii")
    except OSError as error:
        logger.warning("the text is not kept for the next time: %s", error)


def _sum(ids: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
