"""Associative recall whose pairs lie across the borders of chunks, and that grows with the length."""

from __future__ import annotations

import pytest
import torch

from natsl.data import Split
from natsl.tasks.mqar import MqarConfig
from natsl.tasks.sequences import IGNORED, VALUES, Batch
from tests.task_helpers import check_sequence, make_data, pairs_of

SEGMENTS = [8, 16, 24]
VALUE_SET = set(VALUES)


def stretches(row: torch.Tensor) -> list[tuple[int, int]]:
    """Start and length of each run of pair tokens in a sequence without its questions."""
    edges = torch.nn.functional.pad((row >= 256).int(), (1, 1)).diff()
    starts, ends = edges.eq(1).nonzero()[:, 0].tolist(), edges.eq(-1).nonzero()[:, 0].tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def context(batch: Batch, questions: int) -> torch.Tensor:
    return batch.tokens[:, :-questions]


@pytest.mark.parametrize("split", [Split.train, Split.test], ids=lambda split: split.value)
@pytest.mark.parametrize("segment", SEGMENTS)
def test_shifted_segments_are_whole_and_as_many(segment: int, split: Split) -> None:
    data = make_data(mqar=MqarConfig(segment=segment, query_segments=2))
    pairs, source = data.config.build("mqar").planted(384)[1], bytes(data.corpus.part(split).tolist())
    for seed in range(4):
        batch = data.batch("mqar", split, 16, seed)
        offsets = set()
        for row, body in zip(range(16), context(batch, 2 * segment), strict=True):
            found = stretches(body)
            offset = {start % segment for start, _ in found}
            assert len(offset) == 1, "all segments of a sequence lie on one grid"
            offsets |= offset
            assert all(length % segment == 0 for _, length in found), "no segment is cut"
            assert sum(length for _, length in found) == 2 * pairs
            tokens = batch.tokens[row].tolist()
            assert len(pairs_of(tokens)) == pairs
            check_sequence(source, tokens, batch.targets[row].tolist(), batch.recall[row].tolist())
        assert len(offsets) > 5, "offsets vary from sequence to sequence"


def test_every_offset_occurs_and_segments_lie_across_chunks() -> None:
    batch = make_data().batch("mqar", Split.test, 400, 0)
    starts = [stretches(row)[0][0] for row in context(batch, 32)]
    assert {start % 16 for start in starts} == set(range(16))
    share = (batch.tokens >= 256).view(400, 24, 16).float().mean(2)[:, :22]
    assert ((share > 0) & (share < 1)).float().mean() > 0.25


def test_without_a_shift_segments_lie_on_chunks() -> None:
    batch = make_data(mqar=MqarConfig(shift=False)).batch("mqar", Split.test, 64, 0)
    assert all(start % 16 == 0 for row in context(batch, 32) for start, _ in stretches(row))


def test_shifted_relevant_tokens_are_the_pairs_that_are_asked() -> None:
    batch = make_data().batch("mqar", Split.test, 16, 0)
    for tokens, targets, recall, relevant in zip(
        *(x.tolist() for x in (batch.tokens, batch.targets, batch.recall, batch.relevant)), strict=True
    ):
        known, asked = pairs_of(tokens), [t for t in range(384) if recall[t]]
        assert [targets[t] for t in asked] == [known[tokens[t]] for t in asked]
        keys = {tokens[t] for t in asked}
        wanted = {t for t in range(352) if tokens[t] in keys}
        assert {t for t in range(384) if relevant[t]} == wanted | {t + 1 for t in wanted}


def test_scored_text_stays_inside_its_stretches() -> None:
    batch = make_data().batch("mqar", Split.test, 16, 0)
    for row, targets in zip(batch.tokens, batch.targets, strict=True):
        for start, length in stretches(row[:-32]):
            assert (targets[max(0, start - 1) : start + length] == IGNORED).all()


@pytest.mark.parametrize(("length", "keys", "pairs"), [(384, 64, 48), (768, 64, 64), (768, 200, 96), (1536, 200, 192)])
def test_pairs_grow_with_the_length_as_far_as_there_are_keys(length: int, keys: int, pairs: int) -> None:
    data = make_data(keys=keys, vocab_size=384 + 136)
    batch = data.batch("mqar", Split.test, 4, 0, length=length, grow=True)
    assert [len({t for t in row if t >= 256} - VALUE_SET) for row in batch.tokens[:, :-32].tolist()] == [pairs] * 4
    assert ((batch.tokens[:, :-32] >= 256).sum(1) == 2 * pairs).all()
    assert data.config.build("mqar").planted(length) == (pairs, 48 * length // 384)
    fixed = data.batch("mqar", Split.test, 4, 0, length=length)
    assert ((fixed.tokens[:, :-32] >= 256).sum(1) == 96).all()


def test_growth_at_the_own_length_changes_nothing() -> None:
    data = make_data()
    for task in data.tasks:
        plain, grown = (data.batch(task, Split.test, 3, 0, grow=grow) for grow in (False, True))
        assert torch.equal(plain.tokens, grown.tokens)


def test_shift_is_true_or_false() -> None:
    with pytest.raises(ValueError, match=r"data.mqar.shift = 1 is not allowed: it must be true or false"):
        MqarConfig(shift=1)  # type: ignore[arg-type]
