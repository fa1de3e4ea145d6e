"""Resampled objectives: what they add up to, that policies are paired, and tasks of their own."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from natsl.counts import Counts
from natsl.evaluate import summary
from natsl.search.bootstrap import _evaluation, _means, resampled, standard_error
from natsl.search.objective import CostContext, find_objectives
from natsl.search.study import Problem
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.search_helpers import CHUNK, HEADS, shapes

KINDS = (Op.routed, Op.delta, Op.routed)
POLICY = RoutingPolicy((LayerPolicy(budget=0.5), LayerPolicy(Op.delta), LayerPolicy(Op.softmax)), CHUNK)


def asked(*names: str) -> Problem:
    objectives = find_objectives(names, {"mqar", "needle"}, {})
    return Problem(KINDS, CHUNK, CostContext(shapes(KINDS), 4096), objectives, ())


def counted(n: int, seed: int) -> Counts:
    rng = np.random.default_rng(seed)
    kept = torch.tensor(rng.integers(0, 9, (n, 3, HEADS)))
    right, asked = torch.tensor(rng.integers(0, 8, n)), torch.full((n,), 8)
    return Counts(torch.tensor(rng.random(n) * 90), torch.tensor(rng.integers(20, 40, n)), right, asked, kept, 8)


def rows(counts: Counts, pick: np.ndarray) -> Counts:
    names = ("nats", "tokens", "right", "asked", "kept")
    return replace(counts, **{name: getattr(counts, name)[pick] for name in names})


def test_a_draw_is_the_evaluation_of_the_sequences_that_it_has() -> None:
    tested = [{"mqar": counted(7, seed), "needle": counted(5, seed + 10)} for seed in range(3)]
    rng = np.random.default_rng(4)
    drawn = {task: rng.multinomial(n, np.full(n, 1 / n), size=3) for task, n in (("mqar", 7), ("needle", 5))}
    means = _means(tested, drawn)
    picks = {task: [np.repeat(np.arange(len(row)), row) for row in rows] for task, rows in drawn.items()}
    for draw in range(3):
        for place, counts in enumerate(tested):
            own = summary({task: rows(item, picks[task][draw]) for task, item in counts.items()}, KINDS)
            found = _evaluation(means, KINDS, draw, place)
            assert found.val_loss == pytest.approx(own.val_loss)
            assert found.errors == pytest.approx(own.errors)
            assert found.kept_fraction == pytest.approx(own.kept_fraction)
            assert found.kept_by_layer == pytest.approx(own.kept_by_layer)
            assert np.allclose(found.kept_by_head, own.kept_by_head)


def test_policies_see_the_same_sequences() -> None:
    counts = {"mqar": counted(30, 0)}
    draws = resampled([(POLICY, counts), (POLICY, counts)], asked("recall_error", "decode_bytes"), 0)
    assert len(draws) == 200
    assert all(first == second for first, second in draws)
    values = [first["recall_error"] for first, _ in draws]
    wrong = (8 - counts["mqar"].right.double()) / 8
    assert standard_error(values) == pytest.approx(float(wrong.std()) / 30**0.5, rel=0.15)


def test_draws_in_which_nothing_is_asked_are_left_out() -> None:
    counts = counted(4, 0)
    few = Counts(counts.nats, counts.tokens, counts.right * 0, torch.tensor([8, 0, 0, 0]), counts.kept, 8)
    draws = resampled([(POLICY, {"mqar": few})], asked("recall_error", "kept_fraction"), 0)
    assert 100 < len(draws) < 180
    assert len(resampled([(POLICY, {"mqar": few})], asked("val_loss"), 0)) == 200


def test_token_ids_have_no_bits_per_byte() -> None:
    counts = counted(4, 0)
    assert len(resampled([(POLICY, {"mqar": counts})], asked("bits_per_byte"), 0)) == 200
    assert resampled([(POLICY, {"mqar": replace(counts, in_bytes=False)})], asked("bits_per_byte"), 0) == []


def test_two_hundred_draws_of_a_front_take_seconds_at_most() -> None:
    tested = [(POLICY, {"mqar": counted(64, seed)}) for seed in range(80)]
    start = time.process_time()
    resampled(tested, asked("recall_error", "val_loss", "prefill_flops"), 0)
    assert time.process_time() - start < 5
