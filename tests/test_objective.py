"""What every objective promises, what is refused, and that none of them needs torch.

An objective that is listed in ``OBJECTIVES`` is tested here without another line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace

import pytest

from natsl.evaluate import Evaluation
from natsl.search.baseline import baselines
from natsl.search.config import SearchConfig
from natsl.search.families import Sweep, listed
from natsl.search.front import Front, amount
from natsl.search.judge import Judge
from natsl.search.objective import OBJECTIVES, QUALITY, CostContext, Objective, Role, find_objectives, measure
from natsl.search.report.chart import Mark, Series, chart
from natsl.search.report.html import render
from natsl.search.report.plane import axis, planes, show
from natsl.search.report.png import front_png
from natsl.search.score import Scorer, score
from natsl.search.study import Problem
from natsl.search.trial import Record
from natsl.space import cost
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import SearchSpace
from natsl.tasks import TASKS, metrics
from tests.latency_helpers import made_table
from tests.search_helpers import CHUNK, HEADS, ROUTED, is_png, shapes, synthetic, synthetic_judge

AT = CostContext(shapes(ROUTED), 4096, latency=made_table())
MIXED = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(Op.softmax), LayerPolicy(budget=0.25)), CHUNK)
LESS = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.1), LayerPolicy(Op.delta)), CHUNK)


def complete(evaluation: Evaluation) -> Evaluation:
    """The evaluation with an error for every task."""
    return replace(evaluation, errors=dict.fromkeys(evaluation.errors, evaluation.errors["recall_error"]))


def front_of(names: list[str]) -> Front:
    """A front over these objectives: three policies, every baseline, random routing."""
    config = SearchConfig(objectives=names, random_draws=2, uniform_budgets=[0.25])
    asked = Problem(ROUTED, CHUNK, AT, find_objectives(names, TASKS, {}), ())
    records = []
    for i, budget in enumerate((0.05, 0.2, 0.4)):
        policy = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=budget), LayerPolicy(Op.delta)), CHUNK)
        evaluation = complete(synthetic(policy))
        records.append(Record(i, i, policy, measure(names, evaluation, policy, AT), evaluation, True))
    plain = synthetic_judge()
    judge = Judge(
        lambda policy, share: complete(plain.search(policy, share)),
        lambda policies, trials: [{1.0: complete(plain.search(policy, 1.0))} for policy in policies],
        lambda policy: dict.fromkeys(metrics(), plain.test(policy)["mqar"]),
        lambda policy, fractions, seed: complete(plain.random(policy, fractions, seed)),
        plain.control,
        plain.length,
    )
    scorer = Scorer(judge, asked, config, 0, records)
    swept = [scorer.sweep(*item, lambda _: None) for item in listed(Sweep(ROUTED, CHUNK, HEADS, SearchSpace()))]
    fixed = baselines(ROUTED, CHUNK, [0.25], SearchSpace())
    points, others, families = score(scorer, records, fixed, swept, lambda _: None)
    assert scorer.problems == []
    return Front("first", scorer.names, points, others, points[0].id, 0.5, (0.25, 0.5), {}, families=families)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_finite_number_to_minimise(name: str) -> None:
    value = measure([name], complete(synthetic(MIXED)), MIXED, AT)[name]
    assert math.isfinite(value)
    assert value >= 0
    item = OBJECTIVES[name]
    assert item.name == name
    assert item.direction == "minimize"
    assert item.label
    assert item.unit


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_missing_exactly_where_its_task_is(name: str) -> None:
    evaluation = synthetic(MIXED)
    without = replace(evaluation, errors=dict.fromkeys(evaluation.errors))
    value = OBJECTIVES[name].value(without, MIXED, AT)
    assert (value is None) == (OBJECTIVES[name].task is not None)


@pytest.mark.parametrize("value", [0.0, 0.0314, 0.5, 1.0, 96.0, 123456.0, 5.5e16], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_shown_can_be_read_back(name: str, value: float) -> None:
    text = OBJECTIVES[name].show(value)
    number = re.fullmatch(r"([-\d.e+]+)(?:\N{NO-BREAK SPACE}([kMGTP]?)(%|B|FLOP|ms))?", text)
    assert number is not None
    factor = {None: 1.0, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[number[2]]
    factor = 0.01 if number[3] == "%" else factor
    assert float(number[1]) * factor == pytest.approx(value, rel=5e-3, abs=6e-4)
    assert OBJECTIVES[name].show(None) == "–"
    assert show(name, value) == text


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_an_axis(name: str) -> None:
    item = OBJECTIVES[name]
    values = [measure([name], complete(synthetic(policy)), policy, AT)[name] for policy in (MIXED, LESS)]
    marks = tuple(Mark(value, value) for value in values)
    drawn = chart(name, [Series(name, "front", marks)], axis(name), axis(name))
    assert drawn.count("<circle") == len(marks)
    assert item.label in axis(name).label
    ticks = re.findall(r'text-anchor="end">([^<]*)</text>', drawn)
    assert len(ticks) == len(set(ticks)) > 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_in_the_files_and_the_report(name: str) -> None:
    front = front_of([name])
    item = OBJECTIVES[name]
    plain = json.loads(json.dumps(front.to_dict(), allow_nan=False))
    assert plain["objectives"] == [{"name": name, "direction": item.direction}]
    rows = list(csv.DictReader(io.StringIO(front.to_csv())))
    assert [float(row[name]) for row in rows] == [amount(each, name) for each in front.rows]
    assert all(row[f"search_{name}"] for row in rows if row["kind"] != "random")
    assert item.label in render(front)
    assert show(name, front.points[0].values[name]) in render(front)
    assert is_png(front_png(front))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_compared_as_its_role_says(name: str) -> None:
    front = front_of([name])
    quality = OBJECTIVES[name].role is Role.quality
    assert (front.quality == name, front.cost == name) == (quality, not quality)
    assert [name in pair for pair in planes(front)] == [True]
    gains = [point.gain_over_random for point in front.points]
    assert all(gain is not None and (name in gain) == quality for gain in gains)
    spreads = [item.std for item in front.baselines if item.of is not None]
    assert all((name in std) == quality for std in spreads)


def test_measures_of_quality_are_preferred_by_task() -> None:
    assert list(QUALITY) == [*metrics().values(), "val_loss", "bits_per_byte"]
    assert QUALITY[:2] == ("recall_error", "needle_error")


def test_an_entry_is_all_that_a_new_objective_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Objective(
        name="layers_kept",
        label="layers that keep anything",
        unit="layers",
        role=Role.cost,
        value=lambda evaluation, policy, at: float(sum(kept > 0 for kept in evaluation.kept_by_layer)),
    )
    monkeypatch.setitem(OBJECTIVES, entry.name, entry)
    front = front_of(["recall_error", "layers_kept"])
    assert (front.quality, front.cost) == ("recall_error", "layers_kept")
    assert planes(front) == [("layers_kept", "recall_error")]
    assert "layers that keep anything (layers)" in render(front)
    assert "layers_kept" in front.to_csv().splitlines()[0]
    assert is_png(front_png(front))


@pytest.mark.parametrize(
    "name",
    [
        "kept_fraction",
        "kv_bytes_per_token",
        "decode_bytes",
        "prefill_flops",
        "cache_bytes",
        "decode_ms",
        "prefill_ms",
    ],
)
def test_costs_grow_with_what_is_kept(name: str) -> None:
    policies = [RoutingPolicy.uniform(ROUTED, CHUNK, budget) for budget in (0.0, 0.1, 0.4, 1.0)]
    values = [measure([name], synthetic(policy), policy, AT)[name] for policy in policies]
    assert values == sorted(values)
    assert len(set(values)) == len(values)


def test_costs_come_from_measured_fractions() -> None:
    evaluation = replace(synthetic(MIXED), kept_by_layer=(0.0, 1.0, 0.125))
    value = measure(["decode_bytes"], evaluation, MIXED, AT)["decode_bytes"]
    assert value == cost.decode_bytes(AT.shapes, MIXED, (0.0, 1.0, 0.125), AT.context)


def test_times_need_a_table_that_covers_the_context() -> None:
    evaluation = synthetic(MIXED)
    for name in ("decode_ms", "prefill_ms"):
        for at in (replace(AT, latency=None), replace(AT, context=4097), replace(AT, context=7)):
            assert OBJECTIVES[name].value(evaluation, MIXED, at) is None
        assert OBJECTIVES[name].axis_label.endswith(" (ms)")
    value = measure(["decode_ms"], replace(evaluation, kept_by_layer=(0.3, 0.3, 0.125)), MIXED, AT)["decode_ms"]
    softmax, routed = 0.2 + 0.001 * 4096, 0.2 + 0.001 * 0.125 * 4096
    assert value == pytest.approx(0.5 + 0.1 + softmax + routed)  # the rest, delta, softmax, routed


def test_a_cache_is_counted_in_what_the_model_computes_in() -> None:
    values = [measure(["cache_bytes"], synthetic(MIXED), MIXED, replace(AT, bytes_per_element=b)) for b in (2, 4)]
    assert 1.9 < values[1]["cache_bytes"] / values[0]["cache_bytes"] < 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None], ids=["nan", "inf", "-inf", "missing"])
def test_a_value_that_is_not_finite_raises(bad: float | None) -> None:
    evaluation = replace(synthetic(MIXED), errors={"recall_error": bad})
    with pytest.raises(FloatingPointError, match="recall_error is"):
        measure(["kept_fraction", "recall_error"], evaluation, MIXED, AT)


def test_costs_alone_are_questioned(caplog: pytest.LogCaptureFixture) -> None:
    find_objectives(["kept_fraction"], TASKS, {"val_loss": 3.0})
    find_objectives(["val_loss"], TASKS, {})
    find_objectives(["val_loss", "kept_fraction"], TASKS, {"decode_bytes": 3.0})
    assert caplog.messages == []
    find_objectives(["kept_fraction", "decode_bytes"], TASKS, {"cache_bytes": 3.0})
    (line,) = caplog.messages
    assert line.startswith("search.objectives = ['kept_fraction', 'decode_bytes']: nothing but costs")


def test_names_are_looked_up_in_order() -> None:
    found = find_objectives(["kept_fraction", "recall_error"], TASKS, {"val_loss": 3.0})
    assert [item.name for item in found] == ["kept_fraction", "recall_error"]


@pytest.mark.parametrize(
    ("names", "tasks", "constraints", "text"),
    [
        (["recal_error"], TASKS, {}, "'recal_error' is unknown: the objectives are val_loss"),
        (["val_loss"], TASKS, {"speed": 1.0}, "'speed' is unknown"),
        (["recall_error"], {"bytes"}, {}, "'recall_error' needs the task mqar, the data have bytes"),
        (["val_loss"], {"bytes"}, {"needle_error": 0.1}, "'needle_error' needs the task needle"),
    ],
    ids=["unknown objective", "unknown constraint", "task missing", "constraint's task missing"],
)
def test_wrong_names_are_refused(
    names: list[str], tasks: Collection[str], constraints: dict[str, float], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        find_objectives(names, tasks, constraints)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"n_trials": 0}, "search.n_trials = 0"),
        ({"n_trials": -3}, "search.n_trials = -3"),
        ({"objectives": []}, "search.objectives"),
        ({"objectives": ["val_loss", "val_loss"]}, "each may come once"),
        ({"constraints": {"val_loss": math.nan}}, "search.constraints.val_loss = nan"),
        ({"uniform_budgets": [1.2]}, "search.uniform_budgets = 1.2"),
        ({"random_draws": 1}, "search.random_draws = 1"),
        ({"max_failure_rate": 1.5}, "search.max_failure_rate = 1.5"),
        ({"local_share": -0.1}, "search.local_share = -0.1"),
        ({"context": 0}, "search.context = 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_cannot_work_is_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("[", r"\[")):
        SearchConfig(**values)  # type: ignore[arg-type]


def test_config_and_objectives_need_neither_torch_nor_optuna() -> None:
    code = "import sys, natsl.search.config, natsl.search.objective; print({'torch', 'optuna'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
