"""A small text and the tasks on it, for tests."""

from __future__ import annotations

import random
from itertools import pairwise

import torch

from natsl.data import Corpus, TaskData
from natsl.tasks import TASKS, DataConfig
from natsl.tasks.sequences import IGNORED, KEYS, VALUES, Batch

ALL = dict.fromkeys(TASKS, 1.0)


def make_corpus(size: int = 20_000, held_out: int = 4_000) -> Corpus:
    """Random letters, another alphabet in each part, so that a stretch of text tells its part and place."""
    letters = (b"abcdefghijklmnopqrst", b"ABCDEFGHIJKLMNOPQRST", bytes(range(200, 256)))
    train, search, test = (
        torch.tensor(random.Random(i).choices(alphabet, k=n), dtype=torch.uint8)
        for i, (alphabet, n) in enumerate(zip(letters, (size, held_out, held_out), strict=True))
    )
    return Corpus(train, search, test, fingerprint="f", description="letters", files=3)


def make_data(corpus: Corpus | None = None, vocab_size: int = 384, **options: object) -> TaskData:
    config = DataConfig(**{"tasks": dict(ALL), **options})  # type: ignore[arg-type]
    return TaskData(config, corpus or make_corpus(), vocab_size)


def same(a: Batch, b: Batch) -> bool:
    names = ("tokens", "targets", "recall", "relevant")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def pairs_of(tokens: list[int]) -> dict[int, int]:
    """What followed each key that is followed by a value."""
    found: dict[int, int] = {}
    for key, value in pairwise(tokens):
        if key in KEYS and value in VALUES:
            assert found.setdefault(key, value) == value
    return found


def check_sequence(source: bytes, tokens: list[int], targets: list[int], recall: list[bool]) -> None:
    """Hold one sequence against the text it was made from, token by token."""
    length = len(tokens)
    if any(recall) and max(tokens) < 256:
        check_recalled_bytes(source, tokens, targets, recall)
        return
    text_at = [t for t in range(length) if tokens[t] < 256]
    text = bytes(tokens[t] for t in text_at)
    start = source.find(text)
    assert start >= 0, "the text is not contiguous in its source"
    place = {t: start + j for j, t in enumerate(text_at)}
    known = pairs_of(tokens)
    for t in range(length):
        next_is_text = t + 1 < length and tokens[t + 1] < 256
        if recall[t]:
            assert tokens[t] in KEYS
            assert targets[t] == known[tokens[t]]
        elif t in place and (next_is_text or t == length - 1):
            assert targets[t] == source[place[t] + 1]
        else:  # a pair, or the last byte before a pair or a question
            assert targets[t] == IGNORED


def check_recalled_bytes(source: bytes, tokens: list[int], targets: list[int], recall: list[bool]) -> None:
    """The same for a task that recalls bytes, not values: an answer has followed its byte before."""
    stretch: list[int] = []  # text: a byte, and the targets from there on
    for t, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        if recall[t]:
            assert (token, target) in pairwise(tokens[: t + 1]), "the answer has not followed this byte before"
        if recall[t] or target == IGNORED:
            stretch = []
            continue
        stretch = stretch or [token]
        assert stretch[-1] == token
        stretch.append(target)
        assert bytes(stretch) in source, "the text is not contiguous in its source"
