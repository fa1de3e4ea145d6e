"""Text, how it is split, and the batches that tasks make of it.

Text is bytes, held as uint8 tensors; one byte is one token. A file of token ids takes the place of text: one id is one
token, held in the smallest dtype that fits. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from natsl.errors import UserError
from natsl.files import to_plain
from natsl.record import EVERY_PART, TrainedText
from natsl.space.check import check, check_counts
from natsl.tasks import TASKS, TEXT_OPTIONS, DataConfig, drop_newer
from natsl.tasks.sequences import BYTES, KEYS, VALUES, Batch, draw_uniform, move_ids
from natsl.tasks.task import Request
from natsl.text import TextFile, TextRules, printable, read_text, shown_size

_LOG = logging.getLogger(__name__)
HELD_OUT = 0.05  # share of each of the two held-out parts
FEWEST_FILES = 20  # with fewer files, 5 % of them is less than one

_FIRST_TASKS = {"bytes", "mqar", "needle"}  # their options are in every fingerprint, those of later ones where used


class Split(Enum):
    """The three parts of the data, which share no text."""

    train = "train"
    search = "search"  # what trials are judged on
    test = "test"  # what the report shows


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text in three parts, each uint8 [bytes]; files of one part follow each other.

    ``tokens``: the parts are token ids as their file has them, uint8, int16 or int32 [tokens]. ``fingerprint``: sha256
    over the split, the relative name and the contents of every file used. ``contents``: those files, with names below
    ``folder``. ``source`` says in words where they were read, ``description`` also how many.
    """

    train: Tensor
    search: Tensor
    test: Tensor
    fingerprint: str
    description: str
    files: int
    contents: tuple[TextFile, ...] = ()
    folder: str = ""
    source: str = ""
    tokens: bool = False

    @property
    def unit(self) -> str:
        """What the parts consist of, in words."""
        return "tokens" if self.tokens else "bytes"

    def part(self, split: Split) -> Tensor:
        """The text of one part, uint8 [bytes], or its token ids."""
        return {Split.train: self.train, Split.search: self.search, Split.test: self.test}[split]


def load_text(path: str | None = None, rules: TextRules | None = None, trained: TrainedText | None = None) -> Corpus:
    """Read a text file, a folder of them or a file of token ids (None: the sources of Python's standard library).

    A folder is split by file, 90/5/5, on a hash of the relative name, or of its first ``rules.split_depth`` folders: a
    file stays in its part when others come or go. One file, fewer than 20, or files that leave a part too small (likely
    below 100) are joined in the order of their hashes and cut into contiguous spans, between folders where
    ``rules.split_depth`` is given: few of them then leave a part without any. ``trained``: what a supernet was
    trained on; unless it is this very text with this very split, files that match one of its names or contents are kept
    out of the held-out parts. What is read, and what is left out, goes to the log. Raises ``ValueError`` for a path
    that is missing or unreadable, that holds no text, or none that the supernet was not trained on.
    """
    rules = rules or TextRules()
    text = read_text(path, rules)
    folder = printable(str(text.folder.absolute()))
    digests = {name: hashlib.sha256(contents).hexdigest() for name, contents in text.files.items()}
    dtype: torch.dtype = getattr(torch, text.id_type or "uint8")
    parts, how = _split(text.files, rules, dtype.itemsize)
    if trained is not None and _fingerprint(parts) != trained.text:
        matches = trained.matches(folder, {printable(name): sha256 for name, sha256 in digests.items()})
        rest = {name: contents for name, contents in text.files.items() if printable(name) not in matches}
        if not rest:
            raise UserError(
                f"data.path = {path!r}: each of its files is one that the supernet was trained on, by name or "
                "contents, so that none is left to judge it on"
            )
        if matches:
            parts, how = _split(rest, rules, dtype.itemsize)
            parts[Split.train] += [(name, contents) for name, contents in text.files.items() if name not in rest]
            how += f"; {len(text.files) - len(rest)} that the supernet was trained on are not held out"
    # Spans of several files have no name of a file, and those of one file share it.
    uses = Counter(name for files in parts.values() for name, _ in files)
    part_of = {name: split.value for split, files in parts.items() for name, _ in files if uses[name] == 1}
    size = sum(len(contents) for contents in text.files.values())
    count = len(text.files)
    amount = shown_size(size) if text.id_type is None else f"{size // dtype.itemsize:,} tokens"
    description = f"{text.source}: {count} file{'s' * (count != 1)}, {amount}, split by {how}"
    if text.left_out:
        description += f"; {text.left_out_line}"
    _LOG.info("text: %s", description)
    return Corpus(
        train=_joined(parts[Split.train], dtype),
        search=_joined(parts[Split.search], dtype),
        test=_joined(parts[Split.test], dtype),
        fingerprint=_fingerprint(parts),
        description=description,
        files=count,
        contents=tuple(
            TextFile(printable(name), digests[name], len(contents), part_of.get(name, EVERY_PART))
            for name, contents in text.files.items()
        ),
        folder=folder,
        source=text.source,
        tokens=text.id_type is not None,
    )


Parts = dict[Split, list[tuple[str, bytes]]]


def _split(files: dict[str, bytes], rules: TextRules, width: int) -> tuple[Parts, str]:
    """The files in three parts and what they are split by; ``width``: bytes of a token, which spans do not cut."""
    if len(files) >= FEWEST_FILES:
        parts: Parts = {split: [] for split in Split}
        for name, text in files.items():
            place = _place(rules.unit(name))
            split = Split.test if place < HELD_OUT else Split.search if place < 2 * HELD_OUT else Split.train
            parts[split].append((name, text))
        sizes = {split: sum(len(text) for _, text in part) for split, part in parts.items()}
        total = sum(sizes.values())
        if min(sizes[Split.search], sizes[Split.test]) >= 0.4 * HELD_OUT * total and 2 * sizes[Split.train] >= total:
            return parts, "folder" if rules.split_depth else "file"
    # not by name: held-out text is like the rest
    order = sorted(files, key=lambda name: (_place(rules.unit(name)), name))
    if rules.split_depth:
        return _whole_units(files, order, rules), "folder"
    name, joined = "\n".join(order), b"".join(files[name] for name in order)
    count = len(joined) // width
    test = width * round(count * (1 - HELD_OUT))
    search = width * round(count * (1 - 2 * HELD_OUT))
    spans = {Split.train: joined[:search], Split.search: joined[search:test], Split.test: joined[test:]}
    return {split: [(name, text)] for split, text in spans.items()}, "span"


def _whole_units(files: dict[str, bytes], order: list[str], rules: TextRules) -> Parts:
    """Spans of files in this order that end between folders: each is in the part that its middle falls into."""
    total, start = sum(map(len, files.values())), 0
    parts: Parts = {split: [] for split in Split}
    for _, names in itertools.groupby(order, rules.unit):
        unit = [(name, files[name]) for name in names]
        size = sum(len(text) for _, text in unit)
        middle = (start + size / 2) / total
        start += size
        split = Split.test if middle >= 1 - HELD_OUT else Split.search if middle >= 1 - 2 * HELD_OUT else Split.train
        parts[split] += unit
    return parts


def _place(name: str) -> float:
    """A fixed place in [0, 1) for a relative name."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def _joined(part: list[tuple[str, bytes]], dtype: torch.dtype) -> Tensor:
    data = bytearray().join(text for _, text in part)
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


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
        self._text = {split: move_ids(corpus.part(split), config.keys) for split in Split}
        needed = 1 + max(int(text.max()) for text in self._text.values())
        check(
            vocab_size >= needed,
            "model.vocab_size",
            vocab_size,
            f"the ids of data.path = {config.path!r}, moved behind keys and values, need at least {needed}",
        )
        self.fingerprint = self.fingerprint_with(corpus.fingerprint)

    def batch(
        self,
        task: str,
        split: Split,
        count: int,
        seed: int,
        *,
        length: int | None = None,
        depth: float | None = None,
        grow: bool = False,
    ) -> Batch:
        """``count`` sequences of one task from one part of the text.

        ``length``: tokens per sequence instead of ``data.seq_len``. ``depth``: where all needles are planted, instead
        of the configured range (a share in [0, 1]; only for tasks that have a depth). ``grow``: longer sequences hold
        more that is to be recalled, in proportion, as far as there are keys; else as much as those of ``data.seq_len``.
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
        request = Request(count, size, split is Split.train, depth, grow)
        return self._make(task, split, request, generator)

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
                parts.append(self._make(name, Split.train, request, own))
        if len(parts) == 1:
            return parts[0]
        return Batch.cat(parts).rows(torch.randperm(count, generator=generator))

    def eval_sets(self, split: Split) -> dict[str, Batch]:
        """The fixed held-out sequences of every task: the same in every run on the same data."""
        sizes = {Split.search: self.config.search_sequences, Split.test: self.config.test_sequences}
        check(split in sizes, "split", split.value, "only search and test have fixed sequences")
        return {name: self.batch(name, split, sizes[split], seed=0) for name in self.tasks}

    def _make(self, task: str, split: Split, request: Request, generator: torch.Generator) -> Batch:
        batch = self.config.build(task).make(self._text[split], request, generator)
        return replace(batch, in_bytes=not self.corpus.tokens)

    def _check(self, name: str, length: int) -> None:
        task = self.config.build(name)
        needed = VALUES.stop + max(0, self.config.keys - len(KEYS)) if task.uses_pairs() else BYTES.stop
        what = f"bytes, values and data.keys = {self.config.keys} keys" if task.uses_pairs() else "bytes"
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
            raise UserError(
                f"data.path = {self.config.path!r} is too short: its {split.value} part has {size} {self.corpus.unit}, "
                f"a sequence of {name} = {length} needs {length + 1}{self._whole_folders()}"
            )

    def _whole_folders(self) -> str:
        depth = self.config.split_depth
        return f"; data.split_depth = {depth} keeps folders whole, another one or 0 splits otherwise" if depth else ""

    def fingerprint_with(self, text: str) -> str:
        """sha256 over settings and a text of this fingerprint: trainings of equal ones see the same sequences."""
        plain = to_plain(self.config)
        for name in TEXT_OPTIONS:
            del plain[name]
        # Runs from before these settings existed must keep their fingerprints.
        if self.config.keys == len(KEYS):
            del plain["keys"]
        drop_newer(plain)
        for name in TASKS.keys() - _FIRST_TASKS - set(self.tasks):
            plain.pop(name, None)
        return hashlib.sha256(json.dumps([text, plain], sort_keys=True).encode()).hexdigest()


def _generator(*parts: str | int) -> torch.Generator:
    """A generator seeded by all of ``parts``: neighbouring seeds, steps and splits have nothing in common."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
