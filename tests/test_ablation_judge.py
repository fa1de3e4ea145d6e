"""Judging a router: which layers get the budget, what is compared on which split, lengths, and the table of it all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl.data import Split, TaskData
from natsl.evaluate import evaluate
from natsl.model import RoutedLM
from natsl.search import headroom
from natsl.search.ablation.allocation import Measure, Measured, allocate, static_quality
from natsl.search.ablation.config import AblationConfig
from natsl.search.ablation.judge import Judge
from natsl.search.ablation.record import Spread, anchors, rounded, rows
from natsl.search.ablation.table import report
from natsl.search.controls.comparer import Comparer, Rules
from natsl.search.controls.comparison import LEARNED, Comparison
from natsl.search.controls.registry import CONTROLS
from natsl.search.controls.static import Shape, greedy_heads
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks.sequences import Batch
from tests.ablation_helpers import small
from tests.oracles import fill_calibration, tiny_data, tiny_model

KINDS = [Op.routed, Op.delta, Op.routed, Op.routed]
# Static heads lose .1 for every tenth that they keep less.
FAMILY = [Measured(2.0, 0.0), Measured(1.0, 1.0)]


def budgets(policy: RoutingPolicy) -> list[float | None]:
    """Of each layer: its budget, 1 for softmax and None for delta."""
    return [1.0 if layer.op is Op.softmax else layer.mean_budget() for layer in policy.layers]


def quality_of(gains: dict[int, float]) -> tuple[list[RoutingPolicy], Measure]:
    """A stub: a layer gains its number by its budget, up to a budget of .2; the policies asked for are listed."""
    asked: list[RoutingPolicy] = []

    def measure(policy: RoutingPolicy) -> Measured:
        asked.append(policy)
        own = {i: budget for i, budget in enumerate(budgets(policy)) if budget}
        gain = sum(gains[i] * min(budget, 0.2) for i, budget in own.items())
        return Measured(2.0 - gain, sum(own.values()) / 3)

    return asked, measure


@pytest.mark.parametrize(
    ("budget", "gains", "expected"),
    [
        (0.05, {0: 1.0, 2: 5.0, 3: 1.0}, [None, None, 0.15, None]),
        (0.1, {0: 1.0, 2: 5.0, 3: 4.0}, [None, None, 0.15, 0.15]),
        (0.2, {0: 4.0, 2: 5.0, 3: 4.5}, [0.2, None, 0.2, 0.2]),
        (0.05, {0: 5.0, 2: 1.0, 3: 1.0}, [0.15, None, None, None]),
    ],
    ids=["the second routed layer", "two layers", "all layers", "the first layer"],
)
def test_the_budget_goes_to_the_layers_that_gain_most(
    budget: float, gains: dict[int, float], expected: list[float | None]
) -> None:
    asked, measure = quality_of(gains)
    policy = allocate(KINDS, 8, budget, measure, FAMILY)
    assert budgets(policy) == pytest.approx(expected)
    for other in asked:
        of_layers = [value for value in budgets(other) if value is not None]
        assert sum(of_layers) == pytest.approx(3 * budget), "every policy has the whole budget"


def test_a_layer_takes_no_more_than_everything() -> None:
    asked, measure = quality_of({0: 1.0, 2: 2.0, 3: 3.0})
    policy = allocate(KINDS, 8, 0.5, measure, FAMILY)
    assert [budgets(item) for item in asked[:3]] == [
        [1.0, None, None, None],
        [None, None, 1.0, None],
        [None, None, None, 1.0],
    ]
    assert asked[0].layers[0].op is Op.softmax
    assert budgets(policy) == [0.5, None, 0.5, 0.5]


def test_all_layers_are_the_uniform_policy() -> None:
    _, measure = quality_of({0: 4.0, 2: 5.0, 3: 4.5})
    for budget in (0.15, 0.2, 0.35, 0.7):
        assert allocate(KINDS, 8, budget, measure, FAMILY) == RoutingPolicy.uniform(KINDS, 8, budget)


def test_what_is_really_kept_decides() -> None:
    """One layer is best but keeps far more than its budget: it gains less over static heads that keep as much."""

    def measure(policy: RoutingPolicy) -> Measured:
        layers = sum(budget is not None for budget in budgets(policy))
        return {1: Measured(1.6, 0.5), 2: Measured(1.7, 0.1), 3: Measured(1.75, 0.1)}[layers]

    policy = allocate(KINDS, 8, 0.1, measure, FAMILY)
    assert budgets(policy) == pytest.approx([0.15, None, 0.15, None])


def test_policies_that_are_not_finite_are_not_chosen() -> None:
    def measure(policy: RoutingPolicy) -> Measured:
        one = sum(budget is not None for budget in budgets(policy)) == 1
        return Measured(math.inf, 0.0) if one else Measured(3.0, 0.1)

    assert budgets(allocate(KINDS, 8, 0.1, measure, FAMILY))[0] == pytest.approx(0.15)
    assert budgets(allocate(KINDS, 8, 0.1, measure, [])) == pytest.approx([0.3, None, None, None])


def test_static_heads_are_mixed_at_the_kept_fraction() -> None:
    family = [Measured(2.0, 0.0), Measured(1.0, 0.5), Measured(0.8, 1.0)]
    assert static_quality(family, 0.125) == pytest.approx(1.75)
    assert static_quality(family, 0.75) == pytest.approx(0.9)
    assert static_quality(family, 0.0) == 2.0


@pytest.fixture(scope="module")
def model() -> RoutedLM:
    torch.manual_seed(0)
    made = tiny_model("rr")
    fill_calibration(made)
    return made


def judge(model: RoutedLM, data: TaskData, config: AblationConfig) -> Judge:
    return Judge(model, data, config, Rules(0, config.random_draws, 0.0))


def settings(**options: object) -> AblationConfig:
    c = replace(small(Path("unused")), random_draws=2, variants={"base": {}}, **options)  # type: ignore[arg-type]
    c.data = replace(c.data, tasks={"bytes": 1.0})
    return c


def judged(model: RoutedLM, data: TaskData, config: AblationConfig) -> dict[str, Any]:
    plain = judge(model, data, config).judge()
    return {"variant": "base", "seed": 0, **plain}


def test_judging_without_hindsight_is_the_same_but_for_the_share(model: RoutedLM) -> None:
    data = tiny_data(tasks={"bytes": 1.0})
    both, without = (rows([judged(model, data, settings(budgets=[0.3], hindsight=h))]) for h in (True, False))
    for row, other in zip(both, without, strict=True):
        assert {name for name in row.quality if name not in other.quality} == {"hindsight", "hindsight_layer"}
        assert other.quality == {name: row.quality[name] for name in other.quality}
        assert other.share is None


def test_text_is_judged_by_its_loss_on_the_test_split(model: RoutedLM) -> None:
    data = tiny_data(tasks={"bytes": 1.0})
    result = judged(model, data, settings(budgets=[0.3, 0.5]))
    own, (ends,) = rows([result]), anchors([result])
    test = data.eval_sets(Split.test)
    assert [(row.spread, row.budget, row.task, row.length) for row in own] == [
        (spread, budget, "bytes", 1) for budget in (0.3, 0.5) for spread in Spread
    ]
    assert {row.metric for row in own} == {"val_loss"}
    for row in own[1::2]:
        measured = evaluate(model, RoutingPolicy.uniform(model.kinds, 8, row.budget), test)
        assert row.quality[LEARNED] == pytest.approx(measured.val_loss, rel=1e-5)
        assert row.kept == pytest.approx(measured.kept_fraction, rel=1e-5)
    assert set(own[0].quality) == {LEARNED, "static", *CONTROLS} - {"oracle"}
    assert own[0].bytes["shuffled"] == own[0].bytes[LEARNED] > 0
    for name, policy in (("softmax", RoutingPolicy.all_softmax), ("delta", RoutingPolicy.all_delta)):
        assert getattr(ends, name) == pytest.approx(evaluate(model, policy(model.kinds, 8), test).val_loss, rel=1e-5)
    plain = result["lengths"][0]["policies"][1]["tasks"]["bytes"]
    heads = evaluate(model, RoutingPolicy.uniform(model.kinds, 8, 0.3), test).kept_by_task["bytes"]
    assert plain["kept_by_head"] == rounded(heads)
    assert "kept" not in plain["controls"]["shuffled"]
    assert plain["controls"]["shuffled"]["std"] > 0


def test_a_static_hybrid_is_judged_by_its_loss_alone() -> None:
    hybrid, data = tiny_model("ds"), tiny_data(tasks={"bytes": 1.0})
    config = settings(budgets=[0.3], model=hybrid.config)
    result = judged(hybrid, data, config)
    (ends,) = anchors([result])
    test = data.eval_sets(Split.test)
    loss = evaluate(hybrid, RoutingPolicy.all_softmax(hybrid.kinds, 8), test).val_loss
    assert ends.softmax == ends.delta == pytest.approx(loss, rel=1e-5)
    assert (rows([result]), result["sample"], result["problems"]) == ([], None, [])
    text = report([result], config)
    assert f"| base | {ends.softmax:.4f} | {ends.delta:.4f} |" + " – |" * 8 in text
    assert "likely too high" not in text, "it has no share"


def test_every_task_has_its_own_quality_and_cost(model: RoutedLM) -> None:
    data = tiny_data(tasks={"mqar": 1.0, "bytes": 1.0})
    own = rows([judged(model, data, settings(budgets=[0.3]))])
    assert [(row.task, row.metric) for row in own] == [("mqar", "recall_error"), ("bytes", "val_loss")] * 2
    assert {row.task for row in own if "oracle" in row.quality} == {"mqar"}
    oracle = own[2]
    assert oracle.bytes["oracle"] != oracle.bytes[LEARNED]
    assert own[2].kept != own[3].kept


def test_choices_are_made_on_the_search_split(model: RoutedLM) -> None:
    """Static heads by the first task, layers by the loss of text."""
    data = tiny_data(tasks={"mqar": 1.0, "bytes": 1.0})
    search = data.eval_sets(Split.search)
    subject = judge(model, data, settings(budgets=[0.3]))
    family = subject.static_family()

    def recall(policy: RoutingPolicy) -> tuple[float, ...]:
        measured = evaluate(model, policy, {"mqar": search["mqar"]})
        assert measured.errors["recall_error"] is not None
        assert measured.val_loss is not None
        return measured.errors["recall_error"], measured.val_loss

    assert family[0] == RoutingPolicy.all_delta(model.kinds, 8)
    assert family[-1] == RoutingPolicy.all_softmax(model.kinds, 8)
    assert set(family[1:-1]) <= set(greedy_heads(Shape(tuple(model.kinds), 2, 8), recall))
    values = [recall(policy) for policy in family[:-1]]
    assert len(values) > 1
    assert values == sorted(values, reverse=True), "each is better than what is cheaper"

    def text(policy: RoutingPolicy) -> Measured:
        measured = evaluate(model, policy, {"bytes": search["bytes"]})
        assert measured.val_loss is not None
        return Measured(measured.val_loss, measured.kept_fraction)

    expected = allocate(model.kinds, 8, 0.3, text, [text(policy) for policy in family])
    assert subject.policies(family) == {
        (Spread.layers, 0.3): expected,
        (Spread.uniform, 0.3): RoutingPolicy.uniform(model.kinds, 8, 0.3),
    }


def test_longer_sequences_are_judged_under_the_same_policies(model: RoutedLM) -> None:
    data = tiny_data(tasks={"mqar": 1.0}, test_sequences=9, keys=64)
    first, second = judge(model, data, settings(budgets=[0.3], lengths=[2])).judge()["lengths"]
    assert [(at["length"], at["tokens"], at["sequences"]) for at in (first, second)] == [(1, 64, 9), (2, 128, 4)]
    assert [item["policy"] for item in first["policies"]] == [item["policy"] for item in second["policies"]]
    longer: dict[str, Batch] = {"mqar": data.batch("mqar", Split.test, 4, seed=0, length=128, grow=True)}
    measured = evaluate(model, RoutingPolicy.all_softmax(model.kinds, 8), longer)
    assert second["anchors"]["mqar"]["softmax"] == pytest.approx(measured.errors["recall_error"])
    uniform = evaluate(model, RoutingPolicy.uniform(model.kinds, 8, 0.3), longer)
    assert second["policies"][1]["tasks"]["mqar"]["learned"]["kept"] == pytest.approx(uniform.kept_fraction, rel=1e-5)


def test_budgets_that_come_to_one_policy_are_judged_once(model: RoutedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = judge(model, tiny_data(tasks={"bytes": 1.0}), settings(budgets=[0.3]))
    uniform = RoutingPolicy.uniform(model.kinds, 8, 0.3)
    monkeypatch.setattr(
        subject, "policies", lambda family: {(Spread.layers, 0.3): uniform, (Spread.uniform, 0.3): uniform}
    )
    asked: list[RoutingPolicy] = []
    original = Comparer.compare

    def compare(self: Comparer, of: str, policy: RoutingPolicy, hindsight: bool) -> Comparison | None:
        asked.append(policy)
        return original(self, of, policy, hindsight)

    monkeypatch.setattr(Comparer, "compare", compare)
    first, second = subject.judge()["lengths"][0]["policies"]
    assert asked == [uniform]
    assert first["tasks"] == second["tasks"]


def test_a_supernet_that_is_not_finite_is_reported() -> None:
    broken = tiny_model("rr")
    fill_calibration(broken)
    with torch.no_grad():
        broken.embed.weight.fill_(math.nan)
    config = settings(budgets=[0.3])
    result = judged(broken, tiny_data(tasks={"bytes": 1.0}), config)
    assert rows([result]) == []
    problems = result["problems"]
    assert isinstance(problems, list)
    assert any(line.startswith("learned@layers 0.3 at 64 tokens: ") for line in problems)
    assert "Not scored: base, seed 0: learned@layers 0.3" in report([result], config)
    config = settings(budgets=[0.3], headroom_sequences=2)
    result = judged(broken, tiny_data(tasks={"bytes": 1.0}), config)
    assert result["headroom"] == []
    assert any(line.startswith("headroom at 0.3: ") for line in result["problems"])


def test_a_sample_shows_what_heads_keep(model: RoutedLM) -> None:
    data = tiny_data(tasks={"bytes": 1.0})
    subject = judge(model, data, settings(budgets=[0.5, 0.3]))
    policy = RoutingPolicy((LayerPolicy(budget=0.4), LayerPolicy(Op.delta)), 8)
    chosen = {(Spread.layers, 0.3): policy, (Spread.layers, 0.5): RoutingPolicy.all_delta(model.kinds, 8)}
    subject.policies = lambda family: chosen  # type: ignore[method-assign]
    sample = subject.judge()["sample"]
    test = data.eval_sets(Split.test)["bytes"]
    with torch.no_grad():
        route = model(test.tokens[:1], policy).layers[0].route[0]
    assert sample["budget"] == 0.3
    assert "".join(sample["text"]).encode() == bytes(test.tokens[0].tolist())
    assert [{int(name.split(".")[1]) for name in kept} for kept in sample["kept"]] == [
        set(row.nonzero().flatten().tolist()) for row in route
    ]
    assert set(sample["heads"]) == {name for kept in sample["kept"] for name in kept} != set()
    recall = settings(budgets=[0.3])
    assert judged(model, tiny_data(), recall)["sample"] is None
    data.corpus = replace(data.corpus, tokens=True)  # there is no tokenizer to read it with
    assert judged(model, data, recall)["sample"] is None


def test_headroom_is_measured_at_every_uniform_budget(model: RoutedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "STEPS", 2)
    config = settings(budgets=[0.2, 0.4], headroom_sequences=6)
    result = judged(model, tiny_data(tasks={"bytes": 1.0}), config)
    assert [at["budget"] for at in result["headroom"]] == [0.2, 0.4]
    for row in (row for row in rows([result]) if row.task == "bytes" and row.spread is Spread.uniform):
        (at,) = (at for at in result["headroom"] if at["budget"] == row.budget)
        assert at["loss"]["learned"]["loss"] == pytest.approx(row.quality[LEARNED], rel=1e-5)
    assert "## What is known of gains at a uniform budget of 0.4" in report([result], config)


def test_a_layer_policy_of_everything_needs_no_router(model: RoutedLM) -> None:
    """A budget that fills the best layers leaves nothing to shuffle: no share, and no failure."""
    data = tiny_data(tasks={"bytes": 1.0})
    subject = judge(model, data, settings(budgets=[0.5]))
    policy = RoutingPolicy((LayerPolicy(Op.softmax), LayerPolicy(Op.delta)), 8)
    subject.policies = lambda family: {(Spread.layers, 0.5): policy}  # type: ignore[method-assign]
    (row,) = rows([{"variant": "base", "seed": 0, **subject.judge()}])
    assert row.share is None
    assert row.kept == 0.5
    assert row.quality["random_heads"] == row.quality["shuffled"] == row.quality[LEARNED]
