"""Open a Hugging Face model as the class that its folder names, with every weight in its place.

A class that is guessed (say, the causal language model for the type) would load a reward model without its head and a
fresh head beside it. What comes out of this library is the class that went in, so the folder's own `architectures`
decides, and weights that the class lacks or the folder lacks are an error.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

__all__ = ["load_model", "open_model", "open_tokenizer", "predicts_next_token"]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer*",
    "*vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
)
_NUM_NAMED = 4  # names of weights that an error shows
_LONGEST_LINE = 300  # characters of another library's error that are passed on


def load_model(name: str, *, device: str = "auto", trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """Open a model as the class its configuration names, and its tokenizer, None where there is none.

    Args:
        name: a model folder or a hub id.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Raises:
        ValueError: if there is no such model, its class is unknown, weights are missing or left over, or its tokenizer
            is damaged.
    """
    device = _usable(device)
    model: Any = open_model(name, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(name, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        logger.warning("%s has no tokenizer", name)
    return model.to(device).eval(), tokenizer


def open_model(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Open a model on the CPU, in evaluation mode, as the class its configuration names.

    Args:
        name: a model folder or a hub id.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Raises:
        ValueError: if there is no such model, its class is unknown, or weights are missing or left over.
    """
    source = _source(name)
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise _unopened(name, error) from error
    opener, class_name = _opener(name, config, trust_remote_code)
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        model, info = opener.from_pretrained(source, config=config, dtype="auto", output_loading_info=True, **trust)
    except (ValueError, OSError) as error:
        raise _unopened(name, error) from error
    except Exception as error:  # of the formats of weights, which raise their own for damaged files
        if "mismatch" not in str(error):
            raise _unopened(name, error) from error
        raise ValueError(
            f"weights of {name} have other shapes than {_declared(config)} with its config.json; the two do not belong "
            "together"
        ) from error
    if type(model).__name__ != class_name:
        raise ValueError(
            f"config.json of {name} names {class_name}, but what opens it gives {type(model).__name__}, without the "
            "head that is asked for; set architectures and auto_map to the class the weights belong to"
        )
    _check_complete(name, class_name, info)
    return model


def open_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model, None where there is none.

    For some types Transformers makes up an empty one then, for others it asks for a package to convert it with.

    Args:
        name: a model folder or a hub id.
        trust_remote_code: whether to run code that comes with the tokenizer; nobody is asked.

    Raises:
        ValueError: if there is no such folder, or its tokenizer is damaged.
    """
    source = _source(name)
    is_folder = os.path.isdir(source)
    has_files = is_folder and any(True for pattern in _TOKENIZER_FILES for _ in Path(source).glob(pattern))
    if not is_folder or has_files:
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except Exception as error:  # tokenizers raises plain ones
            if has_files:
                raise ValueError(
                    f"the tokenizer of {name} cannot be opened ({type(error).__name__}: {_told(error)}); repair "
                    "its files, or remove them to work without a tokenizer"
                ) from error
    return None


def predicts_next_token(model: Any) -> bool:
    """Return whether a model's output t is a distribution over the token at t + 1 of its input."""
    can_generate = getattr(model, "can_generate", None)
    is_two_sided = bool(getattr(model.config, "is_encoder_decoder", False))
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return callable(can_generate) and bool(can_generate()) and not is_two_sided and reads_text


def _usable(device: str) -> str:
    """Return a device that tensors can be on, chosen where it is `auto`.

    Raises:
        ValueError: if there is no such device here.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if accelerator is None else accelerator.type
    try:
        is_real = torch.zeros(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, ImportError) as error:  # torch asserts that it was built for CUDA
        raise ValueError(
            f"there is no device {device!r} here ({_told(error)}); use cpu, or auto for an accelerator if there is one"
        ) from error
    if not is_real:
        raise ValueError(f"device {device!r} holds no values; use cpu, or auto for an accelerator if there is one")
    return device


def _source(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{name} is no model folder: it holds no config.json")
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise ValueError(f"there is no model folder {name}; name a folder with a config.json, or a hub id")
    return str(folder) if folder.exists() else name


def _declared(config: Any) -> str:
    return str((getattr(config, "architectures", None) or ["?"])[0])


def _opener(name: str, config: Any, trust_remote_code: bool) -> tuple[Any, str]:
    """Return what opens the class that a configuration names, and the name of that class.

    Raises:
        ValueError: if it names none, or one that nothing here knows.
    """
    declared: Sequence[str] = getattr(config, "architectures", None) or ()
    if not declared:
        raise ValueError(
            f"config.json of {name} does not say which class its weights belong to (no `architectures`); open it with "
            "that class and save it again, or add the entry"
        )
    own: dict[str, Any] = dict(getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for auto, reference in own.items():
        first = reference[0] if isinstance(reference, list | tuple) else reference
        if auto.startswith("AutoModel") and str(first).rpartition(".")[2] == declared[0]:
            return getattr(transformers, auto), declared[0]
    stock = getattr(transformers, declared[0], None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        known = ", ".join(sorted(str(reference) for auto, reference in own.items() if auto.startswith("AutoModel")))
        hint = f"; its auto_map knows {known}" if known else "; Transformers has no class of this name"
        raise ValueError(f"config.json of {name} names {declared[0]}{hint}, so the model cannot be opened as it was")
    return stock, declared[0]


def _check_complete(name: str, class_name: str, info: dict[str, Any]) -> None:
    """Check that the class took all weights of the folder, and needs no other; those it ignores itself do not count."""
    for what, keys in (
        ("lacks weights that {} has, which would be random", info["missing_keys"]),
        ("holds weights that {} has no place for, which would be lost", info["unexpected_keys"]),
    ):
        if keys:
            raise ValueError(
                f"{name} {what.format(class_name)}: {_listed(keys)}; `architectures` in its config.json must name the "
                "class that the model was trained as"
            )


def _unopened(name: str, error: Exception) -> ValueError:
    if "trust_remote_code" in str(error):
        return ValueError(
            f"{name} comes with a modelling file of its own; look at it, and give --trust_remote_code to run it"
        )
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return ValueError(f"cannot open the model {name!r}: {kind}{_told(error)}")


def _told(error: BaseException) -> str:
    """Return the first line of an error; Transformers lists all the classes it knows in the next ones."""
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


def _listed(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
