"""Needles written in ordinary bytes, and needles that grow with the length."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from natsl.data import Split, TaskData
from natsl.tasks import DataConfig
from natsl.tasks.needle import Alphabet, NeedleConfig
from natsl.tasks.sequences import IGNORED, Batch
from tests.task_helpers import make_corpus, make_data

NEEDLE = re.compile(rb"@=([a-z]{2})(\d)")


def in_bytes(needles: int = 5, keys: int = 64, **options: float) -> TaskData:
    config = NeedleConfig(needles, alphabet=Alphabet.bytes, **options)
    return make_data(tasks={"needle": 1.0}, needle=config, keys=keys, vocab_size=256)


@pytest.mark.parametrize("needles", [1, 5])
def test_answers_are_what_a_reader_finds(needles: int) -> None:
    """Read as text, with a regular expression and nothing else."""
    batch = in_bytes(needles).batch("needle", Split.test, 32, 0)
    for row in range(32):
        tokens, targets = bytes(batch.tokens[row].tolist()), batch.targets[row].tolist()
        body, questions = tokens[: -4 * needles], tokens[-4 * needles :]
        known = dict(NEEDLE.findall(body))
        assert len(known) == needles
        asked = re.findall(rb"@=([a-z]{2})", questions)
        assert len(set(asked)) == needles
        where = batch.recall[row].nonzero()[:, 0].tolist()
        assert where == [384 - 4 * needles + 4 * i + 3 for i in range(needles)]
        assert [bytes([targets[t]]) for t in where] == [known[key] for key in asked]


def test_text_around_needles_is_text_and_relevant_are_the_needles() -> None:
    data = in_bytes()
    batch, source = data.batch("needle", Split.test, 32, 0), bytes(data.corpus.test.tolist())
    for row in range(32):
        tokens, targets = bytes(batch.tokens[row].tolist()), batch.targets[row].tolist()
        spans = [match.span() for match in NEEDLE.finditer(tokens[:-20])]
        marked = {t for start, end in spans for t in range(start, end)}
        assert set(batch.relevant[row].nonzero()[:, 0].tolist()) == marked
        assert bytes(tokens[t] for t in range(364) if t not in marked) in source
        for t in range(364):
            inside = t not in marked and t + 1 not in marked and t < 363
            assert targets[t] == (tokens[t + 1] if inside else IGNORED)


def test_the_text_asks_nothing_by_itself() -> None:
    """A mark in the text that looks like a question becomes a space; all else stays."""
    text = torch.tensor(list(b"@=kq1 @=ab2 @decorated x@ =kq " * 200), dtype=torch.uint8)
    corpus = replace(make_corpus(), test=text)
    config = DataConfig(tasks={"needle": 1.0}, needle=NeedleConfig(3, alphabet=Alphabet.bytes))
    batch = TaskData(config, corpus, 384).batch("needle", Split.test, 16, 0)
    for row in batch.tokens.tolist():
        body = bytes(row[:-12])
        assert len(re.findall(rb"@=[a-z]{2}", body)) == 3
        assert body.count(b"@decorated") > 5
        assert b" =kq1  =ab2" in body


def test_needles_and_keys_vary() -> None:
    data = in_bytes(8)
    batches = [data.batch("needle", Split.train, 16, seed) for seed in range(8)]
    found = [NEEDLE.findall(bytes(row)) for batch in batches for row in batch.tokens.tolist()]
    keys, values = ({item[i] for row in found for item in row} for i in (0, 1))
    assert len(keys) == 64
    assert len(values) == 10
    assert any(start % 16 > 11 for start in starts(batches)), "needles lie across the borders of chunks"


def starts(batches: list[Batch]) -> list[int]:
    return [m.start() for batch in batches for row in batch.tokens.tolist() for m in NEEDLE.finditer(bytes(row))]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_of_needles_in_bytes(depth: float) -> None:
    batch = in_bytes(1).batch("needle", Split.test, 8, 0, depth=depth)
    assert all(abs(start - depth * 375) <= 0.51 for start in starts([batch]))


@pytest.mark.parametrize("alphabet", Alphabet, ids=lambda alphabet: alphabet.value)
def test_needles_grow_with_the_length_as_far_as_there_are_keys(alphabet: Alphabet) -> None:
    data = make_data(needle=NeedleConfig(20, alphabet=alphabet))
    for length, needles in ((384, 20), (768, 40), (1536, 64)):
        batch = data.batch("needle", Split.test, 4, 0, length=length, grow=True)
        assert (batch.recall.sum(1) == needles).all()
        assert data.config.build("needle").planted(length) == (needles, 20 * length // 384)
    assert (data.batch("needle", Split.test, 4, 0, length=768).recall.sum(1) == 20).all()


def test_limits_of_needles_in_bytes() -> None:
    in_bytes(keys=676).batch("needle", Split.test, 1, 0)
    with pytest.raises(ValueError, match=r"data.keys = 677 is not allowed: needles of two letters have 676 keys"):
        in_bytes(keys=677)
    with pytest.raises(ValueError, match=r"more than 9 tokens for each of 43 needles"):
        in_bytes(43)
    with pytest.raises(ValueError, match=r"data.needle.alphabet = 'words' is not allowed"):
        NeedleConfig(alphabet="words")  # type: ignore[arg-type]
