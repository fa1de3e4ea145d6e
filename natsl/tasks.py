"""Tasks on real text: next byte, associative recall, needles; training batches and fixed held-out sets.

Shapes: B sequences, T tokens. Vocabulary: 256 bytes, then 64 keys, then 64 values, then the keys that ``data.keys`` has
beyond 64.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from natsl.config import DataConfig, check, check_counts, to_plain
from natsl.data import Corpus, Split

BYTES = range(256)
KEYS = range(256, 320)
VALUES = range(320, 384)
IGNORED = -100  # target of a position that is not scored


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences and what is scored in them.

    ``tokens`` int64 [B, T]; ``targets`` int64 [B, T], the token to predict at each position (already shifted) or
    -100 where nothing is scored; ``recall`` bool [B, T], true where the target is the value of a key asked for (the
    other scored targets are next bytes).
    """

    tokens: Tensor
    targets: Tensor
    recall: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; a GPU copies it while the host goes on."""
        target = torch.device(device)

        def move(x: Tensor) -> Tensor:
            pin = target.type == "cuda" and x.device.type == "cpu"
            return (x.pin_memory() if pin else x).to(target, non_blocking=pin)

        return Batch(move(self.tokens), move(self.targets), move(self.recall))

    def rows(self, index: slice | Tensor) -> Batch:
        """Some of the sequences."""
        return Batch(self.tokens[index], self.targets[index], self.recall[index])


@dataclass(frozen=True)
class Request:
    """What a batch is asked to be: ``count`` sequences of ``length`` tokens; ``depth``: see ``TaskData.batch``."""

    count: int
    length: int
    split: Split
    depth: float | None


class Task(Protocol):
    """How the sequences of one task are made."""

    needs_pairs: bool  # uses key and value tokens

    def check(self, config: DataConfig, length: int) -> None:
        """Raise ``ValueError`` if sequences of this length cannot be made."""

    def make(self, config: DataConfig, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Sequences drawn from ``text`` (uint8 [bytes], at least ``length + 1``) with ``generator`` alone."""


class BytesTask:
    """Plain text, every next byte scored."""

    needs_pairs = False

    def check(self, config: DataConfig, length: int) -> None:
        """Any length will do."""

    def make(self, config: DataConfig, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Windows of the text."""
        window = _windows(text, request.count, request.length + 1, generator)  # [B, T + 1]
        tokens, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        return Batch(tokens, targets, torch.zeros_like(tokens, dtype=torch.bool))


class MqarTask:
    """Multi-query associative recall: segments of pairs between contiguous text, then segments of queried keys.

    The keys of a sequence are distinct and so are its queries, while there are enough pairs. The number of pairs
    follows from ``data.seq_len``, also in sequences of another length: these hold more or less text around them.
    Easy training batches repeat a few pairs.
    """

    needs_pairs = True

    def check(self, config: DataConfig, length: int) -> None:
        """The length is whole segments with room for text; the keys suffice."""
        segment, share = config.mqar.segment, config.mqar.pair_share
        for name, value in (("data.seq_len", config.seq_len), ("length", length)):
            check(value % segment == 0, name, value, f"mqar needs a multiple of data.mqar.segment = {segment}")
        pairs, pair_segments = self._pairs(config)
        check(
            pairs <= config.keys,
            "data.mqar.pair_share",
            share,
            f"it asks for {pairs} distinct pairs in data.seq_len = {config.seq_len}, there are {config.keys} keys "
            "(data.keys)",
        )
        fewest = (pair_segments + config.mqar.query_segments + 1) * segment
        name = "data.seq_len" if length == config.seq_len else "length"
        check(length >= fewest, name, length, f"mqar needs at least {fewest}: pairs, queries and a segment of text")

    def make(self, config: DataConfig, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Sequences laid out segment by segment."""
        count, length, segment = request.count, request.length, config.mqar.segment
        pairs, pair_segments = self._pairs(config)
        queries = config.mqar.query_segments * segment
        context = length - queries  # tokens before the queries
        distinct = pairs
        if request.split is Split.train and _uniform(generator) < config.mqar.easy_share:
            choice = int(_uniform(generator) * len(config.mqar.easy_pairs))
            distinct = min(config.mqar.easy_pairs[choice], pairs)

        place = _shuffles(count, context // segment, generator)[:, :pair_segments]
        holds_pairs = torch.zeros(count, context // segment, dtype=torch.bool).scatter_(1, place, True)
        is_pair = holds_pairs.repeat_interleave(segment, dim=1)  # [B, context]

        keys, values = _draw_pairs(count, distinct, config.keys, generator)
        which = _shuffles(count, pairs, generator) % distinct  # equals a permutation unless the batch is easy
        keys, values = keys.gather(1, which), values.gather(1, which)  # [B, pairs], in order of appearance
        asked = _shuffles(count, pairs, generator)[:, torch.arange(queries) % pairs]  # [B, queries]
        body = _interleave(text, is_pair, torch.stack((keys, values), dim=-1).flatten(1), generator)
        return _with_questions(body, is_pair, keys.gather(1, asked), values.gather(1, asked))

    @staticmethod
    def _pairs(config: DataConfig) -> tuple[int, int]:
        """Pairs of a sequence and the segments that hold them."""
        segments = max(1, math.floor(config.mqar.pair_share * (config.seq_len // config.mqar.segment) + 0.5))
        return segments * config.mqar.segment // 2, segments


class NeedleTask:
    """Needles, each a key and its value, planted in contiguous text; their keys are asked for at the very end.

    The depth of a needle is the share of the text's bytes that lie before it.
    """

    needs_pairs = True

    def check(self, config: DataConfig, length: int) -> None:
        """There are enough keys and some text is left around the needles."""
        needles = config.needle.needles
        check(needles <= config.keys, "data.needle.needles", needles, f"there are {config.keys} keys (data.keys)")
        name = "data.seq_len" if length == config.seq_len else "length"
        check(length > 3 * needles, name, length, f"needle needs more than 3 tokens for each of {needles} needles")

    def make(self, config: DataConfig, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Text with the needles inserted, then the keys in another order."""
        count, needles = request.count, config.needle.needles
        size = request.length - 3 * needles  # bytes of text
        keys, values = _draw_pairs(count, needles, config.keys, generator)
        asked = _shuffles(count, needles, generator)
        low, high = config.needle.depth_min, config.needle.depth_max
        if request.depth is not None:
            low = high = request.depth
        # Whole bytes within the range; the tolerance forgives 0.07 · 100 = 7.000000000000001.
        first, last = math.ceil(low * size - 1e-9), math.floor(high * size + 1e-9)
        if first > last:  # the range lies between two bytes
            first = last = round(low * size)
        before = torch.randint(first, last + 1, (count, needles), generator=generator).sort(dim=1).values
        start = before + 2 * torch.arange(needles)  # earlier needles take two tokens each
        body_length = request.length - needles
        is_pair = torch.zeros(count, body_length, dtype=torch.bool)
        is_pair.scatter_(1, start, True).scatter_(1, start + 1, True)
        body = _interleave(text, is_pair, torch.stack((keys, values), dim=-1).flatten(1), generator)
        return _with_questions(body, is_pair, keys.gather(1, asked), values.gather(1, asked))


TASKS: dict[str, Task] = {"bytes": BytesTask(), "mqar": MqarTask(), "needle": NeedleTask()}


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
        plain = to_plain(config)
        del plain["path"]  # where the text lies is no part of what it is
        if config.keys == len(KEYS):
            del plain["keys"]  # runs from before there was a choice have none
        text = json.dumps([corpus.fingerprint, plain], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

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

        ``length``: tokens per sequence instead of ``data.seq_len``. ``depth``: where all needles lie, instead of the
        configured range (a share in [0, 1]; task ``needle`` alone).
        """
        check_counts(1, {"count": count})
        size = self.config.seq_len if length is None else length
        check_counts(2, {"length": size})
        self._check(task, size)
        self._check_text(split, size, "length")
        if depth is not None:
            check(task == "needle", "depth", depth, f"task {task} has no depth, only needle has")
            check(0 <= depth <= 1, "depth", depth, "it must lie in [0, 1]")
        generator = _generator("batch", task, split.value, seed)
        return TASKS[task].make(self.config, self.corpus.part(split), Request(count, size, split, depth), generator)

    def train_batch(self, count: int, seed: int, step: int) -> Batch:
        """The training batch of a step: tasks by weight, in random order of sequences."""
        check_counts(1, {"count": count})
        generator = _generator("mix", seed, step)
        weights = torch.tensor([self.config.tasks[name] for name in self.tasks], dtype=torch.float64)
        # One random offset for the whole batch: shares differ from the weights by less than one sequence.
        points = (torch.arange(count, dtype=torch.float64) + _uniform(generator)) / count
        ends = (weights / weights.sum()).cumsum(0)[:-1]  # the last end is 1
        counts = torch.bincount(torch.bucketize(points, ends, right=True), minlength=len(self.tasks)).tolist()
        made = []
        for name, rows in zip(self.tasks, counts, strict=True):
            if rows:
                request = Request(rows, self.config.seq_len, Split.train, None)
                own = _generator("train", name, seed, step)
                made.append(TASKS[name].make(self.config, self.corpus.train, request, own))
        if len(made) == 1:
            return made[0]
        whole = Batch(*(torch.cat([getattr(b, field) for b in made]) for field in ("tokens", "targets", "recall")))
        return whole.rows(torch.randperm(count, generator=generator))

    def eval_sets(self, split: Split) -> dict[str, Batch]:
        """The fixed held-out sequences of every task: the same in every run on the same data."""
        sizes = {Split.search: self.config.search_sequences, Split.test: self.config.test_sequences}
        check(split in sizes, "split", split.value, "only search and test have fixed sequences")
        return {name: self.batch(name, split, sizes[split], seed=0) for name in self.tasks}

    def _check(self, task: str, length: int) -> None:
        check(task in TASKS, "task", task, f"the tasks are {', '.join(TASKS)}")
        needed = VALUES.stop + max(0, self.config.keys - len(KEYS)) if TASKS[task].needs_pairs else BYTES.stop
        what = f"bytes, values and data.keys = {self.config.keys} keys" if TASKS[task].needs_pairs else "bytes"
        check(
            self.vocab_size >= needed,
            "model.vocab_size",
            self.vocab_size,
            f"task {task} needs at least {needed} ({what})",
        )
        TASKS[task].check(self.config, length)

    def _check_text(self, split: Split, length: int, name: str) -> None:
        size = self.corpus.part(split).numel()
        if size <= length:
            raise ValueError(
                f"data.path = {self.config.path!r} is too short: its {split.value} part has {size} bytes, "
                f"a sequence of {name} = {length} needs {length + 1}"
            )


def _generator(*parts: str | int) -> torch.Generator:
    """A generator seeded by all of ``parts``: neighbouring seeds, steps and splits have nothing in common."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _shuffles(count: int, size: int, generator: torch.Generator) -> Tensor:
    """One random permutation of 0 … size - 1 per row, int64 [count, size]."""
    return torch.rand(count, size, generator=generator, dtype=torch.float64).argsort(dim=1)


def _windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Contiguous stretches of text at random places, int64 [count, length]."""
    starts = torch.randint(text.numel() - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def _draw_pairs(count: int, pairs: int, choice: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct keys, out of ``choice`` many, and any values per row, each int64 [count, pairs]."""
    keys = KEYS.start + _shuffles(count, choice, generator)[:, :pairs]
    keys = torch.where(keys < KEYS.stop, keys, keys + len(VALUES))
    values = torch.randint(VALUES.start, VALUES.stop, (count, pairs), generator=generator)
    return keys, values


def _interleave(text: Tensor, is_pair: Tensor, pairs: Tensor, generator: torch.Generator) -> Tensor:
    """Contiguous text with ``pairs`` [B, 2·pairs] inserted where ``is_pair`` [B, S]; int64 [B, S].

    Every row holds the same number of pair tokens, so that filling the mask in row-major order keeps rows apart.
    """
    count, size = is_pair.shape
    body = torch.empty(count, size, dtype=torch.int64)
    body[is_pair] = pairs.flatten()
    body[~is_pair] = _windows(text, count, size - pairs.shape[1], generator).flatten()
    return body


def _with_questions(body: Tensor, is_pair: Tensor, keys: Tensor, values: Tensor) -> Batch:
    """Append the keys asked for; score next bytes inside stretches of text, and at each question its value.

    ``body`` and ``is_pair`` [B, S], ``keys`` and ``values`` [B, Q]; the batch has T = S + Q.
    """
    targets = torch.full_like(body, IGNORED)
    inside = ~(is_pair[:, :-1] | is_pair[:, 1:])  # a byte whose next token is the next byte of the text
    targets[:, :-1] = torch.where(inside, body[:, 1:], IGNORED)
    recall = torch.zeros(body.shape[0], body.shape[1] + keys.shape[1], dtype=torch.bool)
    recall[:, body.shape[1] :] = True
    return Batch(torch.cat((body, keys), dim=1), torch.cat((targets, values), dim=1), recall)
