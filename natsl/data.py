"""Text, how it is split, and the batches that tasks make of it.

All text is bytes, held as uint8 tensors; one byte is one token. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from natsl.files import to_plain
from natsl.space.check import check, check_counts
from natsl.tasks import TASKS, DataConfig
from natsl.tasks.sequences import BYTES, KEYS, VALUES, Batch, draw_uniform
from natsl.tasks.task import Request

HELD_OUT = 0.05  # share of each of the two held-out parts
FEWEST_FILES = 20  # with fewer files, 5 % of them is less than one
# Tests are missing from some distributions and hold broken text on purpose; the tables in `encodings` are near copies
# of one another, so that a split by file would show a model its own held-out text.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})

_FIRST_TASKS = {"bytes", "mqar", "needle"}  # their options are in every fingerprint, those of later ones where used


class Split(Enum):
    """The three parts of the data, which share no text."""

    train = "train"
    search = "search"  # what trials are judged on
    test = "test"  # what the report shows


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text in three parts, each uint8 [bytes]; files of one part follow each other.

    ``fingerprint``: sha256 over the split, the relative name and the contents of every file used.
    """

    train: Tensor
    search: Tensor
    test: Tensor
    fingerprint: str
    description: str
    files: int

    def part(self, split: Split) -> Tensor:
        """The text of one part, uint8 [bytes]."""
        return {Split.train: self.train, Split.search: self.search, Split.test: self.test}[split]


def load_text(path: str | None = None) -> Corpus:
    """Read a text file or a folder of them (None: the sources of the interpreter's standard library).

    A folder is split by file, 90/5/5, on a hash of the relative name: a file stays in its part when others come or go.
    One file, fewer than 20, or files that leave a part too small (likely below 100) are joined in the order of their
    hashes and cut into contiguous spans. Copies of a file are read once; hidden names are skipped. Raises
    ``ValueError`` for a path that is missing, unreadable, empty or not UTF-8.
    """
    if path is None:
        files = _read_stdlib()
        source = f"standard library of Python {platform.python_version()}"
    else:
        files = _read_user(path)
        source = path
    if not files:
        raise ValueError(f"data.path = {path!r} holds no text")
    parts, how = _split(files)
    size = sum(len(text) for text in files.values())
    return Corpus(
        train=_joined(parts[Split.train]),
        search=_joined(parts[Split.search]),
        test=_joined(parts[Split.test]),
        fingerprint=_fingerprint(parts),
        description=f"{source}: {len(files)} file{'s' * (len(files) != 1)}, {size / 1e6:.3g} MB, split by {how}",
        files=len(files),
    )


def _read_stdlib() -> dict[str, bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise ValueError(f"data.path = None: this Python has no library sources in {root}; name a text file or folder")
    return _read_all(root, [p for p in _walk(root, STDLIB_SKIPPED) if p.suffix == ".py"], skip_undecodable=True)


def _read_user(path: str) -> dict[str, bytes]:
    root = Path(path).expanduser()
    try:
        if path and root.is_dir():
            return _read_all(root, _walk(root, frozenset()))
        if path and root.is_file():
            return _read_all(root.parent, [root])
        reason = "is neither a file nor a folder" if path and root.exists() else "does not exist"
    except OSError as error:
        reason = f"cannot be read: {error.strerror} ({error.filename})"
    raise ValueError(f"data.path = {path!r} {reason}")


def _walk(root: Path, skipped: frozenset[str]) -> list[Path]:
    """Regular files below ``root`` in a fixed order, without hidden ones and caches."""
    paths: list[Path] = []

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if f not in skipped and f != "__pycache__" and not f.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((p for p in paths if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def _read_all(root: Path, paths: list[Path], skip_undecodable: bool = False) -> dict[str, bytes]:
    """Relative name → contents, without empty files and without copies, which could fall into two parts."""
    texts: dict[str, bytes] = {}
    seen: set[bytes] = set()
    for path in paths:
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            if skip_undecodable:
                continue
            raise ValueError(
                f"data.path: {path} is not UTF-8 text: byte 0x{text[error.start]:02x} at offset {error.start}"
            ) from None
        texts[path.relative_to(root).as_posix()] = text
    return texts


Parts = dict[Split, list[tuple[str, bytes]]]


def _split(files: dict[str, bytes]) -> tuple[Parts, str]:
    if len(files) >= FEWEST_FILES:
        parts: Parts = {split: [] for split in Split}
        for name, text in files.items():
            place = _place(name)
            split = Split.test if place < HELD_OUT else Split.search if place < 2 * HELD_OUT else Split.train
            parts[split].append((name, text))
        sizes = {split: sum(len(text) for _, text in part) for split, part in parts.items()}
        total = sum(sizes.values())
        if min(sizes[Split.search], sizes[Split.test]) >= 0.4 * HELD_OUT * total and 2 * sizes[Split.train] >= total:
            return parts, "file"
    order = sorted(files, key=lambda name: (_place(name), name))  # not by name: held-out text is like the rest
    name, joined = "\n".join(order), b"".join(files[name] for name in order)
    test = round(len(joined) * (1 - HELD_OUT))
    search = round(len(joined) * (1 - 2 * HELD_OUT))
    spans = {Split.train: joined[:search], Split.search: joined[search:test], Split.test: joined[test:]}
    return {split: [(name, text)] for split, text in spans.items()}, "span"


def _place(name: str) -> float:
    """A fixed place in [0, 1) for a relative name."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def _joined(part: list[tuple[str, bytes]]) -> Tensor:
    data = bytearray().join(text for _, text in part)
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _fingerprint(parts: Parts) -> str:
    digest = hashlib.sha256()
    for split in Split:
        for name, text in parts[split]:
            for field in (split.value.encode(), os.fsencode(name), text):
                digest.update(len(field).to_bytes(8, "big") + field)  # lengths keep the fields apart
    return digest.hexdigest()


class TaskData:
    """Batches of the configured tasks, each fully determined by its arguments.

    Tasks of weight 0 are off. Every draw comes from a generator of its own, so that nothing depends on the global
    random state, nor the other way round. Raises ``ValueError`` if the model's vocabulary is too small, a part of
    the corpus is shorter than a sequence, or a task cannot be laid out in ``seq_len`` tokens.
    """

    def __init__(self, config: DataConfig, corpus: Corpus, vocab_size: int) -> None:
        self.config = config
        self.corpus = corpus
        self.vocab_size = vocab_size
        self.tasks = [name for name, weight in config.tasks.items() if weight > 0]
        for name in self.tasks:
            self._check(name, config.seq_len)
        for split in Split:
            self._check_text(split, config.seq_len, "data.seq_len")
        self.fingerprint = self._fingerprint()

    def batch(
        self,
        task: str,
        split: Split,
        count: int,
        seed: int,
        *,
        length: int | None = None,
        depth: float | None = None,
    ) -> Batch:
        """``count`` sequences of one task from one part of the text.

        ``length``: tokens per sequence instead of ``data.seq_len``. ``depth``: where all needles are planted, instead
        of the configured range (a share in [0, 1]; only for tasks that have a depth).
        """
        check_counts(1, {"count": count})
        size = self.config.seq_len if length is None else length
        check_counts(2, {"length": size})
        self._check(task, size)
        self._check_text(split, size, "length")
        if depth is not None:
            having = ", ".join(name for name, kind in TASKS.items() if kind.has_depth)
            check(TASKS[task].has_depth, "depth", depth, f"task {task} has no depth, only {having} has")
            check(0 <= depth <= 1, "depth", depth, "it must lie in [0, 1]")
        generator = _generator("batch", task, split.value, seed)
        request = Request(count, size, split is Split.train, depth)
        return self.config.build(task).make(self.corpus.part(split), request, generator)

    def train_batch(self, count: int, seed: int, step: int) -> Batch:
        """The training batch of a step: tasks by weight, in random order of sequences."""
        check_counts(1, {"count": count})
        generator = _generator("mix", seed, step)
        weights = torch.tensor([self.config.tasks[name] for name in self.tasks], dtype=torch.float64)
        # One random offset for the whole batch: shares differ from the weights by less than one sequence.
        points = (torch.arange(count, dtype=torch.float64) + draw_uniform(generator)) / count
        ends = (weights / weights.sum()).cumsum(0)[:-1]  # the last end is 1
        counts = torch.bincount(torch.bucketize(points, ends, right=True), minlength=len(self.tasks)).tolist()
        parts = []
        for name, rows in zip(self.tasks, counts, strict=True):
            if rows:
                request = Request(rows, self.config.seq_len, training=True)
                own = _generator("train", name, seed, step)
                parts.append(self.config.build(name).make(self.corpus.train, request, own))
        if len(parts) == 1:
            return parts[0]
        batch = Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "targets", "recall")))
        return batch.rows(torch.randperm(count, generator=generator))

    def eval_sets(self, split: Split) -> dict[str, Batch]:
        """The fixed held-out sequences of every task: the same in every run on the same data."""
        sizes = {Split.search: self.config.search_sequences, Split.test: self.config.test_sequences}
        check(split in sizes, "split", split.value, "only search and test have fixed sequences")
        return {name: self.batch(name, split, sizes[split], seed=0) for name in self.tasks}

    def _check(self, name: str, length: int) -> None:
        task = self.config.build(name)
        needed = VALUES.stop + max(0, self.config.keys - len(KEYS)) if task.needs_pairs else BYTES.stop
        what = f"bytes, values and data.keys = {self.config.keys} keys" if task.needs_pairs else "bytes"
        check(
            self.vocab_size >= needed,
            "model.vocab_size",
            self.vocab_size,
            f"task {name} needs at least {needed} ({what})",
        )
        task.check(length)

    def _check_text(self, split: Split, length: int, name: str) -> None:
        size = self.corpus.part(split).numel()
        if size <= length:
            raise ValueError(
                f"data.path = {self.config.path!r} is too short: its {split.value} part has {size} bytes, "
                f"a sequence of {name} = {length} needs {length + 1}"
            )

    def _fingerprint(self) -> str:
        """sha256 over text and settings: trainings of equal fingerprints see the same sequences."""
        plain = to_plain(self.config)
        del plain["path"]  # where the text is has no effect on the sequences
        # Runs from before these settings existed must keep their fingerprints.
        if self.config.keys == len(KEYS):
            del plain["keys"]
        for name in TASKS.keys() - _FIRST_TASKS - set(self.tasks):
            plain.pop(name, None)
        text = json.dumps([self.corpus.fingerprint, plain], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _generator(*parts: str | int) -> torch.Generator:
    """A generator seeded by all of ``parts``: neighbouring seeds, steps and splits have nothing in common."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
