"""Baselines for every kind of model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from natsl.search.baseline import baselines
from natsl.space.policy import Op
from natsl.space.space import SearchSpace
from tests.search_helpers import CHUNK, ROUTED

NAMES = ("recall_error", "kept_fraction")
HYBRID = (Op.delta, Op.routed, Op.softmax, Op.routed, Op.routed, Op.routed)


def described(kinds: Sequence[Op], budgets: Sequence[float] = (0.25,)) -> dict[str, str]:
    return {item.name: item.policy.describe() for item in baselines(kinds, CHUNK, budgets, SearchSpace())}


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
    for item in baselines(HYBRID, CHUNK, (0.25,), SearchSpace()):
        item.policy.check(HYBRID, CHUNK)


def test_one_routed_layer_has_each_policy_once() -> None:
    assert described((Op.routed,)) == {
        "all-softmax": "S",
        "all-delta": "D",
        "uniform-0.25": ".25",
        "rising-0.1": ".1",
    }


def test_schedules_over_depth_have_the_mean_of_their_name() -> None:
    for item in baselines(HYBRID, CHUNK, (), SearchSpace()):
        if item.name.startswith(("rising", "falling")):
            budgets = [b for layer in item.policy.layers if (b := layer.mean_budget()) is not None]
            assert sum(budgets) / 4 == pytest.approx(float(item.name.split("-")[1]), abs=1e-4)
            assert all(0 <= budget <= 1 for budget in budgets)


def test_learned_baselines_obey_the_space() -> None:
    space = SearchSpace(cap=0.3, burst=2, mix_temperature_min=0.5, mix_temperature_max=0.5)
    learned = [
        layer for item in baselines(ROUTED, CHUNK, (0.25,), space) for layer in item.policy.layers if layer.budget
    ]
    assert len(learned) == 15
    assert {(layer.cap, layer.burst, layer.mix_temperature) for layer in learned} == {(0.3, 2, 0.5)}
    free = baselines(ROUTED, CHUNK, (0.25,), SearchSpace(mix_temperature_min=0.5, mix_temperature_max=2.0))
    assert {layer.mix_temperature for item in free for layer in item.policy.layers} == {1.0}
