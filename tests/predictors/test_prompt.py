"""Where an instruction stands in a batch; options that cannot be meant."""

from typing import Any

import pytest
import torch

from lightning_prune.predictors.prompt import Reads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be .*1.*0"),
        ({"source": "chunk", "chunk": 0}, "chunk must be .*1.*0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"source": "chunk"}, "chunk, in tokens, goes with source: chunk; got source chunk, chunk None"),
        ({"chunk": 4}, "chunk, in tokens, goes with source: chunk; got source prefix, chunk 4"),
    ],
)
def test_options_that_read_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reads(**options)


def test_no_more_than_the_first_tokens_of_an_instruction_are_read() -> None:
    ids = torch.arange(3, 11)[None]
    labels = torch.where(ids < 8, -100, ids)
    whole = Reads(dropout=0.0).find({"input_ids": ids, "labels": labels}, is_training=False)
    start = Reads(dropout=0.0, max_tokens=2).find({"input_ids": ids, "labels": labels}, is_training=False)
    assert whole.attention.shape == whole.ids.shape
    assert whole.ids[whole.attention.bool()].tolist() == [3, 4, 5, 6, 7]
    assert start.ids[start.attention.bool()].tolist() == [3, 4]
