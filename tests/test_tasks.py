"""Every task of the registry against what a task promises, then each task against its own definition."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from natsl.data import Split
from natsl.tasks import TASKS, DataConfig
from natsl.tasks.mqar import MqarConfig
from natsl.tasks.needle import NeedleConfig
from natsl.tasks.sequences import IGNORED, KEYS, VALUES, Batch
from tests.task_helpers import check_sequence, make_corpus, make_data, pairs_of, same

INTEGERS = [
    (task, name)
    for task in TASKS
    for name, kind in get_type_hints(type(DataConfig().build(task).config)).items()
    if kind is int
]


# Conformance: every task of the registry


@pytest.mark.parametrize("task", TASKS)
def test_names(task: str) -> None:
    assert TASKS[task].name == task
    assert task.isidentifier(), "it names options and records"
    metric = TASKS[task].metric
    if metric is not None:
        assert metric.isidentifier()
        assert metric.endswith("_error")
        assert [kind.metric for kind in TASKS.values()].count(metric) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_metric_is_reported_where_something_is_recalled(task: str) -> None:
    assert make_data().batch(task, Split.test, 2, 0).recall.any() == (TASKS[task].metric is not None)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_gets_its_own_options(task: str) -> None:
    config = DataConfig(seq_len=400, keys=7)
    built = config.build(task)
    assert type(built) is TASKS[task]
    assert (built.seq_len, built.keys) == (400, 7)
    assert built.config is getattr(config, task, None)
    assert built.config is None or dataclasses.is_dataclass(built.config)


@pytest.mark.parametrize(("task", "name"), INTEGERS)
def test_integer_options_are_integers(task: str, name: str) -> None:
    options: Any = type(DataConfig().build(task).config)
    for value in (2.5, 16.0, True, "3", None, -1):
        with pytest.raises(ValueError, match=rf"data.{task}.{name} = {value!r} is not allowed: it must be"):
            options(**{name: value})


@pytest.mark.parametrize("task", TASKS)
def test_depth_is_for_tasks_that_have_one(task: str) -> None:
    data = make_data()
    if TASKS[task].has_depth:
        shallow, deep = (data.batch(task, Split.test, 2, 0, depth=depth) for depth in (0.0, 1.0))
        assert not torch.equal(shallow.tokens, deep.tokens)
    else:
        with pytest.raises(ValueError, match=f"task {task} has no depth"):
            data.batch(task, Split.test, 2, 0, depth=0.5)


def test_the_tasks_load_without_torch() -> None:
    code = "import sys, natsl.tasks; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize("split", Split, ids=lambda s: s.value)
@pytest.mark.parametrize("task", TASKS)
def test_every_target_is_right(task: str, split: Split) -> None:
    data = make_data(needle=NeedleConfig(needles=3))
    source = bytes(data.corpus.part(split).tolist())
    for seed in range(4):
        batch = data.batch(task, split, 8, seed)
        for row in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.recall.tolist(), strict=True):
            check_sequence(source, *row)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("length", [None, 192, 1600])
@pytest.mark.parametrize("task", TASKS)
def test_shapes_and_ranges(task: str, length: int | None, count: int) -> None:
    batch = make_data().batch(task, Split.test, count, 0, length=length)
    shape = (count, length or 384)
    assert batch.tokens.shape == batch.targets.shape == batch.recall.shape == batch.relevant.shape == shape
    assert len(batch) == count
    assert batch.tokens.dtype is batch.targets.dtype is torch.int64
    assert batch.recall.dtype is batch.relevant.dtype is torch.bool
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < (384 if TASKS[task].needs_pairs else 256)
    scored = batch.targets != IGNORED
    assert scored.any(dim=1).all()
    assert ((batch.targets >= 0) & (batch.targets < 384))[scored].all()
    assert scored[batch.recall].all()
    assert batch.recall.any() == (TASKS[task].metric is not None)
    if not batch.recall.any():
        assert not batch.relevant.any(), "nothing is asked"
    assert all(t.is_contiguous() for t in (batch.tokens, batch.targets, batch.recall, batch.relevant))


@pytest.mark.parametrize("task", TASKS)
def test_arguments_determine_the_batch(task: str) -> None:
    first = make_data().batch(task, Split.train, 4, 1)
    torch.manual_seed(12345)
    data = make_data()
    data.batch(task, Split.search, 3, 9)
    assert same(first, data.batch(task, Split.train, 4, 1))
    assert not same(first, data.batch(task, Split.train, 4, 2))


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_neither_text_nor_draws(task: str) -> None:
    data = make_data()
    batches = {split: data.batch(task, split, 8, 0).tokens for split in Split}
    bytes_of = {split: set(t[t < 256].tolist()) for split, t in batches.items()}
    assert not bytes_of[Split.train] & bytes_of[Split.search]
    assert not bytes_of[Split.train] & bytes_of[Split.test]
    assert not bytes_of[Split.search] & bytes_of[Split.test]
    if TASKS[task].needs_pairs:
        assert not torch.equal(batches[Split.search][:, -1], batches[Split.test][:, -1])


@pytest.mark.parametrize("task", TASKS)
def test_global_random_state_is_left_alone(task: str) -> None:
    data = make_data()
    before = torch.get_rng_state()
    data.batch(task, Split.train, 2, 0)
    data.train_batch(4, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("task", TASKS)
def test_shortest_text(task: str) -> None:
    data = make_data(make_corpus(385, 385))
    batch = data.batch(task, Split.test, 3, 0)
    source = bytes(data.corpus.test.tolist())
    check_sequence(source, batch.tokens[2].tolist(), batch.targets[2].tolist(), batch.recall[2].tolist())


# What a question is answered from


def relevant_by_hand(batch: Batch) -> torch.Tensor:
    """The tokens of every pair whose key is asked, found token by token."""
    relevant = torch.zeros_like(batch.recall)
    for row, (tokens, recall) in enumerate(zip(batch.tokens.tolist(), batch.recall.tolist(), strict=True)):
        asked = {token for token, is_asked in zip(tokens, recall, strict=True) if is_asked}
        for t, (key, value) in enumerate(pairwise(tokens)):
            if key in asked and value in VALUES:
                relevant[row, t : t + 2] = True
    return relevant


@pytest.mark.parametrize("keys", [64, 70])
@pytest.mark.parametrize("task", ["mqar", "needle"])
def test_answers_are_in_the_relevant_tokens(task: str, keys: int) -> None:
    data = make_data(vocab_size=390, keys=keys, needle=NeedleConfig(needles=3))
    for seed in range(4):
        batch = data.batch(task, Split.test, 8, seed)
        for tokens, targets, recall, relevant in zip(
            *(x.tolist() for x in (batch.tokens, batch.targets, batch.recall, batch.relevant)), strict=True
        ):
            found = {(tokens[t], tokens[t + 1]) for t in range(384 - 1) if relevant[t] and relevant[t + 1]}
            questions = [t for t in range(384) if recall[t]]
            assert questions
            assert all((tokens[t], targets[t]) in found for t in questions)
            assert sum(relevant) == 2 * len({tokens[t] for t in questions}), "and nothing else is"
            assert not any(relevant[t] for t in questions)


def test_pairs_that_are_never_asked_are_not_relevant() -> None:
    """48 pairs and 32 questions: a third of the pairs is there to be ignored."""
    batch = make_data().batch("mqar", Split.test, 16, 0)
    assert torch.equal(batch.relevant, relevant_by_hand(batch))
    pairs = (batch.tokens >= 256) & ~batch.recall
    assert (pairs & ~batch.relevant).sum() == 16 * 16 * 2


def test_every_occurrence_of_a_repeated_pair_is_relevant() -> None:
    data = make_data(mqar=MqarConfig(easy_share=1.0, easy_pairs=[40], query_segments=1))
    batch = data.batch("mqar", Split.train, 16, 0)
    assert torch.equal(batch.relevant, relevant_by_hand(batch))
    assert (batch.relevant.sum(dim=1) > 2 * 16).any(), "no pair that is asked is repeated"
    assert (batch.relevant.sum(dim=1) < 2 * 48).all(), "all pairs are asked"


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 384, 500])
def test_relevant_chunks_of_needles_hold_them(chunk: int) -> None:
    batch = make_data(needle=NeedleConfig(needles=3)).batch("needle", Split.test, 64, 0)
    chunks = batch.relevant_chunks(chunk)
    assert chunks.dtype is torch.bool
    assert chunks.shape == (64, -(-384 // chunk))
    straddling = 0
    for tokens, row in zip(batch.tokens.tolist(), chunks.tolist(), strict=True):
        starts = [t for t in range(384 - 3) if tokens[t] in KEYS]
        assert len(starts) == 3
        assert {n for n, is_relevant in enumerate(row) if is_relevant} == {
            t // chunk for s in starts for t in (s, s + 1)
        }
        straddling += sum(s // chunk < (s + 1) // chunk for s in starts)
    assert (straddling > 0) == (chunk < 384)


def test_relevant_chunks_need_a_size() -> None:
    with pytest.raises(ValueError, match="chunk_size = 0 is not allowed"):
        make_data().batch("needle", Split.test, 1, 0).relevant_chunks(0)


def test_a_task_need_not_say_what_is_relevant() -> None:
    made = make_data().batch("mqar", Split.test, 3, 0)
    batch = Batch(made.tokens, made.targets, made.recall)
    assert torch.equal(batch.relevant, torch.zeros(3, 384, dtype=torch.bool))
    assert not batch.relevant_chunks(16).any()


def digest(batches: Iterable[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for x in (batch.tokens, batch.targets, batch.recall):
            found.update(x.numpy().tobytes())
    return found.hexdigest()[:16]


def test_sequences_are_those_of_earlier_versions() -> None:
    """Checkpoints, stored scores and published tables are of these sequences."""
    tasks = ("bytes", "mqar", "needle")
    options: dict[str, Any] = {"mqar": MqarConfig(easy_share=0.5, shift=False), "needle": NeedleConfig(needles=3)}
    data = make_data(tasks=dict.fromkeys(tasks, 1.0), **options)
    found = {name: digest(data.batch(name, split, 5, seed) for split in Split for seed in range(4)) for name in tasks}
    assert found == {"bytes": "ee81767ddb0cc69b", "mqar": "bcb03778472f5eee", "needle": "14509cf9ff7237e2"}
    assert digest(data.train_batch(7, 1, step) for step in range(4)) == "007fcb3f0bba3d54"


# mqar


def test_easy_pairs_are_integers() -> None:
    with pytest.raises(ValueError, match=r"data.mqar.easy_pairs = \[4, 2.5\]"):
        MqarConfig(easy_pairs=[4, 2.5])  # type: ignore[list-item]


def test_mqar_layout() -> None:
    batch = make_data(mqar=MqarConfig(shift=False)).batch("mqar", Split.test, 16, 0)
    assert batch.recall[:, -32:].all()
    assert not batch.recall[:, :-32].any()
    context = batch.tokens[:, :-32].reshape(16, 22, 16)
    is_pair = context >= 256
    assert (is_pair.any(dim=2) == is_pair.all(dim=2)).all(), "segments hold pairs or text"
    assert (is_pair.all(dim=2).sum(dim=1) == 6).all()
    assert len({tuple(row) for row in is_pair.all(dim=2).tolist()}) > 8, "their places are random"
    for row, asked in zip(batch.tokens.tolist(), batch.tokens[:, -32:].tolist(), strict=True):
        assert len(pairs_of(row)) == 48
        assert len(set(asked)) == 32
    # text scored: 16 segments of 16, but for the last byte of each stretch
    scored_text = (batch.targets != IGNORED) & ~batch.recall
    stretches = torch.nn.functional.pad(is_pair.all(dim=2).int(), (0, 1), value=1).diff(dim=1).eq(1).sum(dim=1)
    assert torch.equal(scored_text.sum(dim=1), 256 - stretches)


def test_mqar_easy_batches_only_in_training() -> None:
    data = make_data(mqar=MqarConfig(easy_share=0.3))
    counts: dict[Split, list[int]] = {split: [] for split in Split}
    for seed in range(200):
        for split in Split:
            batch = data.batch("mqar", split, 1, seed)
            row = batch.tokens[0].tolist()
            counts[split].append(len(pairs_of(row)))
            assert sum(t in VALUES for t in row) == 48
    assert set(counts[Split.search]) == set(counts[Split.test]) == {48}
    assert set(counts[Split.train]) == {4, 8, 16, 48}
    assert 0.2 < sum(n < 48 for n in counts[Split.train]) / 200 < 0.4


def test_mqar_more_questions_than_pairs() -> None:
    data = make_data(tasks={"mqar": 1.0}, seq_len=64, mqar=MqarConfig(segment=8, pair_share=0.1, query_segments=3))
    batch = data.batch("mqar", Split.test, 4, 0)
    assert all(len(pairs_of(row)) == 4 and len(set(row[-24:])) == 4 for row in batch.tokens.tolist())


def test_mqar_longer_sequences_keep_their_pairs() -> None:
    batch = make_data().batch("mqar", Split.test, 4, 0, length=1600)
    assert all(len(pairs_of(row)) == 48 for row in batch.tokens.tolist())


# needle


@pytest.mark.parametrize("needles", [1, 4])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.5), (0.9, 1.0), (0.5, 0.5)])
def test_needle_depth_range(needles: int, low: float, high: float) -> None:
    data = make_data(needle=NeedleConfig(needles, low, high))
    batch = data.batch("needle", Split.test, 64, 0)
    assert batch.recall[:, -needles:].all()
    assert batch.recall.sum() == 64 * needles
    depths = depths_of(batch, needles)
    size = 384 - 3 * needles
    assert min(depths) >= low - 0.51 / size
    assert max(depths) <= high + 0.51 / size
    if high > low:  # the whole range is used
        spread = high - low
        assert min(depths) < low + 0.1 * spread
        assert max(depths) > high - 0.1 * spread
    assert all(set(row[-needles:]) == set(pairs_of(row)) for row in batch.tokens.tolist())


@pytest.mark.parametrize("length", [None, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_needle_depth_and_length_of_one_batch(depth: float, length: int | None) -> None:
    data = make_data(needle=NeedleConfig(depth_min=0.3, depth_max=0.4))
    batch = data.batch("needle", Split.test, 8, 0, depth=depth, length=length)
    size = (length or 384) - 3
    assert all(abs(d - depth) <= 0.51 / size for d in depths_of(batch, 1))


@pytest.mark.parametrize("keys", [9, 64, 65, 400])
def test_number_of_keys(keys: int) -> None:
    """Few keys are the first ones, many go on past the values; all are used, and the values stay what they are."""
    size = max(384, 320 + keys)
    data = make_data(vocab_size=size, keys=keys, mqar=MqarConfig(pair_share=0.02), needle=NeedleConfig(needles=5))
    seen = set()
    for task in ("mqar", "needle"):
        for seed in range(12):
            batch = data.batch(task, Split.train, 32, seed)
            asked = batch.tokens[batch.recall]
            seen |= set(asked.tolist())
            values = batch.targets[batch.recall]
            assert ((values >= VALUES.start) & (values < VALUES.stop)).all()
    assert seen == {*range(256, 256 + min(keys, 64)), *range(384, 320 + keys)}


def depths_of(batch: Batch, needles: int) -> list[float]:
    """The share of the text before each needle."""
    body = batch.tokens[:, :-needles]
    is_text = body < 256
    before = is_text.cumsum(dim=1).double() / is_text.sum(dim=1, keepdim=True)
    is_key = (body >= KEYS.start) & (body < KEYS.stop)
    return [float(x) for x in before[is_key]]


def test_needle_depths_share_text() -> None:
    data = make_data()
    shallow, deep = (data.batch("needle", Split.test, 2, 0, depth=d).tokens[0] for d in (0.0, 1.0))
    assert torch.equal(shallow[shallow < 256], deep[deep < 256])
