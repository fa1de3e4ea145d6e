"""Text: reading and splitting it; and the batches and held-out sets that tasks make of it."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natsl.data import Corpus, Split, TaskData, load_text
from natsl.errors import UserError
from natsl.tasks import TASKS, DataConfig
from natsl.tasks.bytes import BytesTask
from natsl.tasks.mqar import MqarConfig
from natsl.tasks.needle import Alphabet, NeedleConfig
from natsl.tasks.sequences import Batch
from natsl.tasks.task import Request, Task
from tests.task_helpers import check_sequence, make_corpus, make_data, same


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


def test_standard_library_is_read_once_and_in_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_bytes = Path.read_bytes

    def recorded(path: Path) -> bytes:
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    corpus = load_text()
    monkeypatch.undo()
    assert len(set(read)) == len(read) >= corpus.files
    assert len(read) < 1.1 * corpus.files  # nothing but the text
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


def parts_of_folders(corpus: Corpus) -> dict[str, set[str]]:
    """Folder → the parts that its files are in."""
    parts: dict[str, set[str]] = {}
    for file in corpus.contents:
        parts.setdefault(file.name.split("/")[0], set()).add(file.part)
    return parts


def test_folders_stay_in_one_part(tmp_path: Path) -> None:
    root = tmp_path / "packages"
    for i in range(120):
        folder = root / f"p{i % 40}" / f"inner{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_bytes(words(i, 200))
    config = DataConfig(path=str(root), split_depth=1, seq_len=64)
    corpus = load_text(config.path, config.text_rules())
    assert "by folder" in corpus.description
    part_of = parts_of_folders(corpus)
    assert len(part_of) == 40
    assert all(len(parts) == 1 for parts in part_of.values())
    assert {part for parts in part_of.values() for part in parts} == {"train", "search", "test"}
    # one by one they are split otherwise, and two folders deep the folders inside are drawn apart
    for depth, units in ((0, 120), (2, 120)):
        rules = replace(config, split_depth=depth).text_rules()
        assert load_text(config.path, rules).fingerprint != corpus.fingerprint
        assert len({rules.unit(file.name) for file in corpus.contents}) == units
    plain = TaskData(replace(config, split_depth=0), corpus, 512).fingerprint
    assert TaskData(config, corpus, 512).fingerprint == plain  # what was read is what counts


def test_folders_that_hashes_split_badly_still_stay_in_one_part(tmp_path: Path) -> None:
    """One of 24 folders holds nearly all: it is in the part that the middle of the text falls into."""
    root = tmp_path / "packages"
    for i in range(96):
        folder = root / f"p{i % 24}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.txt").write_bytes(words(i, 20_000 if i % 24 == 7 else 200))
    config = DataConfig(path=str(root), split_depth=1, seq_len=64)
    corpus = load_text(config.path, config.text_rules())
    assert "by folder" in corpus.description
    part_of = parts_of_folders(corpus)
    assert all(len(parts) == 1 for parts in part_of.values())
    assert part_of["p7"] == {"train"}
    # what is left for the other parts is too little for a sequence of this length
    with pytest.raises(UserError, match=r"is too short: .*; data.split_depth = 1 keeps folders whole"):
        TaskData(replace(config, tasks={"bytes": 1.0}, seq_len=65536), corpus, 512)


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
    elif case == "only not utf-8 in a folder":
        path.mkdir()
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
        ("only not utf-8 in a folder", r"holds no text; left out 1 file, .* 1 not UTF-8 \(latin.txt\)"),
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


# Training batches and held-out sets


def test_train_batches_follow_weights_seed_and_step() -> None:
    data = make_data(tasks={"bytes": 1.0, "mqar": 2.0, "needle": 0.0})
    assert data.tasks == ["bytes", "mqar"]
    orders = set()
    for step in range(20):
        batch = data.train_batch(12, 0, step)
        assert same(batch, data.train_batch(12, 0, step))
        assert batch.tokens.shape == (12, 384)
        has_pairs = batch.recall.any(dim=1)
        assert torch.equal(batch.relevant.any(dim=1), has_pairs), "masks stay with their sequences"
        assert has_pairs.sum() == 8
        orders.add(tuple(has_pairs.tolist()))
        source = bytes(data.corpus.train.tolist())
        for row in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.recall.tolist(), strict=True):
            check_sequence(source, *row)
    assert len(orders) > 10, "tasks are spread over the batch"
    assert not same(data.train_batch(12, 0, 1), data.train_batch(12, 1, 0))


def test_small_batches_reach_every_task() -> None:
    data = make_data(tasks={"bytes": 1.0, "mqar": 0.2})
    share = sum(int(data.train_batch(1, 0, step).recall.any()) for step in range(300)) / 300
    assert 0.1 < share < 0.24


@pytest.mark.parametrize("split", [Split.search, Split.test], ids=lambda s: s.value)
def test_eval_sets_are_fixed(split: Split) -> None:
    data = make_data(search_sequences=3, test_sequences=5)
    sets = data.eval_sets(split)
    assert list(sets) == list(TASKS)
    assert all(len(batch) == {Split.search: 3, Split.test: 5}[split] for batch in sets.values())
    again = make_data(search_sequences=3, test_sequences=5).eval_sets(split)
    assert all(same(sets[name], again[name]) for name in sets)


def test_batches_move_and_slice() -> None:
    batch = make_data().batch("mqar", Split.test, 6, 0)
    part = batch.rows(slice(2, 4)).to("cpu")
    assert len(part) == 2
    assert torch.equal(part.targets, batch.targets[2:4])
    assert torch.equal(batch.rows(torch.tensor([5])).recall, batch.recall[5:])
    assert torch.equal(part.relevant, batch.relevant[2:4])
    assert same(Batch.cat([batch.rows(slice(0, 2)), part, batch.rows(slice(4, 6))]), batch)


def test_fingerprint_covers_text_and_settings_but_not_the_path() -> None:
    first = make_data()
    assert first.fingerprint == make_data(path="elsewhere").fingerprint
    assert first.fingerprint != make_data(seq_len=400).fingerprint
    assert first.fingerprint != make_data(mqar=MqarConfig(easy_share=0.1)).fingerprint
    assert first.fingerprint != make_data(replace(make_corpus(), fingerprint="g")).fingerprint


class Operations(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_training_batch_is_made_without_a_loop_over_sequences() -> None:
    data = make_data(make_corpus())
    counts = []
    for size in (24, 48, 192):
        with Operations() as operations:
            data.train_batch(size, 0, 1)
        counts.append(operations.count)
    assert len(set(counts)) == 1
    assert counts[0] < 300  # of all tasks together


# Fingerprints


def test_as_many_keys_as_before_there_was_a_choice_is_the_same_data() -> None:
    first, second = make_data(), make_data(keys=64)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != make_data(keys=63).fingerprint
    # checkpoints hold it: if it changed, older trainings could not be resumed
    older = make_data(tasks={"bytes": 1.0, "mqar": 1.0, "needle": 1.0}, mqar=MqarConfig(shift=False))
    assert older.fingerprint == "e44187fbfab5184be9001699a152cd50d668e0e7202b613c7404fd9d7b6dce5c"


def test_newer_options_count_where_they_change_the_sequences() -> None:
    """The value is that of the version before there was ``data.mqar.shift``, with its defaults."""
    older = make_data(tasks={"mqar": 1.0}, mqar=MqarConfig(shift=False))
    assert older.fingerprint == "f96711c7107b64b838fa27918f6f40d8907ba7da71e22367be8b65753feab0c7"
    assert older.fingerprint != make_data(tasks={"mqar": 1.0}).fingerprint
    needles = make_data(mqar=MqarConfig(shift=False), needle=NeedleConfig(alphabet=Alphabet.bytes))
    assert needles.fingerprint != make_data(mqar=MqarConfig(shift=False)).fingerprint


@dataclass
class EchoConfig:
    shift: int = 1


class EchoTask(Task[EchoConfig]):
    """A task that somebody adds."""

    name = "echo"

    def make(self, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        batch = BytesTask(None, self.seq_len, self.keys).make(text, request, generator)
        return Batch(batch.tokens, batch.tokens.roll(self.config.shift, 1), batch.recall)


@dataclass
class WiderConfig(DataConfig):
    echo: EchoConfig = field(default_factory=EchoConfig)


def test_a_new_task_is_an_entry_and_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_data(tasks={"mqar": 1.0})
    monkeypatch.setitem(TASKS, "echo", EchoTask)
    corpus = make_corpus()

    def data(**tasks: float) -> TaskData:
        return TaskData(WiderConfig(tasks=tasks, echo=EchoConfig(2)), corpus, 384)

    batch = data(echo=1.0).batch("echo", Split.test, 3, 0)
    assert torch.equal(batch.targets[:, 2:], batch.tokens[:, :-2])
    assert data(mqar=1.0).fingerprint == old.fingerprint, "runs without the task are what they were"
    fingerprint = TaskData(WiderConfig(tasks={"echo": 1.0}), corpus, 384).fingerprint
    assert data(echo=1.0).fingerprint != fingerprint, "its options count where it is used"
    with pytest.raises(ValueError, match=f"data.tasks = 'sums' is not allowed: the tasks are {', '.join(TASKS)}"):
        data(sums=1.0)


@pytest.mark.parametrize("name", ["seq_len", "keys", "search_sequences", "test_sequences"])
def test_integers_are_integers(name: str) -> None:
    options: Any = {}
    for value in (2.5, 16.0, True, "3", None, -1):
        options[name] = value
        with pytest.raises(ValueError, match=rf"{name} = {value!r} is not allowed: it must be"):
            DataConfig(**options)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 383}, "model.vocab_size = 383 .* task mqar needs at least 384"),
        ({"vocab_size": 255, "tasks": {"bytes": 1.0}}, "model.vocab_size = 255 .* task bytes needs at least 256"),
        ({"corpus": make_corpus(384)}, "too short: its train part has 384 bytes, .* = 384 needs 385"),
        ({"corpus": make_corpus(held_out=100)}, "too short: its search part has 100 bytes"),
        ({"seq_len": 380}, "data.seq_len = 380 .* multiple of data.mqar.segment = 16"),
        ({"seq_len": 48}, "data.seq_len = 48 .* at least 64"),
        ({"mqar": MqarConfig(pair_share=0.5)}, "data.mqar.pair_share = 0.5 .* 96 distinct pairs .* 64 keys"),
        ({"keys": 65}, "model.vocab_size = 384 .* at least 385 .* data.keys = 65 keys"),
        ({"keys": 0}, "data.keys = 0"),
        ({"needle": NeedleConfig(needles=65)}, "data.needle.needles = 65 .* 64 keys"),
        ({"needle": NeedleConfig(needles=64), "seq_len": 192}, "data.seq_len = 192 .* each of 64 needles"),
    ],
    ids=[
        "vocab-pairs",
        "vocab-bytes",
        "short-train",
        "short-search",
        "segment",
        "no-text",
        "keys",
        "many-keys",
        "no-keys",
        "needles",
        "full",
    ],
)
def test_mistakes_get_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_data(**options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sums", {}, "task = 'sums' .* bytes, mqar, needle"),
        ("bytes", {"length": 1}, "length = 1"),
        ("bytes", {"length": 4000}, "test part has 4000 bytes, .* length = 4000 needs 4001"),
        ("mqar", {"length": 100}, "length = 100 .* multiple"),
        ("mqar", {"length": 128}, "length = 128 .* at least 144"),
        ("mqar", {"depth": 0.5}, "depth = 0.5 .* only needle"),
        ("needle", {"depth": 1.5}, "depth = 1.5 .* \\[0, 1\\]"),
        ("needle", {"count": 0}, "count = 0"),
    ],
)
def test_impossible_batches_are_refused(task: str, options: dict[str, object], message: str) -> None:
    call: dict[str, object] = {"count": 2, "seed": 0, **options}
    with pytest.raises(ValueError, match=message):
        make_data().batch(task, Split.test, **call)  # type: ignore[arg-type]


def test_pair_tasks_are_free_to_be_off() -> None:
    data = make_data(vocab_size=256, tasks={"bytes": 1.0, "mqar": 0.0}, seq_len=100)
    assert data.train_batch(2, 0, 0).tokens.max() < 256
    assert list(data.eval_sets(Split.test)) == ["bytes"]


def test_training_text_has_no_fixed_set() -> None:
    with pytest.raises(ValueError, match="split = 'train'"):
        make_data().eval_sets(Split.train)
