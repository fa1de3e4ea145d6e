"""The selection share and what is compared: errors, the rule of nothing to select, points, files, static heads."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from natsl.counts import Counts
from natsl.files import to_plain
from natsl.search.config import SearchConfig
from natsl.search.controls.comparer import SHUFFLES, Comparer, Rules
from natsl.search.controls.comparison import LEARNED, Comparison, chosen_points, selection_share, spread_out
from natsl.search.controls.hindsight import PASSES
from natsl.search.controls.static import EXTRA, Shape, greedy_heads, mixture, most_evaluations
from natsl.search.fault import WorkerError
from natsl.search.front import Front
from natsl.search.study import PolicyStudy
from natsl.space.cost import kv_token_bytes
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.search_helpers import (
    CHUNK,
    CHUNKS,
    ROUTED,
    built,
    compared,
    searched,
    shapes,
    synthetic,
    synthetic_counts,
)

ONE, EVERY = np.ones(64), np.full(64, 32.0)
POLICY = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.2), LayerPolicy(Op.delta)), CHUNK)
FAMILY = [RoutingPolicy.all_delta(ROUTED, CHUNK), RoutingPolicy.all_softmax(ROUTED, CHUNK)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> PolicyStudy:
    return searched(tmp_path_factory.mktemp("study"), SearchConfig(n_trials=20))


@pytest.fixture(scope="module")
def front(study: PolicyStudy) -> Front:
    return compared(built(study), study)


@pytest.mark.parametrize(
    ("learned", "expected"), [(30.0, 0.0), (3.0, 0.9), (0.0, 1.0), (-3.0, 1.1), (33.0, -0.1)], ids=str
)
def test_the_share_is_the_part_of_what_hindsight_gains_and_never_clipped(learned: float, expected: float) -> None:
    share = selection_share(30 * ONE, learned * ONE, 0 * ONE, EVERY, 0.01)
    assert share is not None
    assert share.value == pytest.approx(expected)
    assert share.error == pytest.approx(0, abs=1e-9)
    assert share.gap == pytest.approx(30 / 32)


def test_the_error_of_a_share_is_that_of_resampled_sequences() -> None:
    rng = np.random.default_rng(0)
    shuffled = rng.normal(20, 4, 200)
    learned, hindsight = shuffled - rng.normal(6, 3, 200), shuffled - rng.normal(9, 3, 200)
    weights = rng.integers(20, 40, 200).astype(float)
    share = selection_share(shuffled, learned, hindsight, weights, 0.01)
    assert share is not None
    assert share.value == pytest.approx(6 / 9, abs=0.05)
    values, gaps = [], []
    for _ in range(2000):
        pick = rng.integers(0, 200, 200)
        a, b, c, w = (x[pick].sum() for x in (shuffled, learned, hindsight, weights))
        values.append((a - b) / (a - c))
        gaps.append((a - c) / w)
    assert share.error == pytest.approx(np.std(values), rel=0.1)
    assert share.gap_error == pytest.approx(np.std(gaps), rel=0.1)


@pytest.mark.parametrize(
    ("gaps", "floor"),
    [(np.full(64, 0.1), 0.005), (np.where(np.arange(64) < 1, 64.0, 0.0), 0.005), (np.full(64, -9.0), 0.005)],
    ids=["below the floor", "below two errors", "negative"],
)
def test_there_is_nothing_to_select_where_hindsight_gains_nothing(gaps: np.ndarray, floor: float) -> None:
    share = selection_share(gaps, 0 * ONE, 0 * ONE, EVERY, floor)
    assert share is not None
    assert (share.value, share.error) == (None, None)
    assert share.gap == pytest.approx(gaps.sum() / EVERY.sum())


def test_one_sequence_has_no_share() -> None:
    assert selection_share(*(np.ones(1),) * 4, 0.01) is None
    assert selection_share(ONE, ONE, ONE, 0 * ONE, 0.01) is None


@pytest.mark.parametrize(
    ("count", "most", "must", "expected"),
    [
        (0, 6, None, []),
        (1, 3, 0, [0]),
        (5, 6, 2, [0, 1, 2, 3, 4]),
        (11, 6, None, [0, 2, 4, 6, 8, 10]),
        (11, 6, 4, [0, 2, 4, 6, 8, 10]),
        (11, 6, 5, [0, 2, 5, 6, 8, 10]),
        (11, 6, 1, [0, 1, 4, 6, 8, 10]),
        (11, 2, 5, [5, 10]),
    ],
)
def test_points_are_spread_over_the_front(count: int, most: int, must: int | None, expected: list[int]) -> None:
    assert spread_out(count, most, must) == expected


def test_the_knee_and_the_ends_that_keep_anything_are_compared() -> None:
    costs = [0.0, 0.0, *[0.1 * i for i in range(1, 20)]]
    chosen = chosen_points(costs, 5, 6, 3)
    assert len(chosen) == 6
    assert {2, 5, 20} <= set(chosen)
    assert sum(chosen.values()) == 3
    assert chosen[5]
    assert chosen_points(costs, 0, 6, 3).keys() >= {2, 20}
    assert chosen_points([0.0], 0, 6, 3) == {}


def test_a_comparison_is_at_the_cost_of_the_learned_router(front: Front) -> None:
    assert [item.of for item in front.comparisons] == [
        point.id for point in front.points if front.comparison(point.id) is not None
    ]
    knee = front.comparison(front.knee)
    assert knee is not None
    recall, text = knee.tasks
    assert (recall.task, recall.metric, text.task, text.metric) == ("mqar", "recall_error", "bytes", "val_loss")
    for item in knee.tasks:
        for rival in item.rivals:
            assert (rival.kept, rival.bytes) == pytest.approx((item.learned.kept, item.learned.bytes))
    draws = {rival.name: rival.draws for rival in recall.rivals}
    assert (draws["shuffled"], draws["random_heads"], draws["drop"]) == (SHUFFLES, 5, 1)
    assert recall.share is not None
    assert recall.share.value is not None
    assert 0.7 < recall.share.value < 1.1
    assert text.share is not None
    assert text.share.value is None, "no control changes the text"
    chunks = [round(CHUNKS * kept) for kept in synthetic(front.point(knee.of).policy, "test").kept_by_layer]
    expected = sum(kv_token_bytes(shape) * CHUNK * n for shape, n in zip(shapes(ROUTED), chunks, strict=True))
    assert recall.learned.bytes == pytest.approx(expected)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_random_routes_are_known_to_a_supernet_that_was_trained_with_noise(noise: float) -> None:
    comparison = Comparer(synthetic_counts, shapes(ROUTED), FAMILY, Rules(0, 2, noise)).compare("a", POLICY, True)
    assert comparison is not None
    trained = {rival.name: rival.trained for rival in comparison.tasks[0].rivals}
    assert trained["shuffled"] == trained["random_heads"] == (noise > 0)
    assert not any(trained[name] for name in ("drop", "keep_and_write", "window", "half_window", "fixed_half"))
    assert trained["static"]
    assert trained["hindsight"] == (noise > 0)


def test_static_heads_are_mixed_to_the_cost_of_the_router() -> None:
    comparer = Comparer(synthetic_counts, shapes(ROUTED), FAMILY, Rules(0, 2, 0.0))
    comparison = comparer.compare("a", POLICY, False)
    assert comparison is not None
    item = comparison.tasks[0]
    static = next(rival for rival in item.rivals if rival.name == "static")
    ends = [synthetic_counts(policy, LEARNED, 0)["mqar"] for policy in FAMILY]
    delta, softmax = (1 - float(end.right.sum() / end.asked.sum()) for end in ends)
    assert static.value == pytest.approx((1 - item.learned.kept) * delta + item.learned.kept * softmax)
    assert static.kept == pytest.approx(item.learned.kept)
    assert not any(rival.name.startswith("hindsight") for rival in item.rivals)
    assert item.share is None
    assert comparer.passes == comparer.planned([False]) == 1 + 5 + 2 + 6 + 2 + 1
    comparer.compare("b", POLICY, True)
    assert comparer.passes == comparer.planned([False, True]) == 17 + 17 + 2 * PASSES


def test_a_control_that_is_not_finite_is_left_out_and_noted() -> None:
    def counts(policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts]:
        if name in ("drop", "shuffled"):
            raise FloatingPointError("logits are not finite")
        return synthetic_counts(policy, name, draw)

    comparer = Comparer(counts, shapes(ROUTED), FAMILY, Rules(0, 2, 0.0))
    comparison = comparer.compare("a", POLICY, True)
    assert comparison is not None
    assert not {"drop", "shuffled"} & {rival.name for rival in comparison.tasks[0].rivals}
    assert comparison.tasks[0].share is None
    assert comparer.problems == [*["shuffled@a: logits are not finite"] * 5, "drop@a: logits are not finite"]


@pytest.mark.parametrize(("name", "noted"), [("hindsight", True), ("drop", False)])
def test_a_control_in_hindsight_whose_worker_ends_is_left_out_and_noted(name: str, noted: bool) -> None:
    def counts(policy: RoutingPolicy, control: str, draw: int) -> dict[str, Counts]:
        if control == name:
            raise WorkerError("an evaluation took longer than search.trial_timeout = 9 s")
        return synthetic_counts(policy, control, draw)

    comparer = Comparer(counts, shapes(ROUTED), FAMILY, Rules(0, 2, 0.0))
    with contextlib.nullcontext() if noted else pytest.raises(WorkerError):
        comparison = comparer.compare("a", POLICY, True)
        assert comparison is not None
        assert name not in {rival.name for rival in comparison.tasks[0].rivals}
        assert comparer.problems == [f"{name}@a: an evaluation took longer than search.trial_timeout = 9 s"]


def test_comparisons_are_in_front_json_and_read_back(front: Front) -> None:
    plain = json.loads(json.dumps(to_plain(front.to_dict())))
    assert tuple(Comparison.from_dict(item) for item in plain["controls"]) == front.comparisons
    recall = plain["controls"][0]["tasks"]["mqar"]
    assert {"value", "error", "gap", "gap_error"} == set(recall["selection_share"])
    assert replace(front, comparisons=()).to_dict()["controls"] == []


def test_heads_are_added_one_by_one_by_what_they_give() -> None:
    worth = {(0, 0): 1.0, (0, 1): 0.2, (2, 0): 3.0, (2, 1): 0.5}
    shape = Shape((Op.routed, Op.delta, Op.routed), 2, 8)
    policies = {shape.policy([head]): value for head, value in worth.items()}
    asked: list[RoutingPolicy] = []

    def judge(policy: RoutingPolicy) -> tuple[float, ...]:
        asked.append(policy)
        return (-sum(value for single, value in policies.items() if _contains(policy, single)),)

    path = greedy_heads(shape, judge)
    assert [policy.describe() for policy in path] == ["D D [1,0]", "[1,0] D [1,0]", "[1,0] D S"]
    assert len(asked) == 4 + 3 + 2


def test_static_heads_have_the_mix_temperature_of_the_space() -> None:
    shape = Shape((Op.routed,) * 3, 2, 8, mix_temperature=0.5)
    assert shape.policy([(0, 1), (2, 0), (2, 1)]).describe() == "[0,1]/.5 D S/.5"


def _contains(policy: RoutingPolicy, single: RoutingPolicy) -> bool:
    def heads(layer: LayerPolicy) -> tuple[float, ...]:
        if isinstance(layer.budget, tuple):
            return layer.budget
        return (1.0, 1.0) if layer.op is Op.softmax else (0.0, 0.0)

    pairs = zip(policy.layers, single.layers, strict=True)
    return all(a >= b for one, other in pairs for a, b in zip(heads(one), heads(other), strict=True))


def test_many_heads_cost_a_bounded_number_of_evaluations() -> None:
    rng, asked = random.Random(0), []

    def judge(policy: RoutingPolicy) -> tuple[float, ...]:
        asked.append(policy)
        return (rng.random(),)

    path = greedy_heads(Shape((Op.routed,) * 8, 8, 64), judge)
    assert len(asked) == most_evaluations(64) == 64 + EXTRA
    assert len(path) == 1 + -(-EXTRA // 6)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(0.0, (0, 0, 0.0)), (0.1, (0, 1, 0.5)), (0.2, (0, 1, 1.0)), (0.6, (1, 2, 0.5)), (1.1, (2, 2, 0.0))],
)
def test_costs_between_neighbours_are_mixtures(cost: float, expected: tuple[int, int, float]) -> None:
    i, j, weight = mixture([0.0, 0.2, 1.0], cost)
    assert (i, j) == expected[:2]
    assert weight == pytest.approx(expected[2])
