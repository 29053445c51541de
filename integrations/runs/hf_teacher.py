"""Open a teacher from a folder or from the hub, check that it reads the student's tokens, keep it off the accelerator.

Code that comes with a teacher is never run, and nobody is asked whether to: a training has nobody at the keyboard.

Source: accelerate's `cpu_offload` for weights that move to the accelerator layer by layer.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import cpu_offload  # type: ignore[import-untyped]
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto as auto

from lightning_prune.integrations.models.hf_open import open_tokenizer
from lightning_prune.recovery.distill import Distill, Distiller
from lightning_prune.recovery.teacher import Dtype, frozen

__all__ = ["check_teacher", "check_tokenizers", "distiller_of", "offloaded", "open_teacher", "teacher_id"]

_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)  # what Transformers raises on bad folders


def distiller_of(
    options: Distill,
    *,
    copied: nn.Module | None,
    student_tokenizer: Any,
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
        ValueError: if there is no self-teacher, the teacher cannot be used, or offload has no effect.
    """
    if options.teacher == "self":
        if copied is None:
            raise ValueError(
                "distill.teacher self is a copy of the model from before it was pruned, which is let go of when the "
                "training has ended; to train on, give a new callback to a new Trainer and name the folder of the "
                "dense model as distill.teacher"
            )
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
    check_teacher(options.teacher)
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
    student_tokenizer: Any,
) -> nn.Module:
    """Load a teacher, frozen and in evaluation mode.

    Args:
        path: folder or hub id.
        dtype: of its weights; None takes the one it is stored in.
        device: where it runs.
        offload: keep the weights on the CPU.
        student_tokenizer: must give every token the same id as the teacher's; None leaves that out.

    Raises:
        ValueError: if it is no language model that stock Transformers opens whole, the tokenizers differ, or offload
            has no effect.
    """
    config = check_teacher(path)
    if student_tokenizer is not None:
        check_tokenizers(student_tokenizer, path)
    try:
        model, found = _loader(config).from_pretrained(
            path, dtype=getattr(torch, dtype) if dtype else "auto", trust_remote_code=False, output_loading_info=True
        )
    except _UNREADABLE as error:
        raise ValueError(f"the teacher {path!r} cannot be opened: {_first_line(error)}") from error
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise ValueError(
            f"the teacher {path!r} holds no weights for {', '.join(lacking[:3])} ({len(lacking)} tensors in all), "
            f"which {type(model).__name__} needs, so it would teach what it made up; name the folder of a whole model"
        )
    teacher = frozen(model)
    return offloaded(teacher, device=device) if offload else teacher.to(device)


def check_teacher(path: str) -> PretrainedConfig:
    """Return the configuration of a teacher, without opening its weights.

    Raises:
        ValueError: if there is none, it needs code of its own, or it is no language model.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except _UNREADABLE as error:
        if _brings_code(path):
            raise ValueError(
                f"the teacher {path!r} comes with code of its own, which a recipe never runs (a folder whose blocks "
                "differ in shape does, too); name a model that stock Transformers opens, as its dense parent, or open "
                "it with trust_remote_code=True in a program of your own and give it to "
                "lightning_prune.recovery.distill.Distiller"
            ) from error
        raise ValueError(
            f"the teacher {path!r} cannot be opened: {_first_line(error)}; recover.distill.teacher is self, a folder "
            "that holds a model, or a hub id"
        ) from error
    classes = [name for name in config.architectures or () if hasattr(transformers, name)]
    if classes and not set(classes) & _speaking():
        raise ValueError(
            f"the teacher {path!r} is a {classes[0]}, which gives no logits over tokens; name a language model"
        )
    return config


def _speaking() -> set[str]:
    """Return the classes of Transformers that have logits over tokens, or become such by a head they share."""
    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    found: set[str] = set()
    for mapping in mappings:
        for names in mapping.values():
            found.update([names] if isinstance(names, str) else names)
    return found


def _loader(config: PretrainedConfig) -> Any:
    """Return what opens a teacher as the class that it was saved as."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    saved_as = set(config.architectures or ())
    if not saved_as & set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        for names, loader in (
            (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM),
            (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
        ):
            if saved_as & set(names.values()):
                return loader
    return AutoModelForCausalLM


def _brings_code(path: str) -> bool:
    try:
        content, _ = PretrainedConfig.get_config_dict(path)
    except _UNREADABLE:
        return False
    return bool(content.get("auto_map"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def offloaded(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Keep a model's weights on the CPU and move each layer's to the device while it runs; changed in place.

    One that is kept so already stays as it is.

    Raises:
        ValueError: if the device is the CPU.
    """
    _check_offload(device)
    if any(parameter.is_meta for parameter in model.parameters()):
        return model
    placed: nn.Module = cpu_offload(model, execution_device=device)
    return placed


def check_tokenizers(student_tokenizer: Any, path: str) -> None:
    """Compare the student's vocabulary with that of the teacher's tokenizer, token by token.

    Args:
        student_tokenizer: its token ids are what the teacher will see; or a processor that holds one. Without a
            vocabulary, as for images alone, nothing is compared.
        path: folder or hub id of the teacher.

    Raises:
        ValueError: if a token is missing on one side or has another id, or the teacher has no tokenizer.
    """
    own_tokenizer = getattr(student_tokenizer, "tokenizer", student_tokenizer)
    if not callable(getattr(own_tokenizer, "get_vocab", None)):
        return
    teacher_tokenizer = open_tokenizer(path)
    if teacher_tokenizer is None:
        raise ValueError(
            f"the teacher {path!r} has no tokenizer to compare with the student's; save its tokenizer beside it"
        )
    own, others = own_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
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
        commit = check_teacher(path)._commit_hash
        if commit is None:
            raise ValueError(
                f"nothing tells one version of the teacher {path!r} from another, so its logits cannot be kept; "
                "download it and name the folder, or set distill.cache_dir: null"
            )
        return f"{path}@{commit}"
    digest = hashlib.blake2b(digest_size=16)
    kinds = ("config.json", "*.safetensors", "*.bin", "*.py")
    for file in sorted(file for kind in kinds for file in folder.glob(kind)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def _check_offload(device: torch.device) -> None:
    if device.type == "cpu":
        raise ValueError(
            "distill.offload keeps the teacher's weights on the CPU, where this run trains anyway; set offload: false"
        )
