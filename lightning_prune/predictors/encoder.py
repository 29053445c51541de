"""What turns an instruction into one vector: the contract, and encoders that need nothing but the model.

Where tokens stand is told by the attention mask alone, never by a place in the row, so padding on either side, and the
other rows of a batch, do not change a vector.

Shapes: B instructions, T tokens, D features.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base.bounds import at_least

__all__ = ["Blind", "Encoder", "Fresh", "InstructionEncoder", "OwnLayers", "last_token", "mean_tokens"]


class InstructionEncoder(nn.Module, ABC):
    """Turns the model's token ids (B, T) and their attention mask (B, T) into vectors (B, D), D being `width`."""

    width: int

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Take the model's tokenizer, for an encoder that reads tokens of its own.

        Raises:
            ValueError: if it needs one and there is none.
        """

    @abstractmethod
    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Return one vector per instruction."""


class Encoder(ABC):
    """Options of an instruction encoder; a frozen dataclass."""

    @abstractmethod
    def build(self, model: nn.Module) -> InstructionEncoder:
        """Return the encoder for a model.

        Raises:
            ValueError: if it cannot be made for this model.
        """


def mean_tokens(states_BTD: Tensor, attention_BT: Tensor) -> Tensor:
    """Return the mean over the tokens that are there."""
    weight_BT1 = attention_BT.to(states_BTD.dtype).unsqueeze(-1)
    return (states_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


def last_token(states_BTD: Tensor, attention_BT: Tensor) -> Tensor:
    """Return the state of the last token that is there, on whichever side the padding stands."""
    places_T = torch.arange(attention_BT.shape[1], device=attention_BT.device)
    last_B = (attention_BT.long() * places_T).argmax(-1)
    return states_BTD[torch.arange(len(states_BTD), device=states_BTD.device), last_B]


@dataclass(frozen=True, kw_only=True)
class OwnLayers(Encoder):
    """Reads with the model's own embeddings and, if asked to, its lowest blocks; adds no weights.

    Args:
        num_layers: blocks of the model that are run, unmasked; 0 for the mean of the embeddings.
    """

    num_layers: int = 0

    def __post_init__(self) -> None:
        at_least(0, num_layers=self.num_layers)

    def build(self, model: nn.Module) -> InstructionEncoder:
        """Return the encoder; it refers to the model and holds none of its weights."""
        return _Own(model, self.num_layers)


class _Stop(Exception):  # noqa: N818  no error: it ends a call of the model early
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Own(InstructionEncoder):
    def __init__(self, model: nn.Module, num_layers: int) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self._num_layers = num_layers
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self.width = int(embeddings.weight.shape[-1])  # type: ignore[index]
        if num_layers:
            self._block = _block(model, num_layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Own":
        """Return the encoder of the copied model, which is not whole yet."""
        model = self._model()
        assert model is not None
        twin = _Own.__new__(_Own)
        twin.__dict__ = {**self.__dict__, "_model": weakref.ref(memo.get(id(model), model))}
        return twin

    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        model = self._model()
        assert model is not None
        ids_BT = ids_BT.masked_fill(~attention_BT.bool(), 0)
        if not self._num_layers:
            embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
            return mean_tokens(embeddings(ids_BT), attention_BT)
        handle = model.get_submodule(self._block).register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            type(model).forward(model, input_ids=ids_BT, attention_mask=attention_BT, use_cache=False)
        except _Stop as stop:
            return mean_tokens(stop.states, attention_BT)
        finally:
            handle.remove()
        raise RuntimeError(f"{self._block} was not reached, so the model's lower layers give no states")


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Stop(args[0] if args else kwargs["hidden_states"])


def _block(model: nn.Module, number: int) -> str:
    """Return the name of a block of the longest list of blocks."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    name, blocks = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    if number >= len(blocks):
        raise ValueError(f"the encoder reads {number} layers of the model's own, which has {len(blocks)}; take fewer")
    return f"{name}.{number}"


@dataclass(frozen=True, kw_only=True)
class Blind(Encoder):
    """Reads nothing, so that the head learns one mask for all instructions: the baseline of a learned static mask."""

    def build(self, model: nn.Module) -> InstructionEncoder:
        """Return the encoder, which has no weights."""
        return _Blind()


class _Blind(InstructionEncoder):
    width = 8

    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        return torch.ones(len(ids_BT), self.width, device=ids_BT.device)


@dataclass(frozen=True, kw_only=True)
class Fresh(Encoder):
    """A small transformer of its own, trained from scratch with the model, on the model's tokens.

    Args:
        width: features.
        num_layers: its blocks.
        num_heads: of its attention; divides the width.
        max_tokens: positions it knows.
    """

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    max_tokens: int = 512

    def __post_init__(self) -> None:
        at_least(1, width=self.width, num_layers=self.num_layers, num_heads=self.num_heads, max_tokens=self.max_tokens)
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")

    def build(self, model: nn.Module) -> InstructionEncoder:
        """Return the encoder, with weights from torch's random state."""
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        return _Fresh(self, vocab_size=int(embeddings.weight.shape[0]))  # type: ignore[index]


class _Fresh(InstructionEncoder):
    def __init__(self, options: Fresh, *, vocab_size: int) -> None:
        super().__init__()
        self.width, self._max_tokens = options.width, options.max_tokens
        self.tokens = nn.Embedding(vocab_size, options.width)
        self.places = nn.Embedding(options.max_tokens, options.width)
        layer: Callable[[], nn.TransformerEncoderLayer] = lambda: nn.TransformerEncoderLayer(  # noqa: E731
            options.width, options.num_heads, 4 * options.width, dropout=0.0, norm_first=True, batch_first=True
        )
        self.layers = nn.ModuleList(layer() for _ in range(options.num_layers))
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=1 / math.sqrt(options.width))

    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        place_BT = (attention_BT.long().cumsum(-1) - 1).clamp(0, self._max_tokens - 1)
        states_BTD = self.tokens(ids_BT.masked_fill(~attention_BT.bool(), 0)) + self.places(place_BT)
        for layer in self.layers:
            states_BTD = layer(states_BTD, src_key_padding_mask=~attention_BT.bool())
        return mean_tokens(states_BTD, attention_BT)
