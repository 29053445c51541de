"""The teacher's logits on disk: what is stored comes back, under any order, batch size, process and kill."""

import shutil
from io import FileIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_prune.recovery import logit_cache
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
    for inputs in (batch([three, one]), batch([two, one, two]), as_bools(batch([one, two]))):
        assert_same(cache.get(Passages.of(inputs), device=CPU), inputs)
    assert cache.get(Passages.of(batch([one, two[:2]])), device=CPU) is None


def as_bools(inputs: dict[str, object]) -> dict[str, object]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert isinstance(ids, Tensor)
    assert isinstance(mask, Tensor)
    return {"input_ids": ids.int(), "attention_mask": mask.bool()}


def test_a_text_that_the_teacher_sees_otherwise_is_another_text() -> None:
    one, two = texts(5, 3)
    ids = torch.cat([one, two])[None]
    positions = torch.cat([torch.arange(5), torch.arange(3)])[None]
    ones = torch.ones_like(ids)
    hole = ones.clone()
    hole[0, 2] = 0
    ways: dict[str, dict[str, object]] = {
        "one text": {"input_ids": ids},
        "a mask of ones": {"input_ids": ids, "attention_mask": ones},
        "a masked token": {"input_ids": ids, "attention_mask": hole},
        "texts told apart by their mask": {"input_ids": ids, "attention_mask": ones + (positions == 0).cumsum(1)},
        "packed": {"input_ids": ids, "position_ids": positions},
        "packed, with a mask": {"input_ids": ids, "position_ids": positions, "attention_mask": ones},
        "packed the other way round": {
            "input_ids": ids.roll(3, 1),
            "position_ids": torch.cat([torch.arange(3), torch.arange(5)])[None],
        },
        "moved": {"input_ids": ids, "position_ids": torch.arange(8)[None] + 4},
        "boundaries": {"input_ids": ids, "position_ids": positions, "seq_idx": (positions == 0).cumsum(1).int()},
        "cumulated lengths": {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 5, 8])},
        "other lengths": {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 4, 8])},
        "kinds of token": {"input_ids": ids, "token_type_ids": ones},
        "an option": {"input_ids": ids, "is_causal": False},
        "padded on the left": batch([torch.cat([one, two]), torch.ones(9)], left=True),
    }
    keys = {name: Passages.of(inputs).keys[0] for name, inputs in ways.items()}
    assert len(set(keys.values())) == len(ways)


def test_what_stands_behind_the_last_token_and_sizes_of_buffers_do_not_count() -> None:
    (one,) = texts(5)
    wide, narrow = Passages.of(batch([one, torch.ones(11)])), Passages.of(batch([one]) | {"max_length_q": 5})
    assert wide.keys[0] == narrow.keys[0]
    assert (wide.lengths, narrow.lengths) == ((5, 11), (5,))
    nothing = Passages.of({"input_ids": one[None], "attention_mask": torch.zeros(1, 5)})
    assert (nothing.keys, nothing.lengths, nothing.num_tokens, len(nothing.positions_M)) == ((), (), 5, 0)


def test_an_entry_of_another_header_is_never_found(tmp_path: Path) -> None:
    (one,) = texts(5)
    fill(tmp_path / "a", [one])
    LogitCache(tmp_path / "b", header=header(teacher="two"))
    for path in (tmp_path / "a").glob("rank*"):
        shutil.copy(path, tmp_path / "b")
    assert LogitCache(tmp_path / "b", header=header(teacher="two")).get(Passages.of(batch([one])), device=CPU) is None


@pytest.mark.parametrize("kind", ["*.data", "*.index"])
def test_a_flipped_bit_anywhere_is_said_and_its_text_computed_anew(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = texts(2, 3)
    fill(tmp_path, [one, two])
    (path,) = tmp_path.glob(kind)
    whole = path.read_bytes()
    inputs = batch([one, two])
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        caplog.clear()
        cache = LogitCache(tmp_path, header=header())
        assert cache.get(Passages.of(inputs), device=CPU) is None
        assert "is damaged" in caplog.text
        cache.put(Passages.of(inputs), targets(inputs))
        assert_same(cache.get(Passages.of(inputs), device=CPU), inputs)
        (path.with_name("rank00000_00001.data")).unlink()
        (path.with_name("rank00000_00001.index")).unlink()


def test_a_text_stored_anew_is_found_by_others_beside_the_damaged_one(tmp_path: Path) -> None:
    (one,) = texts(3)
    inputs = batch([one])
    fill(tmp_path, [one])
    (data,) = tmp_path.glob("*.data")
    data.write_bytes(b"x" + data.read_bytes()[1:])
    other = LogitCache(tmp_path, header=header())
    mender = LogitCache(tmp_path, header=header(), rank=1)
    assert mender.get(Passages.of(inputs), device=CPU) is None
    mender.put(Passages.of(inputs), targets(inputs))
    assert other.get(Passages.of(inputs), device=CPU) is None  # it reads the damaged entry and forgets it
    assert_same(other.get(Passages.of(inputs), device=CPU), inputs)


def test_a_full_disk_is_said_once_and_what_is_stored_stays_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three = texts(4, 3, 2)
    cache = fill(tmp_path, [one])
    write = logit_cache._write_all

    def full(file: FileIO, content: memoryview) -> None:
        write(file, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logit_cache, "_write_all", full)
    for row in (two, three):
        cache.put(Passages.of(batch([row])), targets(batch([row])))
    monkeypatch.undo()
    cache.put(Passages.of(batch([three])), targets(batch([three])))
    assert caplog.text.count("No space left on device") == 1
    assert_same(cache.get(Passages.of(batch([one])), device=CPU), batch([one]))
    assert LogitCache(tmp_path, header=header()).get(Passages.of(batch([two])), device=CPU) is None


def test_a_damaged_header_and_runs_that_begin_at_once(tmp_path: Path) -> None:
    fill(tmp_path, texts(3))
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "header.json"
    (tmp_path / "header.json").write_text('{"teach')
    with pytest.raises(ValueError, match=r"header.json is damaged, .* delete the folder"):
        LogitCache(tmp_path, header=header())


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
    per_token, entry = header().bytes_per_token, 48
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
    "changed",
    [{"teacher": "two"}, {"vocab_size": 41}, {"top_k": 5}, {"temperature": 2.0}, {"format": 3}, {"dtype": "bfloat16"}],
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
