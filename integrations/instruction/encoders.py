"""Instruction encoders that come from the hub: any Hugging Face encoder or decoder, with the tokenizer it knows.

Recipes name it in full: `encoder: {class_path: lightning_prune.integrations.instruction.encoders.Pretrained, ...}`.

Shapes: B instructions, T tokens, D features.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel

from lightning_prune.base.bounds import at_least
from lightning_prune.integrations.models.hf_open import open_tokenizer
from lightning_prune.predictors.encoder import Encoder, InstructionEncoder, last_token, mean_tokens

__all__ = ["Pretrained"]


@dataclass(frozen=True, kw_only=True)
class Pretrained(Encoder):
    """Reads with a pretrained model of its own, trained on with the rest.

    Where its tokenizer is another one than the model's, the instruction is turned back into text and read anew.

    Args:
        name: folder or hub id.
        pooling: `last`, the state of the last token, for decoders; `mean` over the tokens for encoders.
        max_tokens: of its own tokenizer.
        trains: whether its weights are trained; a frozen one needs no gradient and no optimizer state.
    """

    name: str
    pooling: Literal["last", "mean"] = "last"
    max_tokens: int = 512
    trains: bool = True

    def __post_init__(self) -> None:
        at_least(1, max_tokens=self.max_tokens)
        if not self.name:
            raise ValueError("name is the folder or hub id of the encoder, got an empty one")

    def build(self, model: nn.Module) -> InstructionEncoder:
        """Return the encoder.

        Raises:
            ValueError: if it cannot be opened.
        """
        try:
            backbone = AutoModel.from_pretrained(self.name, dtype=torch.float32, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"the encoder {self.name} cannot be opened: {error}") from error
        return _Pretrained(self, backbone)


class _Pretrained(InstructionEncoder):
    def __init__(self, options: Pretrained, backbone: nn.Module) -> None:
        super().__init__()
        self._options = options
        self.backbone = backbone.requires_grad_(options.trains)
        self.width = int(backbone.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        self._own: Any = None
        self._theirs: Any = None
        self._is_told = False

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Compare the model's tokenizer with that of the encoder.

        Raises:
            ValueError: if the model's is not known, or the encoder has none.
        """
        if tokenizer is None:
            raise ValueError(
                f"the encoder {self._options.name} reads tokens of its own, so the model's must be turned into text, "
                "and no tokenizer was found; give the trainer a processing_class, or the module a `tokenizer`"
            )
        self._own = open_tokenizer(self._options.name)
        if self._own is None:
            raise ValueError(f"the encoder {self._options.name} has no tokenizer in its folder; add it")
        self._theirs = None if tokenizer.get_vocab() == self._own.get_vocab() else tokenizer
        self._is_told = True

    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Return one vector per instruction.

        Raises:
            ValueError: if the tokenizers were not compared.
        """
        if not self._is_told:
            raise ValueError("the encoder was not told what the model's tokens mean; call use_tokenizer first")
        if self._theirs is not None:
            ids_BT, attention_BT = self._translated(ids_BT, attention_BT)
        found: Any = self.backbone(input_ids=ids_BT, attention_mask=attention_BT.long())
        pool = last_token if self._options.pooling == "last" else mean_tokens
        return pool(found.last_hidden_state, attention_BT)

    def _translated(self, ids_BT: Tensor, attention_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same text in the encoder's tokens, padded on the right."""
        rows = [ids[there.bool()].tolist() for ids, there in zip(ids_BT, attention_BT, strict=True)]
        texts = [self._theirs.decode(row, skip_special_tokens=True) for row in rows]
        encoded = [self._own(text, truncation=True, max_length=self._options.max_tokens)["input_ids"] for text in texts]
        if not all(encoded):
            raise ValueError("an instruction has no text: its tokens are special ones alone")
        length = max(len(row) for row in encoded)
        ids = torch.zeros(len(encoded), length, dtype=torch.long)
        there = torch.zeros(len(encoded), length, dtype=torch.bool)
        for number, row in enumerate(encoded):
            ids[number, : len(row)], there[number, : len(row)] = torch.tensor(row), True
        return ids.to(ids_BT.device), there.to(ids_BT.device)
