"""The registry of objectives: values, what is refused, and that none of them needs torch."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from natsl.search.config import SearchConfig
from natsl.search.objective import OBJECTIVES, CostContext, find_objectives, measure
from natsl.space import cost
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.search_helpers import CHUNK, ROUTED, shapes, synthetic

AT = CostContext(shapes(ROUTED), 4096)
MIXED = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(Op.softmax), LayerPolicy(budget=0.25)), CHUNK)
TASKS = {"mqar", "needle"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_finite_number_to_minimise(name: str) -> None:
    evaluation = replace(synthetic(MIXED), needle_error=0.5)
    value = measure([name], evaluation, MIXED, AT)[name]
    assert math.isfinite(value)
    assert value >= 0
    item = OBJECTIVES[name]
    assert item.name == name
    assert item.direction == "minimize"
    assert item.label
    assert item.unit


@pytest.mark.parametrize("name", ["kept_fraction", "kv_bytes_per_token", "decode_bytes", "prefill_flops"])
def test_costs_grow_with_what_is_kept(name: str) -> None:
    policies = [RoutingPolicy.uniform(ROUTED, CHUNK, budget) for budget in (0.0, 0.1, 0.4, 1.0)]
    values = [measure([name], synthetic(policy), policy, AT)[name] for policy in policies]
    assert values == sorted(values)
    assert len(set(values)) == len(values)


def test_costs_come_from_measured_fractions() -> None:
    evaluation = replace(synthetic(MIXED), kept_by_layer=(0.0, 1.0, 0.125))
    value = measure(["decode_bytes"], evaluation, MIXED, AT)["decode_bytes"]
    assert value == cost.decode_bytes(AT.shapes, MIXED, (0.0, 1.0, 0.125), AT.context)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None], ids=["nan", "inf", "-inf", "missing"])
def test_a_value_that_is_not_finite_raises(bad: float | None) -> None:
    evaluation = replace(synthetic(MIXED), recall_error=bad)
    with pytest.raises(FloatingPointError, match="recall_error is"):
        measure(["kept_fraction", "recall_error"], evaluation, MIXED, AT)


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
def test_wrong_names_are_refused(names: list[str], tasks: set[str], constraints: dict[str, float], text: str) -> None:
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
