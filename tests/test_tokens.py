"""Files of token ids: reading and refusing them, their place in the vocabulary, and the sequences made of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from natsl.data import Split, TaskData, load_text
from natsl.errors import UserError
from natsl.tasks import TASKS, DataConfig
from natsl.tasks.needle import Alphabet, NeedleConfig
from natsl.tasks.sequences import BYTES, KEYS, VALUES, Batch
from natsl.text import TextRules, read_text
from natsl.tokens import LARGEST_ID, read_ids

LARGEST = 3998  # of the ids below


def some_ids(size: int = 20_003) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Distinct neighbours, so that a stretch tells its place; a fifteenth of them are below 256."""
    return np.arange(size) * 7919 % (LARGEST + 1)


def save(path: Path, ids: object, dtype: str = "uint16") -> Path:
    np.save(path, np.asarray(ids).astype(dtype))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "ids.npy", some_ids())


def data_of(path: Path, vocab_size: int = 4500, **options: Any) -> TaskData:
    config = DataConfig(path=str(path), **{"tasks": dict.fromkeys(TASKS, 1.0), **options})
    return TaskData(config, load_text(config.path, config.text_rules()), vocab_size)


# Reading


@pytest.mark.parametrize(
    ("dtype", "largest", "smallest_dtype"),
    [
        ("uint8", 255, "uint8"),
        ("int64", 255, "uint8"),
        ("uint16", 256, "int16"),
        (">i4", 32_767, "int16"),
        ("uint16", 32_768, "int32"),
        ("uint64", LARGEST_ID, "int32"),
    ],
)
def test_ids_are_held_in_the_smallest_dtype(tmp_path: Path, dtype: str, largest: int, smallest_dtype: str) -> None:
    contents, held = read_ids(save(tmp_path / "x.npy", [0, largest, 7], dtype))
    assert held == smallest_dtype
    assert np.frombuffer(contents, held).tolist() == [0, largest, 7]


def saved(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array)  # type: ignore[arg-type]
    return file.getvalue()


GOOD = saved(np.arange(1000, dtype=np.uint16))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (saved(np.array([3, -1])), "holds the id -1"),
        (saved(np.array([2**30])), "holds the id 1073741824"),
        (saved(np.array([2**63], dtype=np.uint64)), "holds the id 9223372036854775808"),
        (saved(np.array([1.0])), "holds numbers of type float64"),
        (saved(np.array([True])), "holds numbers of type bool"),
        (saved(np.ones((2, 3), int)), r"holds an array of shape \(2, 3\)"),
        (saved(np.array(3)), r"holds an array of shape \(\)"),
        (saved(np.array([], int)), "is empty"),
        (saved(np.array([3, None])), "is cut off, is no .npy file, or holds Python objects"),
        (GOOD[:-1], "is cut off"),
        (GOOD[:60], "is cut off"),
        (GOOD.replace(b"(1000,)", b"(10**9)"), "is cut off"),
        (GOOD.replace(b"(1000,)", b"('a',) "), "is cut off"),
        (b"", "is cut off"),
        (b"PK\x03\x04", "is no .npy file"),
        (b"plain text", "is no .npy file"),
    ],
    ids=[
        "negative", "large", "larger than int64", "float", "bool", "two dimensions", "a number", "empty", "objects",
        "last byte missing", "in the header", "shape that is no tuple", "shape of text", "no bytes", "zip", "text",
    ],
)  # fmt: skip
def test_what_is_no_file_of_ids_gets_one_clear_line(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        load_text(str(path))
    assert "\n" not in str(error.value)
    assert f"data.path: {path} " in str(error.value)
    assert "a one-dimensional array of integers from 0 to 1073741823" in str(error.value)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (tmp_path / "sprung").touch, ()

    path = tmp_path / "x.npy"
    path.write_bytes(saved(np.array([Trap()])))
    with pytest.raises(UserError):
        load_text(str(path))
    assert not (tmp_path / "sprung").exists()


def test_below_a_folder_such_files_are_left_out(tmp_path: Path, path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    text = read_text(str(tmp_path), TextRules())
    assert list(text.files) == ["a.txt"]
    assert "1 binary (ids.npy)" in text.left_out_line
    assert not load_text(str(tmp_path)).tokens


# The corpus


def test_ids_are_cut_into_spans_in_their_order(path: Path) -> None:
    corpus = load_text(str(path))
    assert corpus.tokens
    assert [corpus.part(split).dtype for split in Split] == [torch.int16] * 3
    assert [corpus.part(split).numel() for split in Split] == [18_003, 1_000, 1_000]
    assert torch.cat([corpus.part(split) for split in Split]).tolist() == some_ids().tolist()
    assert corpus.description == f"{path}: 1 file, 20,003 tokens, split by span"


def test_the_dtype_of_a_file_does_not_count_and_every_id_does(tmp_path: Path, path: Path) -> None:
    before = load_text(str(path))
    again = load_text(str(save(path, some_ids(), "int64")))
    assert (again.fingerprint, again.contents) == (before.fingerprint, before.contents)
    ids = some_ids()
    ids[3] += 1
    after = load_text(str(save(path, ids)))
    assert after.fingerprint != before.fingerprint
    assert after.contents[0].sha256 != before.contents[0].sha256


@pytest.mark.parametrize("keys", [3, 64, 100])
def test_ids_from_256_on_are_moved_behind_what_tasks_use(path: Path, keys: int) -> None:
    data = data_of(path, keys=keys, tasks={"bytes": 1.0})
    tokens = data.batch("bytes", Split.test, 1, 0, length=999).tokens[0]
    free = {3: 384, 64: 384, 100: 420}[keys]
    assert ((tokens < 256) | (tokens >= free)).all()
    ids = torch.where(tokens < 256, tokens, tokens - free + 256).tolist()
    test = data.corpus.test.tolist()
    assert ids in (test[:-1], test[1:])


def test_moved_ids_do_not_overflow_their_dtype(tmp_path: Path) -> None:
    ids = np.full(1000, 2**15 - 1)
    data = data_of(save(tmp_path / "x.npy", ids), vocab_size=2**16, seq_len=20, tasks={"bytes": 1.0})
    assert data.corpus.test.dtype is torch.int16
    assert set(data.batch("bytes", Split.test, 1, 0).tokens.flatten().tolist()) == {2**15 - 1 + 128}


def test_the_vocabulary_must_hold_the_largest_id_wherever_it_is(tmp_path: Path) -> None:
    ids = np.arange(20_000) % 256
    for place in (3, -3):
        ids[[3, -3]] = 1
        ids[place] = 1000
        path = save(tmp_path / "x.npy", ids)
        assert data_of(path, 1129).vocab_size == 1129
        with pytest.raises(ValueError, match=r"model.vocab_size = 1128 is not allowed: .* need at least 1129") as error:
            data_of(path, 1128)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="need at least 1165"):
            data_of(path, 1164, keys=100)


def test_a_short_file_is_measured_in_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its search part has 50 tokens, .* needs 385"):
        data_of(save(tmp_path / "x.npy", some_ids(1000)), seq_len=384)


# Sequences of the tasks


def text_of(batch: Batch) -> list[list[int]]:
    """The ids of each sequence that are no key and no value, as their file has them."""
    special = range(KEYS.start, VALUES.stop)
    return [[t - 128 if t > 256 else t for t in row if t not in special] for row in batch.tokens.tolist()]


@pytest.mark.parametrize("task", TASKS)
def test_tasks_plant_into_contiguous_ids(path: Path, task: str) -> None:
    data = data_of(path)
    batch = data.batch(task, Split.test, 5, 0)
    assert batch.tokens.dtype is torch.int64
    source = ",".join(map(str, data.corpus.test.tolist()))
    assert all(",".join(map(str, row)) in source for row in text_of(batch))
    answers = batch.targets[batch.recall]
    assert (answers.numel() > 0) == (task != "bytes")
    assert all(token in VALUES for token in answers.tolist())
    text_targets = batch.targets[~batch.recall & (batch.targets >= 0)]
    assert (text_targets >= 384).any()
    assert not ((text_targets >= 256) & (text_targets < 384)).any()


def test_needles_in_bytes_are_ids_below_256(path: Path) -> None:
    data = data_of(path, tasks={"needle": 1.0}, needle=NeedleConfig(alphabet=Alphabet.bytes))
    batch = data.batch("needle", Split.test, 5, 0)
    assert all(token in BYTES for token in batch.targets[batch.recall].tolist())
    assert (batch.tokens >= 384).any()


def test_batches_say_whether_their_text_is_bytes(path: Path, tmp_path: Path) -> None:
    data = data_of(path)
    for batch in (data.train_batch(6, 0, 0), *data.eval_sets(Split.search).values()):
        parts = (batch, batch.rows(slice(0, 2)), batch.to("cpu"), Batch.cat([batch, batch]))
        assert not any(part.in_bytes for part in parts)
    (tmp_path / "a.txt").write_text("some text " * 1000)
    assert data_of(tmp_path / "a.txt").train_batch(2, 0, 0).in_bytes
