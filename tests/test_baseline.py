"""Baselines for every kind of model, scores on the test split, and the control by random routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from natsl.evaluate import Evaluation
from natsl.search.baseline import Judge, Scorer, baselines, score, steps_to_score
from natsl.search.config import SearchConfig
from natsl.search.front import Kind, dominates
from natsl.search.study import Record
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.search_helpers import CHUNK, ROUTED, problem, synthetic, synthetic_judge

NAMES = ("recall_error", "kept_fraction")
HYBRID = (Op.delta, Op.routed, Op.softmax, Op.routed, Op.routed, Op.routed)


def described(kinds: Sequence[Op], budgets: Sequence[float] = (0.25,)) -> dict[str, str]:
    return {item.name: item.policy.describe() for item in baselines(kinds, CHUNK, budgets)}


def test_baselines_of_three_routed_layers() -> None:
    assert described(ROUTED, (0.1, 0.25)) == {
        "all-softmax": "S S S",
        "all-delta": "D D D",
        "uniform-0.1": ".1 .1 .1",
        "uniform-0.25": ".25 .25 .25",
        "only-layer-0": "S D D",
        "only-layer-1": "D S D",
        "only-layer-2": "D D S",
        "first-half-softmax": "S S D",
        "last-half-softmax": "D S S",
        "rising-0.1": ".0333 .1 .1667",
        "falling-0.1": ".1667 .1 .0333",
        "rising-0.25": ".0833 .25 .4167",
        "falling-0.25": ".4167 .25 .0833",
    }


def test_baselines_of_a_hybrid_leave_fixed_layers_alone() -> None:
    found = described(HYBRID)
    assert found["every-second-softmax"] == "D D S S D S"
    assert found["first-half-softmax"] == "D S S S D D"
    assert found["only-layer-3"] == "D D S S D D"
    for item in baselines(HYBRID, CHUNK, (0.25,)):
        item.policy.check(HYBRID, CHUNK)


def test_one_routed_layer_has_each_policy_once() -> None:
    assert described((Op.routed,)) == {
        "all-softmax": "S",
        "all-delta": "D",
        "uniform-0.25": ".25",
        "rising-0.1": ".1",
    }


def test_schedules_over_depth_have_the_mean_of_their_name() -> None:
    for item in baselines(HYBRID, CHUNK, ()):
        if item.name.startswith(("rising", "falling")):
            budgets = [layer.budget for layer in item.policy.layers if layer.budget is not None]
            assert sum(budgets) / 4 == pytest.approx(float(item.name.split("-")[1]), abs=1e-4)
            assert all(0 <= budget <= 1 for budget in budgets)


def records(policies: Sequence[RoutingPolicy]) -> list[Record]:
    found = []
    for i, policy in enumerate(policies):
        evaluation = synthetic(policy)
        values = {"recall_error": evaluation.recall_error or 0.0, "kept_fraction": evaluation.kept_fraction}
        found.append(Record(i, i, policy, values, evaluation, True))
    return found


def scorer(judge: Judge | None = None, known: Sequence[Record] = (), draws: int = 5) -> Scorer:
    return Scorer(judge or synthetic_judge(), problem(SearchConfig()), 0, draws, known)


GOOD = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.2), LayerPolicy(Op.delta)), CHUNK)
WASTEFUL = RoutingPolicy((LayerPolicy(budget=0.9), LayerPolicy(Op.delta), LayerPolicy(Op.delta)), CHUNK)
FIXED = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(Op.softmax), LayerPolicy(Op.delta)), CHUNK)


def test_points_carry_both_splits_and_what_beats_them() -> None:
    steps: list[str] = []
    fixed = baselines(ROUTED, CHUNK, (0.1, 0.25))
    chosen = records([WASTEFUL, GOOD, FIXED])
    points, others = score(scorer(), chosen, fixed, steps.append)
    assert [point.id for point in points] == ["t0001", "t0000", "t0002"]  # by the fraction kept
    good, wasteful, single = points
    assert good.values == {
        "recall_error": synthetic(GOOD, "test").recall_error,
        "kept_fraction": pytest.approx(0.067, abs=0.01),
    }
    assert good.search_values == chosen[1].values != good.values
    assert good.measured["val_loss"] == synthetic(GOOD, "test").val_loss
    assert good.dominated_by == ()
    assert "uniform-0.25" in wasteful.dominated_by
    for point in points:
        for item in others:
            assert (item.name in point.dominated_by) == dominates(item.values, point.values, NAMES)
    assert single.gain_over_random is None  # it routes nothing
    assert len(steps) <= steps_to_score(chosen, fixed)


def test_random_routing_stands_beside_every_routed_point_and_uniform_budget() -> None:
    points, others = score(scorer(), records([GOOD, FIXED]), baselines(ROUTED, CHUNK, (0.1, 0.25)), lambda _: None)
    controls = {item.of: item for item in others if item.kind is Kind.random}
    assert set(controls) == {"t0000", "uniform-0.1", "uniform-0.25"}
    control = controls["t0000"]
    assert control.draws == 5
    assert control.search_values is None
    assert 0 < control.std["recall_error"] < 0.05
    assert control.measured["kept_by_layer"] == pytest.approx(points[0].measured["kept_by_layer"], abs=0.01)
    gain = points[0].gain_over_random
    assert gain is not None
    assert gain["recall_error"] == pytest.approx(control.values["recall_error"] - points[0].values["recall_error"])
    assert gain["recall_error"] > 0.5


def test_random_routing_gets_the_measured_fractions_and_other_seeds() -> None:
    calls: list[tuple[tuple[float, ...], int]] = []

    def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
        calls.append((fractions, seed))
        return synthetic(policy, str(seed), useful=1.0)

    judge = replace(synthetic_judge(), random=random)
    points, _ = score(scorer(judge, draws=3), records([GOOD]), [], lambda _: None)
    assert len(calls) == len({seed for _, seed in calls}) == 3
    assert {fractions for fractions, _ in calls} == {points[0].measured["kept_by_layer"]}


def test_nothing_is_evaluated_twice() -> None:
    searched: list[str] = []
    tested: list[str] = []

    def search(policy: RoutingPolicy) -> Evaluation:
        searched.append(policy.digest())
        return synthetic(policy)

    def test(policy: RoutingPolicy) -> Evaluation:
        tested.append(policy.digest())
        return synthetic(policy, "test")

    judge = replace(synthetic_judge(), search=search, test=test)
    known = records([RoutingPolicy.uniform(ROUTED, CHUNK, 0.25), FIXED])
    subject = scorer(judge, known)
    score(subject, known, baselines(ROUTED, CHUNK, (0.25,)), lambda _: None)
    assert len(tested) == len(set(tested))
    assert len(searched) == len(set(searched))
    assert not set(searched) & {record.policy.digest() for record in known}


def test_the_scale_runs_from_all_softmax_to_all_delta() -> None:
    scale = scorer().scale()
    assert scale.names == NAMES
    assert scale.best == (synthetic(RoutingPolicy.all_softmax(ROUTED, CHUNK)).recall_error, 0.0)
    assert scale.worst == (synthetic(RoutingPolicy.all_delta(ROUTED, CHUNK)).recall_error, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_on_the_test_split_is_left_out_and_noted(bad: float) -> None:
    def test(policy: RoutingPolicy) -> Evaluation:
        found = synthetic(policy, "test")
        return replace(found, recall_error=bad) if policy in (GOOD, RoutingPolicy.all_delta(ROUTED, CHUNK)) else found

    subject = scorer(replace(synthetic_judge(), test=test))
    points, others = score(subject, records([GOOD, FIXED]), baselines(ROUTED, CHUNK, ()), lambda _: None)
    assert [point.id for point in points] == ["t0001"]
    assert "all-delta" not in [item.name for item in others]
    assert subject.problems == [
        f"all-delta: objective recall_error is {bad}",
        f"t0000: objective recall_error is {bad} on the test split",
    ]
