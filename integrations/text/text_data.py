"""Text in packed windows for language-model training, with some documents held out.

Everything is deterministic: the order of the documents, which of them are held out, the trained tokenizer, and the
shuffling, which continues at the same batch after a resume.

Shapes: B sequences, T tokens of each.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from transformers import AutoTokenizer

from lightning_prune.integrations.text.next_line_tasks import write_tasks
from lightning_prune.integrations.text.text_documents import Document, read_documents, train_tokenizer

__all__ = ["TextData", "WindowLoader"]

_NUM_QUESTIONS = 400
_WHOLE_TEXT_CHARACTERS = 60_000


class WindowLoader:
    """Iterate over windows of tokens in shuffled batches, and continue where a saved state stopped.

    Batches are dicts with `input_ids` and `labels`, both the same tensor of shape (batch, window).

    Args:
        windows: token numbers, one window per row.
        batch_size: windows per batch and process.
        seed: None keeps the order; a number shuffles by (seed, epoch).
        rank: which share of the windows this process takes.
        world_size: number of shares.
    """

    def __init__(
        self, windows: Tensor, *, batch_size: int, seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._share = (rank, world_size)
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        """Count the batches of one epoch; a last, smaller one is left out when shuffling."""
        number = len(self._windows) // self._share[1]
        return number // self._batch_size if self._seed is not None else -(-number // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self._order()
        while self._position < len(self):
            first = self._position * self._batch_size
            self._position += 1
            window_BT = self._windows[order[first : first + self._batch_size]].long()
            yield {"input_ids": window_BT, "labels": window_BT}
        self._epoch += 1
        self._position = 0

    def _order(self) -> Tensor:
        rank, world_size = self._share
        number = len(self._windows)
        if self._seed is None:
            order = torch.arange(number)
        else:
            order = torch.randperm(
                number, generator=torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
            )
        return order[: number // world_size * world_size][rank::world_size]

    def state_dict(self) -> dict[str, Any]:
        """Return how many epochs and batches were handed out."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which the state was saved.

        Args:
            state: what `state_dict` returned.
        """
        self._epoch, self._position = int(state["epoch"]), int(state["position"])


class TextData(LightningDataModule):
    """Text as packed windows of tokens, with some documents held out for validation.

    Args:
        path: file or folder of text; None uses the sources of Python's standard library.
        tokenizer: folder or hub id of a tokenizer; None trains a byte-level BPE on the training documents.
        vocab_size: size of the trained tokenizer.
        window: tokens per sequence.
        batch_size: sequences per batch.
        max_characters: read no more than about this much text.
        hold_out: every how many documents one is held out.
        seed: of the shuffling.
        tasks: folder for the evaluation tasks that `write_tasks` makes from the held-out documents.
    """

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        window: int = 128,
        batch_size: int = 8,
        max_characters: int | None = None,
        hold_out: int = 20,
        seed: int = 0,
        tasks: str | None = None,
    ) -> None:
        super().__init__()
        if hold_out < 2:
            raise ValueError(f"hold_out must be 2 or more, got {hold_out}; every second document is the most")
        self.path = path
        self.tokenizer_name = tokenizer
        self.vocab_size = vocab_size
        self.window = window
        self.batch_size = batch_size
        self.max_characters = max_characters
        self.hold_out = hold_out
        self.seed = seed
        self.tasks = tasks
        self.tokenizer: Any = None
        self.train_documents: list[Document] = []
        self.val_documents: list[Document] = []

    def setup(self, stage: str | None = None) -> None:
        """Read the text, get the tokenizer and pack the windows; only the first call does anything.

        Args:
            stage: Lightning's name for what follows; not used.

        Raises:
            ValueError: if a split is too short for one window or the training split for one batch.
        """
        if self.tokenizer is not None:
            return
        self._read()
        tokenizer = self._make_tokenizer()
        self._train_windows = self._pack(tokenizer, self.train_documents, "training")
        self._val_windows = self._pack(tokenizer, self.val_documents, "validation")
        if len(self._train_windows) < self.batch_size:
            raise ValueError(
                f"the training text fills {len(self._train_windows)} windows of {self.window} tokens, fewer than a "
                f"batch of {self.batch_size}; give more text or a smaller batch_size"
            )
        self.tokenizer = tokenizer

    def write_tasks(self) -> None:
        """Write the tasks `next_line` and `whole_text` of the held-out documents into the folder `tasks`, if given.

        Raises:
            ValueError: if no question can be made from the documents.
        """
        if self.tasks is not None:
            self._read()
            limits = {"num_questions": _NUM_QUESTIONS, "max_characters": _WHOLE_TEXT_CHARACTERS}
            write_tasks(Path(self.tasks).expanduser(), self.val_documents, seed=self.seed, **limits)

    def _read(self) -> None:
        """Read the documents, once, and hold some of them out."""
        if self.train_documents:
            return
        documents = read_documents(self.path, max_characters=self.max_characters)
        last = self.hold_out - 1
        self.train_documents = [item for place, item in enumerate(documents) if place % self.hold_out != last]
        self.val_documents = [item for place, item in enumerate(documents) if place % self.hold_out == last]

    def train_dataloader(self) -> WindowLoader:
        """Return shuffled batches of this process's share of the training windows."""
        return self._loader(self._train_windows, self.seed)

    def val_dataloader(self) -> WindowLoader:
        """Return batches of this process's share of the held-out windows, in order."""
        return self._loader(self._val_windows, None)

    def _loader(self, windows: Tensor, seed: int | None) -> WindowLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return WindowLoader(windows, batch_size=self.batch_size, seed=seed, rank=rank, world_size=world_size)

    def _make_tokenizer(self) -> Any:
        if self.tokenizer_name is not None:
            return AutoTokenizer.from_pretrained(self.tokenizer_name)
        return train_tokenizer([document.text for document in self.train_documents], vocab_size=self.vocab_size)

    def _pack(self, tokenizer: Any, documents: Sequence[Document], split: str) -> Tensor:
        """Return the documents' tokens, each between its first and last special token, cut into windows."""
        first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        last = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        stream = [token for tokens in encoded for token in (*first, *tokens, *last)]
        number = len(stream) // self.window
        if number == 0:
            raise ValueError(
                f"the {split} text has {len(stream)} tokens, fewer than one window of {self.window}; give more text, "
                "a smaller window or a smaller hold_out"
            )
        return torch.tensor(stream[: number * self.window], dtype=torch.int32).view(number, self.window)
