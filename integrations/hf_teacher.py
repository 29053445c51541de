"""Open a teacher from a folder or from the hub, check that it reads the student's tokens, keep it off the accelerator.

Source: accelerate's `cpu_offload` for weights that move to the accelerator layer by layer.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from lightning_prune.recovery.distill import Distill, Distiller
from lightning_prune.recovery.teacher import Dtype, frozen

__all__ = ["check_tokenizers", "distiller_of", "offloaded", "open_teacher", "teacher_id"]

_SAMPLED_BYTES = 1 << 16


def distiller_of(
    options: Distill,
    *,
    copied: nn.Module | None,
    student_tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    rank: int = 0,
) -> Distiller:
    """Return the distillation that a recipe asks for.

    A teacher from a folder is opened at once, so that one that does not fit is refused at once; with a cache, on first
    need: never, if all its logits are there.

    Args:
        options: of the recipe.
        copied: the self-teacher, copied before the student was pruned; None where a folder is named.
        student_tokenizer: compared with the teacher's; None leaves that out.
        device: where the student trains.
        rank: of this process.

    Raises:
        ValueError: if there is no self-teacher, the tokenizers differ, or offload has no effect.
    """
    if options.teacher == "self":
        if copied is None:
            raise ValueError("distill.teacher self needs a copy of the model from before pruning; name a folder")
        teacher = offloaded(copied, device=device) if options.offload else copied
        return Distiller(options, teacher=teacher, is_placed=options.offload, rank=rank)
    if options.offload:
        _check_offload(device)
    opener = partial(
        open_teacher,
        options.teacher,
        dtype=options.teacher_dtype,
        device=device,
        offload=options.offload,
        student_tokenizer=student_tokenizer,
    )
    if options.cache_dir is None:
        return Distiller(options, teacher=opener(), is_placed=options.offload, rank=rank)
    name = teacher_id(options.teacher)
    return Distiller(options, teacher=opener, teacher_id=name, is_placed=options.offload, rank=rank)


def open_teacher(
    path: str,
    *,
    dtype: Dtype | None,
    device: torch.device,
    offload: bool,
    student_tokenizer: PreTrainedTokenizerBase | None,
) -> nn.Module:
    """Load a teacher, frozen and in evaluation mode.

    Args:
        path: folder or hub id.
        dtype: of its weights; None takes the one it is stored in.
        device: where it runs.
        offload: keep the weights on the CPU.
        student_tokenizer: must give every token the same id as the teacher's; None leaves that out.

    Raises:
        ValueError: if the tokenizers differ, or offload has no effect.
    """
    if student_tokenizer is not None:
        check_tokenizers(student_tokenizer, path)
    config = AutoConfig.from_pretrained(path)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = frozen(loader.from_pretrained(path, dtype=getattr(torch, dtype) if dtype else "auto"))
    return offloaded(model, device=device) if offload else model.to(device)


def offloaded(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Keep a model's weights on the CPU and move each layer's to the device while it runs; changed in place.

    Raises:
        ValueError: if the device is the CPU.
    """
    _check_offload(device)
    placed: nn.Module = cpu_offload(model, execution_device=device)
    return placed


def check_tokenizers(student_tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Compare the student's vocabulary with that of the teacher's tokenizer, token by token.

    Args:
        student_tokenizer: its token ids are what the teacher will see.
        path: folder or hub id of the teacher.

    Raises:
        ValueError: if a token is missing on one side or has another id, or the teacher has no tokenizer.
    """
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the teacher {path!r} has no tokenizer to compare with the student's: {error}; save its tokenizer "
            "beside it"
        ) from error
    own, others = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    differing = sorted(token for token in own.keys() | others.keys() if own.get(token) != others.get(token))
    if differing:
        shown = ", ".join(f"{token!r} ({own.get(token)} / {others.get(token)})" for token in differing[:3])
        raise ValueError(
            f"the teacher {path!r} has another tokenizer: {len(differing)} tokens have different ids or exist on one "
            f"side only, as (student / teacher) {shown}; take a teacher with the student's tokenizer"
        )


def teacher_id(path: str) -> str:
    """Return a text that changes when the teacher's files change, without loading them.

    Args:
        path: a folder, whose weights, configuration and code are read whole, at about 1 GB/s; or a hub id, of which
            the commit is taken.

    Raises:
        ValueError: if a hub id has no commit.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{AutoConfig.from_pretrained(path)._commit_hash}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLED_BYTES))
            content.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(content.read())
    return digest.hexdigest()


def _check_offload(device: torch.device) -> None:
    if device.type == "cpu":
        raise ValueError(
            "distill.offload keeps the teacher's weights on the CPU, where this run trains anyway; set offload: false"
        )
