"""Scores on the test split, what dominates what, and the control by random routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from natsl.counts import Counts
from natsl.evaluate import Evaluation
from natsl.search.baseline import Named, baselines
from natsl.search.config import SearchConfig
from natsl.search.controls.static import most_evaluations
from natsl.search.families import Family, Swept
from natsl.search.front import Kind, Point
from natsl.search.judge import Judge
from natsl.search.pareto import dominates
from natsl.search.question import Method, Question, Queue
from natsl.search.score import RANDOM_POINTS, Scorer, score, steps_to_score
from natsl.search.trial import Record
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import SearchSpace
from tests.search_helpers import CHUNK, ROUTED, on_test, problem, searching, synthetic, synthetic_judge, synthetic_test

NAMES = ("recall_error", "kept_fraction")


def records(policies: Sequence[RoutingPolicy]) -> list[Record]:
    found = []
    for i, policy in enumerate(policies):
        evaluation = synthetic(policy)
        values = {"recall_error": evaluation.errors["recall_error"] or 0.0, "kept_fraction": evaluation.kept_fraction}
        found.append(Record(i, i, policy, values, evaluation, True))
    return found


def scorer(judge: Judge | None = None, known: Sequence[Record] = (), config: SearchConfig | None = None) -> Scorer:
    config = config or SearchConfig()
    return Scorer(judge or synthetic_judge(), problem(config), config, 0, known)


GOOD = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.2), LayerPolicy(Op.delta)), CHUNK)
WASTEFUL = RoutingPolicy((LayerPolicy(budget=0.9), LayerPolicy(Op.delta), LayerPolicy(Op.delta)), CHUNK)
FIXED = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(Op.softmax), LayerPolicy(Op.delta)), CHUNK)


def test_points_carry_both_splits_and_what_beats_them() -> None:
    steps: list[str] = []
    fixed = baselines(ROUTED, CHUNK, (0.1, 0.25), SearchSpace())
    chosen = records([WASTEFUL, GOOD, FIXED])
    points, others, _ = score(scorer(), chosen, fixed, [], steps.append)
    assert [point.id for point in points] == ["t0001", "t0000", "t0002"]  # by the fraction kept
    good, wasteful, single = points
    assert good.values == {
        "recall_error": on_test(GOOD).errors["recall_error"],
        "kept_fraction": pytest.approx(0.067, abs=0.01),
    }
    assert good.search_values == chosen[1].values != good.values
    assert good.measured["val_loss"] == on_test(GOOD).val_loss
    assert good.dominated_by == ()
    assert "uniform-0.25" in wasteful.dominated_by
    for point in points:
        for item in others:
            assert (item.name in point.dominated_by) == dominates(item.values, point.values, NAMES)
    assert single.gain_over_random is None  # it routes nothing
    assert len(steps) <= steps_to_score(chosen, fixed, [])


def test_random_routing_stands_beside_every_routed_point_and_uniform_budget() -> None:
    fixed = baselines(ROUTED, CHUNK, (0.1, 0.25), SearchSpace())
    points, others, _ = score(scorer(), records([GOOD, FIXED]), fixed, [], lambda _: None)
    controls = {item.of: item for item in others if item.kind is Kind.random}
    assert set(controls) == {"t0000", "uniform-0.1", "uniform-0.25"}
    control = controls["t0000"]
    assert control.draws == 5
    assert control.search_values is None
    assert 0 < control.std["recall_error"] < 0.05
    assert control.measured["kept_by_layer"] == points[0].measured["kept_by_layer"]
    gain = points[0].gain_over_random
    assert gain is not None
    assert gain["recall_error"] == pytest.approx(control.values["recall_error"] - points[0].values["recall_error"])
    assert gain["recall_error"] > 0.5


def test_of_many_points_random_routing_stands_beside_some() -> None:
    policies = [
        RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.01 * i), LayerPolicy(Op.delta)), CHUNK)
        for i in range(1, 31)
    ]
    subject, chosen = scorer(), records(policies)
    points, others, _ = score(subject, chosen, [], [], lambda _: None)
    beside = [item.of for item in others]
    assert len(beside) == RANDOM_POINTS
    knee = subject.scale().knee([point.search_values for point in points])
    assert knee is not None
    assert {points[0].id, points[knee].id, points[-1].id} <= set(beside)
    assert subject.evaluations(chosen) == {"trials": 30, "search split": 2, "families": 0, "test split": 70}


def test_static_heads_are_those_that_pay_on_the_search_split() -> None:
    steps: list[str] = []

    def judged(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        found = synthetic(policy)
        heads = [
            layer.budget if isinstance(layer.budget, tuple) else (float(layer.op is Op.softmax),) * 2
            for layer in policy.layers
        ]
        error = 1 - 0.5 * heads[1][1] - 0.4 * heads[2][0]
        return replace(found, errors={**found.errors, "recall_error": error}, val_loss=2.0)

    found = scorer(searching(judged)).static_heads(steps.append)
    assert len(steps) == most_evaluations(6)
    assert [item.policy.describe() for item in found] == ["D [0,1] D", "D [0,1] [1,0]"], "more heads give nothing"
    assert [item.name for item in found] == ["static-1", "static-2"]
    assert {item.kind for item in found} == {Kind.static}


def test_static_heads_have_the_mix_temperature_of_the_space() -> None:
    space = SearchSpace(mix_temperature_min=0.5, mix_temperature_max=0.5)
    found = scorer(config=SearchConfig(space=space)).static_heads(lambda _: None)
    assert found
    for item in found:
        assert all(layer.op is Op.delta or layer.mix_temperature == 0.5 for layer in item.policy.layers)


def test_random_routing_gets_the_measured_fractions_and_other_seeds() -> None:
    calls: list[tuple[tuple[float, ...], int]] = []

    def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
        calls.append((fractions, seed))
        return synthetic(policy, str(seed), useful=1.0)

    judge = replace(synthetic_judge(), random=random)
    points, _, _ = score(scorer(judge, config=SearchConfig(random_draws=3)), records([GOOD]), [], [], lambda _: None)
    assert len(calls) == len({seed for _, seed in calls}) == 3
    assert {fractions for fractions, _ in calls} == {points[0].measured["kept_by_layer"]}


@pytest.mark.parametrize("better", [True, False], ids=["better", "worse"])
@pytest.mark.parametrize("names", [["recall_error", "kept_fraction"], ["recall_error", "decode_bytes"]], ids="-".join)
def test_random_routing_dominates_a_point_if_its_quality_is_better(names: list[str], better: bool) -> None:
    """Whatever noise its own kept fractions have: its costs are those of the point."""

    def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
        found = on_test(policy)
        noisy = tuple(fraction * (1 + 1e-9 * (seed % 5 + 1)) for fraction in fractions)
        error = (found.errors["recall_error"] or 0.0) + (-0.01 if better else 0.01)
        errors = {**found.errors, "recall_error": error}
        return replace(found, errors=errors, kept_by_layer=noisy, kept_fraction=found.kept_fraction + 1e-9)

    config = SearchConfig(objectives=names)
    chosen = [replace(item, values=dict.fromkeys(names, 0.5)) for item in records([GOOD])]
    subject = scorer(replace(synthetic_judge(), random=random), config=config)
    points, others, _ = score(subject, chosen, [], [], lambda _: None)
    assert others[0].values[names[1]] == points[0].values[names[1]]
    assert others[0].std.keys() == {"recall_error", "val_loss", "bits_per_byte"}
    assert points[0].dominated_by == (("random@t0000",) if better else ())


@pytest.mark.parametrize("older", [0, 2, 3], ids=["none", "the first two", "all"])
def test_fractions_of_tasks_are_means_over_the_draws_that_all_have_them(older: int) -> None:
    calls = 0

    def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls <= older:  # stored before tasks had fractions of their own
            return synthetic(policy, str(seed))
        heads = ((0.0, 0.0), (0.1 * calls, 0.2 * calls), (0.0, 0.0))
        found = synthetic(policy, str(seed))
        return replace(found, kept_fraction_by_task={"mqar": 0.05 * calls}, kept_by_task={"mqar": heads})

    judge = replace(synthetic_judge(), random=random)
    subject = scorer(judge, config=SearchConfig(random_draws=3))
    _, (control,), _ = score(subject, records([GOOD]), [], [], lambda _: None)
    if older:
        assert "kept_by_task" not in control.measured
    else:
        kept = control.measured["kept_by_task"]["mqar"]
        assert kept["kept_fraction"] == pytest.approx(0.1)
        assert kept["by_head"][1] == pytest.approx((0.2, 0.4))


def test_a_baseline_that_breaks_a_constraint_dominates_nothing() -> None:
    fixed = baselines(ROUTED, CHUNK, (0.25,), SearchSpace())
    expensive = RoutingPolicy((LayerPolicy(budget=0.9), LayerPolicy(Op.delta), LayerPolicy(Op.delta)), CHUNK)
    free, _, _ = score(scorer(), records([expensive]), fixed, [], lambda _: None)
    assert "uniform-0.25" in free[0].dominated_by
    loss = on_test(RoutingPolicy.uniform(ROUTED, CHUNK, 0.25)).val_loss
    assert loss is not None
    config = SearchConfig(constraints={"val_loss": loss - 1e-6})
    bound, others, _ = score(scorer(config=config), records([expensive]), fixed, [], lambda _: None)
    assert not next(item for item in others if item.name == "uniform-0.25").feasible
    expected = {item.name for item in others if item.measured["val_loss"] <= loss - 1e-6}
    assert set(bound[0].dominated_by) == set(free[0].dominated_by) & expected


def test_nothing_is_evaluated_twice() -> None:
    searched: list[str] = []
    tested: list[str] = []

    def search(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        searched.append(policy.digest())
        return synthetic(policy, share)

    def test(policy: RoutingPolicy) -> dict[str, Counts]:
        tested.append(policy.digest())
        return synthetic_test(policy)

    judge = replace(searching(search), test=test)
    known = records([RoutingPolicy.uniform(ROUTED, CHUNK, 0.25), FIXED])
    subject = scorer(judge, known)
    score(subject, known, baselines(ROUTED, CHUNK, (0.25,), SearchSpace()), [], lambda _: None)
    assert len(tested) == len(set(tested))
    assert len(searched) == len(set(searched))
    assert not set(searched) & {record.policy.digest() for record in known}


def test_the_scale_runs_from_all_softmax_to_all_delta() -> None:
    scale = scorer().scale()
    assert scale.names == NAMES
    assert scale.best == (synthetic(RoutingPolicy.all_softmax(ROUTED, CHUNK)).errors["recall_error"], 0.0)
    assert scale.worst == (synthetic(RoutingPolicy.all_delta(ROUTED, CHUNK)).errors["recall_error"], 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_on_the_test_split_is_left_out_and_noted(bad: float) -> None:
    def test(policy: RoutingPolicy) -> dict[str, Counts]:
        found = synthetic_test(policy)["mqar"]
        wrong = policy in (GOOD, RoutingPolicy.all_delta(ROUTED, CHUNK))
        return {"mqar": replace(found, nats=found.nats + (bad if wrong else 0.0))}

    names = ["val_loss", "kept_fraction"]
    subject = scorer(replace(synthetic_judge(), test=test), config=SearchConfig(objectives=names))
    chosen = [replace(item, values=dict.fromkeys(names, 0.5)) for item in records([GOOD, FIXED])]
    fixed = baselines(ROUTED, CHUNK, (), SearchSpace())
    points, others, _ = score(subject, chosen, fixed, [], lambda _: None)
    assert [point.id for point in points] == ["t0001"]
    assert "all-delta" not in [item.name for item in others]
    assert subject.problems == [
        f"all-delta: objective val_loss is {bad}",
        f"t0000: objective val_loss is {bad} on the test split",
    ]


def test_what_follows_of_the_points_can_be_asked_for_before_baselines_are_scored() -> None:
    """All that others could answer in the meantime is asked for by then."""
    asked: list[Question] = []
    answered: list[RoutingPolicy] = []

    def test(policy: RoutingPolicy) -> dict[str, Counts]:
        answered.append(policy)
        return synthetic_test(policy)

    judge = replace(synthetic_judge(), test=test, queue=Queue(ahead=asked.extend))
    family = Family("family", "", lambda sweep: [])
    member = Named("member", Kind.family, WASTEFUL)
    seen: list[tuple[list[str], int | None]] = []

    def on_points(points: Sequence[Point], knee: int | None) -> None:
        seen.append(([point.id for point in points], knee))
        assert WASTEFUL not in answered
        assert Question.test(WASTEFUL) in asked
        assert {item.policies[0] for item in asked if item.method is Method.random} == {GOOD}

    points, _, _ = score(
        scorer(judge), records([FIXED, GOOD]), [], [Swept(family, (member,), 0.0)], lambda _: None, on_points
    )
    assert [ids for ids, _ in seen] == [[point.id for point in points]] == [["t0001", "t0000"]]
    assert seen[0][1] == scorer().scale().knee([point.search_values for point in points])
    assert WASTEFUL in answered


@pytest.mark.parametrize(("gain", "said"), [(0.1, False), (0.0, True), (-0.1, True)])
def test_a_supernet_without_use_for_softmax_is_noted(gain: float, said: bool) -> None:
    softmax, delta = RoutingPolicy.all_softmax(ROUTED, CHUNK), RoutingPolicy.all_delta(ROUTED, CHUNK)

    def search(policy: RoutingPolicy, share: float) -> Evaluation:
        errors: dict[str, float | None] = {"recall_error": 0.9 - gain if policy == softmax else 0.9}
        return replace(synthetic(delta), errors=errors, kept_fraction=float(policy == softmax))

    line = scorer(searching(search)).no_use_of_softmax()
    assert (line is not None) == said
    assert line is None or line.startswith("all-softmax is no better than all-delta in recall_error: ")
