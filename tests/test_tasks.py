from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from natsl.config import DataConfig, MqarConfig, NeedleConfig
from natsl.data import Corpus, Split, load_text
from natsl.tasks import IGNORED, KEYS, TASKS, VALUES, Batch, TaskData

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
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "recall"))


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


# Conformance: every task of the registry.


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
    assert batch.tokens.shape == batch.targets.shape == batch.recall.shape == shape
    assert len(batch) == count
    assert batch.tokens.dtype is batch.targets.dtype is torch.int64
    assert batch.recall.dtype is torch.bool
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < (384 if TASKS[task].needs_pairs else 256)
    scored = batch.targets != IGNORED
    assert scored.any(dim=1).all()
    assert ((batch.targets >= 0) & (batch.targets < 384))[scored].all()
    assert scored[batch.recall].all()
    assert batch.recall.any() == TASKS[task].needs_pairs
    assert all(t.is_contiguous() for t in (batch.tokens, batch.targets, batch.recall))


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


# mqar


def test_mqar_layout() -> None:
    batch = make_data().batch("mqar", Split.test, 16, 0)
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
    data = make_data(seq_len=64, mqar=MqarConfig(segment=8, pair_share=0.1, query_segments=3))
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
    """Few keys are the first ones, many go on behind the values; all are used, and the values stay what they are."""
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


def test_as_many_keys_as_before_there_was_a_choice_is_the_same_data() -> None:
    first, second = make_data(), make_data(keys=64)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != make_data(keys=63).fingerprint
    # checkpoints tell it: were it another, what was trained before could not be resumed
    assert first.fingerprint == "e44187fbfab5184be9001699a152cd50d668e0e7202b613c7404fd9d7b6dce5c"


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


def test_fingerprint_covers_text_and_settings_but_not_the_path() -> None:
    first = make_data()
    assert first.fingerprint == make_data(path="elsewhere").fingerprint
    assert first.fingerprint != make_data(seq_len=400).fingerprint
    assert first.fingerprint != make_data(mqar=MqarConfig(easy_share=0.1)).fingerprint
    assert first.fingerprint != make_data(replace(make_corpus(), fingerprint="g")).fingerprint


def test_training_batch_takes_ten_milliseconds() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = make_data(load_text())
        times = []
        for step in range(30):
            start = time.perf_counter()
            data.train_batch(24, 0, step)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert sorted(times)[5] < 0.010  # the fast ones: other work on the machine is not ours to judge


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
