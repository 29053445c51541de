"""The teacher's logits on disk: what is stored comes back, under any order, batch size, process and kill."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_prune.recovery.divergences import ForwardKL
from lightning_prune.recovery.logit_cache import CacheHeader, LogitCache, Passages
from lightning_prune.recovery.token_loss import FullTargets, TokenLoss, TopTargets

CPU = torch.device("cpu")
V, K = 40, 4


def header(**changed: object) -> CacheHeader:
    values: dict[str, object] = {"teacher": "one", "vocab_size": V, "top_k": K, "temperature": 1.0}
    return CacheHeader(**(values | changed))  # type: ignore[arg-type]


def texts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (length,), generator=generator) for length in lengths]


def batch(rows: list[Tensor], *, left: bool = False) -> dict[str, object]:
    """Return the inputs of a call: rows padded with 0, on the right or on the left."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def targets(inputs: dict[str, object], vocab: int = V) -> TopTargets:
    """Return targets that depend on the token alone, as those of a teacher without context would."""
    table = 3 * torch.randn(V, vocab, generator=torch.Generator().manual_seed(9))
    ids = inputs["input_ids"]
    assert isinstance(ids, Tensor)
    return TopTargets.of(table[ids.flatten()], k=K, temperature=1.0)


def assert_same(found: TopTargets | None, inputs: dict[str, object]) -> None:
    expected = targets(inputs)
    assert found is not None
    kept = Passages.of(inputs).positions_M
    assert torch.equal(found.ids_Nk[kept], expected.ids_Nk[kept])
    torch.testing.assert_close(found.log_probs_NK[kept].float(), expected.log_probs_NK[kept], atol=1e-6, rtol=2**-11)


def fill(folder: Path, rows: list[Tensor], *, rank: int = 0) -> LogitCache:
    cache = LogitCache(folder, header=header(), rank=rank)
    cache.put(Passages.of(batch(rows)), targets(batch(rows)))
    return cache


def test_passages_come_back_in_another_order_batch_size_and_padding(tmp_path: Path) -> None:
    one, two, three = texts(5, 3, 7)
    fill(tmp_path, [one, two, three])
    cache = LogitCache(tmp_path, header=header())
    for inputs in (batch([three, one]), batch([two, one, two], left=True), {"input_ids": two[None]}):
        assert_same(cache.get(Passages.of(inputs), device=CPU), inputs)
    assert cache.get(Passages.of(batch([one, two[:2]])), device=CPU) is None


def test_texts_packed_into_one_row_are_found_by_themselves(tmp_path: Path) -> None:
    one, two = texts(5, 3)
    packed: dict[str, object] = {
        "input_ids": torch.cat([two, one])[None],
        "position_ids": torch.cat([torch.arange(3), torch.arange(5)])[None],
    }
    cache = fill(tmp_path, [one, two])
    assert_same(cache.get(Passages.of(packed), device=CPU), packed)
    without_positions = {"input_ids": packed["input_ids"]}
    assert cache.get(Passages.of(without_positions), device=CPU) is None


def test_processes_read_what_others_append_while_they_run(tmp_path: Path) -> None:
    one, two, three = texts(4, 6, 5)
    first, second = fill(tmp_path, [one], rank=0), fill(tmp_path, [two], rank=1)
    second.put(Passages.of(batch([three])), targets(batch([three])))
    inputs = batch([three, one, two])
    for cache in (first, second):
        assert_same(cache.get(Passages.of(inputs), device=CPU), inputs)
    assert len(list(tmp_path.glob("*.data"))) == 2


def test_a_passage_is_stored_once(tmp_path: Path) -> None:
    one, two = texts(4, 6)
    cache = fill(tmp_path, [one, two, one])
    cache.put(Passages.of(batch([two])), targets(batch([two])))
    assert len(cache) == 2
    (data,) = tmp_path.glob("*.data")
    assert data.stat().st_size == (4 + 6) * header().bytes_per_token


def test_a_kill_at_any_byte_loses_only_what_was_not_complete(tmp_path: Path) -> None:
    one, two = texts(3, 2)
    fill(tmp_path / "whole", [one, two])
    (data,), (index,) = (list((tmp_path / "whole").glob(kind)) for kind in ("*.data", "*.index"))
    per_token, entry = header().bytes_per_token, 32
    cuts = [(size, 0) for size in range(3 * per_token + 1)]
    cuts += [(3 * per_token, size) for size in range(1, entry + 1)]
    cuts += [(size, entry) for size in range(3 * per_token, 5 * per_token + 1)]
    cuts += [(5 * per_token, size) for size in range(entry, 2 * entry + 1)]
    # A machine that loses power may keep the index and lose the data.
    cuts += [(size, 2 * entry) for size in range(0, 5 * per_token, 7)]
    for number, (num_data, num_index) in enumerate(cuts):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / "header.json", folder)
        (folder / data.name).write_bytes(data.read_bytes()[:num_data])
        (folder / index.name).write_bytes(index.read_bytes()[:num_index])
        cache = LogitCache(folder, header=header())
        is_one = num_index >= entry and num_data >= 3 * per_token
        is_two = num_index >= 2 * entry and num_data >= 5 * per_token
        assert len(cache) == is_one + is_two
        inputs = batch([one, two])
        if not (is_one and is_two):
            assert cache.get(Passages.of(inputs), device=CPU) is None
            cache.put(Passages.of(inputs), targets(inputs))
        assert_same(LogitCache(folder, header=header()).get(Passages.of(inputs), device=CPU), inputs)


def test_large_vocabularies_take_four_bytes_per_id(tmp_path: Path) -> None:
    small, large = header(vocab_size=65_536), header(vocab_size=65_537)
    assert (small.bytes_per_token, large.bytes_per_token) == (2 * (K + 1) + 2 * K, 2 * (K + 1) + 4 * K)
    for chosen, token in ((small, 65_535), (large, 131_071)):
        ids = torch.tensor([[token, 0, 40_000, 7]])
        stored = TopTargets(torch.full((1, K + 1), -1.609375), ids)
        inputs: dict[str, object] = {"input_ids": torch.tensor([[5]])}
        cache = LogitCache(tmp_path / str(token), header=chosen)
        cache.put(Passages.of(inputs), stored)
        found = cache.get(Passages.of(inputs), device=CPU)
        assert found is not None
        assert found.ids_Nk.tolist() == ids.tolist()
        assert found.log_probs_NK.tolist() == stored.log_probs_NK.tolist()


def test_half_precision_moves_the_loss_by_less_than_a_thousandth(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (4 * torch.randn(64, V, generator=generator) for _ in range(2))
    labels = torch.zeros(64, dtype=torch.int64)
    exact = TopTargets.of(teacher, k=20, temperature=1.0)
    inputs: dict[str, object] = {"input_ids": torch.arange(64)[None]}
    cache = LogitCache(tmp_path, header=header(top_k=20))
    cache.put(Passages.of(inputs), exact)
    stored = cache.get(Passages.of(inputs), device=CPU)
    assert stored is not None
    loss = TokenLoss(divergence=ForwardKL())
    value = loss(student, stored, labels)[1].item()
    assert value == pytest.approx(loss(student, exact, labels)[1].item(), rel=1e-3)
    assert value < loss(student, FullTargets(teacher), labels)[1].item()


@pytest.mark.parametrize(
    "changed", [{"teacher": "two"}, {"vocab_size": 41}, {"top_k": 5}, {"temperature": 2.0}, {"format": 2}]
)
def test_a_cache_of_something_else_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    fill(tmp_path, texts(3))
    name = next(iter(changed))
    with pytest.raises(ValueError, match=rf"do not fit this run: {name} .*choose another distill.cache_dir"):
        LogitCache(tmp_path, header=header(**changed))


def test_inputs_besides_tokens_are_refused() -> None:
    inputs = batch(texts(3))
    with pytest.raises(ValueError, match=r"also given pixel_values; set distill.cache_dir: null"):
        Passages.of(inputs | {"pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match="attention_mask of 4 dimensions"):
        Passages.of({"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 1, 3, 3)})
