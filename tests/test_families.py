"""Families of baselines: what every one in the registry promises, their fronts, and what a front is worth beside them.

A family that is listed in ``FAMILIES`` is tested here without another line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from natsl.counts import Counts
from natsl.evaluate import Evaluation
from natsl.search.baseline import Named, baselines
from natsl.search.config import SearchConfig
from natsl.search.controls.comparer import Comparer, Rules
from natsl.search.controls.comparison import chosen_points
from natsl.search.controls.static import Shape
from natsl.search.families import FAMILIES, MOST, Family, Sweep, listed
from natsl.search.front import Kind, Point
from natsl.search.judge import Judge
from natsl.search.question import Question, Queue
from natsl.search.score import Scorer, knee_choice, score
from natsl.search.trial import Record
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import SearchSpace
from tests.search_helpers import (
    CHUNK,
    HEADS,
    ROUTED,
    problem,
    searched,
    searching,
    synthetic,
    synthetic_judge,
    synthetic_test,
)

NAMES = ("recall_error", "kept_fraction")
HYBRID = (Op.delta, Op.routed, Op.softmax, Op.routed)
SPACES: dict[str, dict[str, Any]] = {
    "default": {},
    "cap": {"cap": 0.3, "burst": 2},
    "threshold": {"control": "threshold", "threshold_min": -2.0, "threshold_max": 1.0},
    "head": {"granularity": "head"},
    "small budgets": {"budget_max": 0.2, "ops": ["delta", "routed"]},
    "no router": {"ops": ["delta", "softmax"]},
    "mix": {"mix_temperature_min": 0.5, "mix_temperature_max": 0.5},
}

MISSING = {  # families that have no policy of their own in a space
    "cap": ("static",),
    "small budgets": ("static",),
    "no router": ("one-head", "uniform", "static"),
}


def sweep(**settings: Any) -> Sweep:
    space = SearchSpace(**settings)
    shape = Shape(ROUTED, HEADS, CHUNK, space.neutral_mix)
    heads = {"static-1": [(1, 0)], "static-2": [(1, 0), (2, 1)]}
    static = tuple(Named(name, Kind.static, shape.policy(chosen)) for name, chosen in heads.items())
    return Sweep(ROUTED, CHUNK, HEADS, space, (0.3,), static)


@pytest.mark.parametrize("case", SPACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_bounded_list_of_policies_of_the_space(name: str, case: str) -> None:
    space = SPACES[case]
    of = sweep(**space)
    lists = [members for family, members in listed(of) if family.name == name]
    assert len(lists) == (name not in MISSING.get(case, ()))
    for members in lists:
        policies = [item.policy for item in members]
        assert 3 <= len(policies) == len(set(policies)) <= MOST + 2
        assert len({item.name for item in members}) == len(members)
        for policy in policies:
            policy.check(ROUTED, CHUNK, HEADS)
            for layer in policy.layers:
                assert layer.op in of.space.ops
                if layer.op is not Op.delta:
                    assert (layer.cap, layer.burst) == (of.space.cap, of.space.burst)
                    assert layer.mix_temperature == of.space.neutral_mix
                if isinstance(layer.budget, float):
                    assert of.space.budget_min <= layer.budget <= of.space.budget_max
        assert RoutingPolicy.all_delta(ROUTED, CHUNK) in policies
        if space == {}:
            assert RoutingPolicy.all_softmax(ROUTED, CHUNK) in policies


def described(name: str, of: Sweep) -> list[str]:
    return next(([item.policy.describe() for item in members] for family, members in listed(of) if family.name == name))


def test_families_are_what_their_labels_say() -> None:
    of = sweep()
    assert described("one-layer", of)[:2] == [".02 D D", ".025 D D"]
    assert {"D .25 D", "D D S", "S D D"} <= set(described("one-layer", of))
    assert {"[.02,0] D D", "D D [0,1]"} <= set(described("one-head", of))
    assert {"S S D", ".25 D D", ".25 .25 D", ".25 .25 .25"} <= set(described("prefix", of))
    assert {".02 .02 .02", ".3 .3 .3"} <= set(described("uniform", of)), "also the budgets of uniform baselines"
    assert described("static", of) == ["D [1,0] D", "D [1,0] [0,1]", "D D D", "S S S"]


def test_layers_of_another_kind_stay_what_they_are() -> None:
    assert {"D .25 S D", "D D S S"} <= set(described("one-layer", Sweep(HYBRID, CHUNK, HEADS, SearchSpace())))


def test_wide_models_do_not_have_wide_families() -> None:
    of = Sweep((Op.routed,) * 24, CHUNK, 12, SearchSpace())
    sizes = {family.name: len(members) for family, members in listed(of)}
    assert sizes["one-layer"] == sizes["one-head"] == sizes["prefix"] == MOST + 2
    policies = described("one-layer", of)
    layers = {i for text in policies for i, part in enumerate(text.split()) if part != "D"}
    budgets = {part for text in policies for part in text.split()}
    assert len(layers) == 24
    assert len(budgets) > 10, "different layers have different budgets"


def test_thresholds_are_swept_where_the_space_has_no_budgets() -> None:
    found = described("uniform", sweep(control="threshold", threshold_min=-2.0, threshold_max=1.0))
    assert found[0] == "θ.786 θ.786 θ.786"
    assert not any(text.startswith(".") for text in found)


def test_a_space_with_a_cap_has_no_whole_heads_and_its_own_end() -> None:
    families = {family.name: members for family, members in listed(sweep(cap=0.3))}
    assert "static" not in families
    assert families["uniform"][-1].policy.describe() == "1≤.3 1≤.3 1≤.3"


def test_a_family_that_is_another_one_is_left_out() -> None:
    assert [family.name for family, _ in listed(Sweep((Op.routed,), CHUNK, HEADS, SearchSpace()))] == [
        "one-layer",
        "one-head",
    ]


ONE = Family("one", "one layer", lambda of: [])
KEPT = {0.0: 0.0, 0.1: 0.1, 0.12: 0.2, 0.125: 0.2, 0.13: 0.2, 0.5: 0.5, 0.9: 0.9}


def layer(budget: float) -> RoutingPolicy:
    middle = LayerPolicy(budget=budget) if budget else LayerPolicy(Op.delta)
    return RoutingPolicy((LayerPolicy(Op.delta), middle, LayerPolicy(Op.delta)), CHUNK)


def fixed(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
    """Kept fraction and error by the budget of the middle layer: budgets from .12 to .13 give the same routes."""
    softmax = all(item.op is Op.softmax for item in policy.layers)
    kept = 1.0 if softmax else KEPT[policy.layers[1].mean_budget() or 0.0]
    found = synthetic(RoutingPolicy.all_delta(ROUTED, CHUNK))
    return replace(found, kept_fraction=kept, errors={"recall_error": {0.9: 0.6, 1.0: 0.0}.get(kept, 1 - kept)})


def scorer(judge: Judge | None = None, records: Sequence[Record] = (), **config: Any) -> Scorer:
    settings = SearchConfig(**config)
    return Scorer(judge or searching(fixed), problem(settings), settings, 0, records)


def members(*budgets: float) -> list[Named]:
    return [Named(f"layer-1-{budget:g}", Kind.family, layer(budget)) for budget in budgets]


def test_a_family_is_reduced_on_the_search_split_and_equal_routes_are_one_member() -> None:
    subject = scorer()
    steps: list[str] = []
    found = subject.sweep(ONE, members(0.9, 0.13, 0.1, 0.12, 0.125, 0.5, 0.0), steps.append)
    assert [item.name for item in found.members] == ["layer-1-0.13", "layer-1-0.1", "layer-1-0.5", "layer-1-0"]
    assert len(steps) == 7
    assert found.hypervolume == pytest.approx(0.1 * 0.1 + 0.3 * 0.2 + 0.5 * 0.5)


def test_trials_of_equal_routes_are_one_point(tmp_path: Any) -> None:
    study = searched(tmp_path, SearchConfig(n_trials=4))
    values = {"recall_error": 0.1, "kept_fraction": 0.2}
    records = [
        replace(study.records[0], index=i, policy=layer(budget), values=values)
        for i, budget in enumerate((0.13, 0.12, 0.125))
    ]
    study.records[:] = records
    assert study.front() == records[:1]


def test_what_breaks_a_constraint_is_no_member() -> None:
    found = scorer(constraints={"kept_fraction": 0.15}).sweep(ONE, members(0.9, 0.1, 0.5, 0.0), lambda _: None)
    assert [item.name for item in found.members] == ["layer-1-0.1", "layer-1-0"]


def test_what_cannot_be_scored_is_left_out_and_noted_once() -> None:
    def search(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        if policy in (layer(0.1), layer(0.5)):
            raise FloatingPointError("logits are not finite")
        return fixed(policy)

    subject = scorer(searching(search))
    found = subject.sweep(ONE, members(0.1, 0.12, 0.5), lambda _: None)
    assert [item.name for item in found.members] == ["layer-1-0.12"]
    assert subject.problems == ["2 policies of family one failed, the last one layer-1-0.5: logits are not finite"]


def record(budget: float) -> Record:
    evaluation = fixed(layer(budget))
    values = {"recall_error": evaluation.errors["recall_error"] or 0.0, "kept_fraction": evaluation.kept_fraction}
    return Record(0, 0, layer(budget), values, evaluation, True)


def test_families_use_trials_and_only_their_fronts_are_tested() -> None:
    searched_again: list[RoutingPolicy] = []
    tested: list[RoutingPolicy] = []
    plain = synthetic_judge()

    def search(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        searched_again.append(policy)
        return fixed(policy)

    def test(policy: RoutingPolicy) -> dict[str, Counts]:
        tested.append(policy)
        return plain.test(policy)

    known = record(0.1)
    subject = scorer(replace(searching(search), test=test), [known])
    subject.scale()
    swept = subject.sweep(ONE, members(0.9, 0.5, 0.1, 0.12, 0.13, 0.0), lambda _: None)
    assert layer(0.1) not in searched_again
    _, _, (family,) = score(subject, [known], [], [swept], lambda _: None)
    assert set(tested) == {layer(0.1), layer(0.12), layer(0.5), layer(0.0)}
    assert len(tested) == 4
    assert {item.name for item in family.members} == {"layer-1-0.1", "layer-1-0.12", "layer-1-0.5", "layer-1-0"}
    assert subject.evaluations([known]) == {"trials": 1, "search split": 2, "families": 4, "test split": 4 + 5}


@pytest.mark.parametrize("later", [False, True], ids=["asked when due", "asked before"])
def test_passes_of_families_do_not_depend_on_trials(later: bool) -> None:
    """What idle workers have scored while trials were made is what is asked for after them."""
    asked: dict[str, list[Question]] = {"ahead": [], "later": []}
    passes: list[tuple[RoutingPolicy, ...]] = []
    plain = searching(fixed)

    def each(policies: Sequence[RoutingPolicy], trials: bool) -> list[dict[float, Evaluation]]:
        passes.append(tuple(policies))
        return plain.search_each(policies, trials)

    queue = Queue(ahead=asked["ahead"].extend, later=asked["later"].extend)
    subject = scorer(replace(plain, search_each=each, queue=queue), batch_size=2)
    families, first = [(ONE, members(0.0, 0.1, 0.12, 0.13, 0.5, 0.9))], [layer(0.0)]
    if later:
        subject.expect_sweeps(families, first, later=True)
    subject.on_search(layer(0.5))  # as a trial
    if not later:
        subject.expect_sweeps(families, first)
    subject.sweep(*families[0], lambda _: None)
    kinds = [question.policies for question in asked["later" if later else "ahead"]]
    assert kinds[: len(passes)] == passes
    assert sorted(policy.describe() for group in passes for policy in group) == [
        "D .1 D", "D .12 D", "D .13 D", "D .5 D", "D .9 D",
    ]  # fmt: skip
    assert max(map(len, passes)) == 2


def flat_counts(error: float, kept: float) -> dict[str, Counts]:
    """Eight sequences that are all alike."""
    asked = torch.full((8,), 1000)
    chunks = torch.full((8, 3, HEADS), round(1000 * kept))
    nothing = torch.zeros(8, dtype=torch.int64)
    right = asked - round(1000 * error)
    return {"mqar": Counts(torch.full((8,), 2.0, dtype=torch.float64), nothing + 1, right, asked, chunks, 1000)}


def test_volumes_and_domination_on_the_test_split() -> None:
    """On the test split the family has a bend that it had not on the search split."""
    on_test = {0.1: (0.6, 0.1), 0.5: (0.2, 0.5), 0.12: (0.5, 0.35), 0.0: (1.0, 0.0), 0.9: (0.0, 0.9)}

    def test(policy: RoutingPolicy) -> dict[str, Counts]:
        return flat_counts(*on_test[policy.layers[1].mean_budget() or 0.0])

    subject = scorer(replace(searching(fixed), test=test), random_draws=2)
    swept = subject.sweep(ONE, members(0.1, 0.5), lambda _: None)
    points, _, (family,) = score(subject, [record(0.12), replace(record(0.9), index=1)], [], [swept], lambda _: None)
    assert family.hypervolume_search == pytest.approx(0.1 * 0.9 + 0.5 * 0.5 - 0.1 * 0.5)
    assert family.hypervolume_test == pytest.approx(0.4 * 0.9 + 0.8 * 0.5 - 0.4 * 0.5)
    assert family.gain == pytest.approx(0.5 * 0.65 + 1.0 * 0.1 - 0.5 * 0.1 - family.hypervolume_test)
    assert family.gain_error == pytest.approx(0, abs=1e-12), "all sequences are alike"
    assert family.is_beaten is False
    assert [point.dominated_by for point in points] == [("one",), ()], (
        "no member is both as good and as cheap as .5, .35"
    )


def test_a_baseline_of_a_family_counts_with_it_and_others_by_themselves() -> None:
    config = SearchConfig(random_draws=2)
    subject = Scorer(synthetic_judge(), problem(config), config, 0)
    swept = [subject.sweep(*item, lambda _: None) for item in listed(sweep())]
    wasteful = RoutingPolicy((LayerPolicy(budget=0.9), LayerPolicy(Op.delta), LayerPolicy(Op.delta)), CHUNK)
    evaluation = synthetic(wasteful)
    values = {"recall_error": evaluation.errors["recall_error"] or 0.0, "kept_fraction": evaluation.kept_fraction}
    singles = baselines(ROUTED, CHUNK, (0.25,), SearchSpace())
    point = score(subject, [Record(0, 0, wasteful, values, evaluation, True)], singles, swept, lambda _: None)[0][0]
    assert {"one-layer", "uniform", "falling-0.1", "rising-0.25"} <= set(point.dominated_by)
    assert not {"uniform-0.25", "only-layer-1", "all-softmax"} & set(point.dominated_by)


def test_the_error_of_a_gain_is_that_of_resampled_sequences() -> None:
    """Against a bootstrap that adds up the counts of drawn sequences one draw after another."""
    rng = np.random.default_rng(3)
    n, policies = 40, [layer(0.1), layer(0.12), layer(0.5)]
    hard = rng.random(n)  # of a sequence, under all policies
    counts: dict[RoutingPolicy, dict[str, Counts]] = {}
    for i, policy in enumerate(policies):
        right = torch.tensor(np.clip(20 * (1 - hard * (0.9 - 0.2 * i)) + rng.normal(0, 1, n), 0, 20).round()).long()
        kept = torch.tensor(rng.integers(0, 4 * (i + 1), (n, 3, HEADS)))
        nothing = torch.zeros(n, dtype=torch.int64)
        counts[policy] = {"mqar": Counts(nothing.double(), nothing, right, nothing + 20, kept, 12)}
    subject = scorer(replace(synthetic_judge(), search=fixed, test=lambda policy: counts[policy]), random_draws=2)
    swept = subject.sweep(ONE, members(0.1, 0.5), lambda _: None)
    family = score(subject, [record(0.12)], [], [swept], lambda _: None)[2][0]
    scale = subject.scale()

    def volume(chosen: Sequence[RoutingPolicy], pick: Any) -> float:
        found = []
        for policy in chosen:
            own = counts[policy]["mqar"]
            error = 1 - float(own.right[pick].sum()) / float(own.asked[pick].sum())
            found.append(dict(zip(NAMES, (error, float(own.kept[pick].double().mean()) / 12), strict=True)))
        return scale.hypervolume(found)

    everything = np.arange(n)
    expected = volume(policies[1:2], everything) - volume([policies[0], policies[2]], everything)
    assert family.gain == pytest.approx(expected)
    picks = [rng.integers(0, n, n) for _ in range(1000)]
    drawn = [volume(policies[1:2], pick) - volume([policies[0], policies[2]], pick) for pick in picks]
    assert family.gain_error == pytest.approx(np.std(drawn), rel=0.2)
    unpaired = np.hypot(
        np.std([volume(policies[1:2], p) for p in picks]),
        np.std([volume([policies[0], policies[2]], p) for p in picks]),
    )
    assert family.gain_error < 0.7 * unpaired, "the sequences are the same for both"


def test_a_baseline_that_its_family_has_left_out_still_dominates() -> None:
    """It was poor on the search split, where families are reduced, and is good on the test split."""
    poor, good = layer(0.9), layer(0.25)
    judge = replace(searching(fixed), test=lambda policy: synthetic_test(good if policy == poor else policy))
    subject = scorer(judge, random_draws=2)
    swept = subject.sweep(ONE, members(0.1, 0.5, 0.9), lambda _: None)
    assert poor not in [item.policy for item in swept.members]
    (point,), _, _ = score(subject, [record(0.5)], [Named("uniform", Kind.uniform, poor)], [swept], lambda _: None)
    assert "uniform" in point.dominated_by


def test_what_families_judge_of_stopped_trials_counts_as_theirs() -> None:
    stopped = replace(record(0.5), parts=((0.5, 0.5, 0.0),), share=0.25)
    subject = scorer(records=[record(0.1), stopped])
    subject.sweep(ONE, members(0.1, 0.5), lambda _: None)
    made = subject.evaluations([record(0.1), stopped])
    assert (made["trials"], made["families"]) == (1.25, 1)


def test_one_sequence_has_no_error() -> None:
    def test(policy: RoutingPolicy) -> dict[str, Counts]:
        whole = synthetic_judge().test(policy)["mqar"]
        first = {name: getattr(whole, name)[:1] for name in ("nats", "tokens", "right", "asked", "kept")}
        return {"mqar": Counts(**first, chunks=whole.chunks)}

    subject = scorer(replace(searching(fixed), test=test), random_draws=2)
    swept = subject.sweep(ONE, members(0.1, 0.5), lambda _: None)
    _, _, (family,) = score(subject, [record(0.12)], [], [swept], lambda _: None)
    assert (family.gain_error, family.is_beaten) == (None, None)


def test_choosing_the_knee_costs_what_the_best_sum_on_test_is_less() -> None:
    scale = scorer().scale()
    rows = {"a": (0.2, 0.3), "b": (0.3, 0.1), "c": (0.9, 0.0)}
    points = [
        Point(name, layer(0.1), dict(zip(NAMES, row, strict=True)), dict.fromkeys(NAMES, 0.0), {})
        for name, row in rows.items()
    ]
    choice = knee_choice(points, 0, scale)
    assert (choice.point, choice.best) == ("a", "b")
    assert choice.to_dict()["cost"] == pytest.approx(0.1)
    assert knee_choice(points, 1, scale).to_dict()["cost"] == 0


def test_the_test_stage_of_the_default_takes_three_evaluations_a_trial_at_most() -> None:
    config = SearchConfig()
    asked = problem(config)
    front = []
    for i in range(50):  # a little more than the front of the quickstart has
        evaluation = synthetic(layer(0.005 * i))
        values = {"recall_error": evaluation.errors["recall_error"] or 0.0, "kept_fraction": evaluation.kept_fraction}
        front.append(Record(i, i, layer(0.005 * i), values, evaluation, True))
    subject = Scorer(synthetic_judge(), asked, config, 0, front)
    static = subject.static_heads(lambda _: None)
    of = Sweep(asked.kinds, CHUNK, asked.heads, config.space, tuple(config.uniform_budgets), tuple(static))
    swept = [subject.sweep(family, policies, lambda _: None) for family, policies in listed(of)]
    singles = [*baselines(asked.kinds, CHUNK, config.uniform_budgets, config.space), *static]
    points, _, _ = score(subject, front, singles, swept, lambda _: None)
    ends = [RoutingPolicy.all_delta(ROUTED, CHUNK), RoutingPolicy.all_softmax(ROUTED, CHUNK)]
    comparer = Comparer(subject.counts, asked.costs.shapes, ends, Rules(0, config.random_draws, 0.0))
    chosen = chosen_points([point.measured["kept_fraction"] for point in points], 3, 6, 3)
    made = subject.evaluations(front)
    assert made["families"] <= len(FAMILIES) * (MOST + 2)
    assert made["test split"] + comparer.planned(chosen.values()) <= 3 * config.n_trials
