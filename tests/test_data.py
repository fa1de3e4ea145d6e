from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path

import pytest
import torch

from natsl.data import Split, load_text


def words(seed: int, size: int) -> bytes:
    """Text without repeats to speak of."""
    return bytes(random.Random(seed).choices(b"abcdefghijklmnopqrstuvwxyz \n", k=size))


def write_folder(root: Path, files: int = 200, size: int = 200) -> Path:
    root.mkdir()
    for i in range(files):
        path = root / f"group{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(words(i, size))
    return root


def as_bytes(part: torch.Tensor) -> bytes:
    return bytes(part.tolist())


def test_standard_library_loads_fast_and_in_shares() -> None:
    start = time.perf_counter()
    corpus = load_text()
    assert time.perf_counter() - start < 2.0
    sizes = {split: corpus.part(split).numel() for split in Split}
    total = sum(sizes.values())
    assert total > 3_000_000
    assert corpus.files > 100
    assert sizes[Split.train] > 0.8 * total
    assert min(sizes[Split.search], sizes[Split.test]) > 0.02 * total
    assert all(corpus.part(split).dtype is torch.uint8 for split in Split)
    assert "standard library" in corpus.description
    assert "by file" in corpus.description
    assert load_text().fingerprint == corpus.fingerprint


def test_folder_is_split_by_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder")
    corpus = load_text(str(root))
    assert corpus.files == 200
    assert "by file" in corpus.description
    parts = {split: as_bytes(corpus.part(split)) for split in Split}
    for path in root.rglob("*.txt"):
        assert [path.read_bytes() in part for part in parts.values()].count(True) == 1
    assert sum(len(part) for part in parts.values()) == 200 * 200
    assert all(parts.values())


def test_files_keep_their_part_when_others_come(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder")
    before = load_text(str(root))
    (root / "new.md").write_bytes(words(99, 300))
    after = load_text(str(root))
    assert after.fingerprint != before.fingerprint
    for path in root.rglob("*.txt"):
        for split in Split:
            inside = path.read_bytes() in as_bytes(before.part(split))
            assert inside == (path.read_bytes() in as_bytes(after.part(split)))


def test_copies_and_hidden_files_are_not_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder")
    plain = load_text(str(root))
    for i in range(40):  # copies sort last, so that the first name decides
        (root / f"z_copy{i}.txt").write_bytes(words(i, 200))
    (root / ".git").mkdir()
    (root / ".git" / "index").write_bytes(b"\xff\x00\xff")
    (root / ".hidden").write_bytes(b"\xff")
    (root / "empty.txt").touch()
    (root / "dangling").symlink_to(root / "nothing")
    assert load_text(str(root)).fingerprint == plain.fingerprint


@pytest.mark.parametrize("files", [1, 5, 19])
def test_few_files_are_cut_into_spans(tmp_path: Path, files: int) -> None:
    root = write_folder(tmp_path / "folder", files, 1000)
    corpus = load_text(str(root))
    assert "by span" in corpus.description
    parts = [as_bytes(corpus.part(split)) for split in Split]
    joined = b"".join(parts)
    assert all(path.read_bytes() in joined for path in root.rglob("*.txt"))
    assert [len(p) for p in parts] == [900 * files, 50 * files, 50 * files]


def test_uneven_files_are_cut_into_spans(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder", files=60, size=50)
    (root / "giant.txt").write_bytes(words(7, 1_000_000))
    corpus = load_text(str(root))
    assert "by span" in corpus.description
    assert corpus.test.numel() == pytest.approx(0.05 * 1_003_000, abs=1)


def test_single_file_is_cut_into_spans(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "naïve ¾ ".encode() + words(0, 9991) + b"!"
    path.write_bytes(text)
    corpus = load_text(str(path))
    assert as_bytes(corpus.train) + as_bytes(corpus.search) + as_bytes(corpus.test) == text
    assert corpus.files == 1
    assert str(path) in corpus.description


@pytest.mark.parametrize("change", ["content", "name", "removed"])
def test_fingerprint_sees_a_change(tmp_path: Path, change: str) -> None:
    root = write_folder(tmp_path / "folder")
    before = load_text(str(root)).fingerprint
    path = root / "group0" / "file0.txt"
    if change == "content":
        path.write_bytes(path.read_bytes()[:-1] + b"~")
    elif change == "name":
        path.rename(path.with_name("other.txt"))
    else:
        path.unlink()
    assert load_text(str(root)).fingerprint != before


def test_fingerprint_sees_a_name_where_order_and_text_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(words(0, 1000))
    before = load_text(str(path)).fingerprint
    assert load_text(str(path.rename(tmp_path / "b.txt"))).fingerprint != before


def test_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    assert load_text(str(first)).fingerprint == load_text(str(second)).fingerprint


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder")
    before = torch.get_rng_state()
    load_text(str(root))
    assert torch.equal(before, torch.get_rng_state())


def bad_path(case: str, root: Path) -> str:
    path = root / "text"
    if case == "not utf-8":
        path.write_bytes(b"abc\xe9def")
    elif case == "not utf-8 in a folder":
        path.mkdir()
        (path / "good.txt").write_text("good")
        (path / "latin.txt").write_bytes(b"caf\xe9")
    elif case == "empty file":
        path.touch()
    elif case == "empty folder":
        path.mkdir()
    elif case == "folder of empty files":
        path.mkdir()
        (path / "a.txt").touch()
    elif case == "pipe":
        os.mkfifo(path)
    elif case == "no name":
        return ""
    elif case == "nul":
        return "a\0b"
    elif case == "too long":
        return "x" * 5000
    return str(path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "does not exist"),
        ("no name", "does not exist"),
        ("nul", "does not exist"),
        ("too long", "cannot be read"),
        ("pipe", "neither a file nor a folder"),
        ("empty file", "holds no text"),
        ("empty folder", "holds no text"),
        ("folder of empty files", "holds no text"),
        ("not utf-8", "text is not UTF-8 text: byte 0xe9 at offset 3"),
        ("not utf-8 in a folder", "latin.txt is not UTF-8 text: byte 0xe9 at offset 3"),
    ],
)
def test_bad_paths_get_one_clear_line(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_text(bad_path(case, tmp_path))
    assert "\n" not in str(error.value)
    assert "data.path" in str(error.value)


def test_unreadable_file_gets_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_text("abc")

    def refuse(self: Path) -> bytes:  # file modes do not stop root
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        load_text(str(path))
