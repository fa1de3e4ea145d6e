"""The table of quantiles: which thresholds budgets get from it, and tables of older versions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from natsl.calibration import Calibration, spread_levels, upgraded
from natsl.config import CalibrationScope
from natsl.files import to_plain
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import tiny_config, tiny_model

POINTS = 65


def table(heads: int = 2, scope: CalibrationScope = CalibrationScope.layer) -> Calibration:
    """Two layers, of which only the first has quantiles: those of a straight line per head and for both."""
    result = Calibration(2, heads, POINTS)
    levels = result.levels.float()
    result.by_layer[0] = 4 * levels - 2
    for r in range(heads):
        result.by_head[0, r] = (r + 1) * levels + 10
    result.set_scope(scope)
    return result


def test_levels_are_dense_at_both_ends() -> None:
    levels = spread_levels(POINTS)
    assert levels.dtype is torch.float64
    assert (float(levels[0]), float(levels[-1])) == (0.0, 1.0)
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(levels, 1 - levels.flip(0))
    assert float(1 - levels[-3]) < 0.01, "two budgets of at most a percent have levels of their own"


@pytest.mark.parametrize("scope", CalibrationScope, ids=lambda s: s.value)
def test_a_number_uses_the_scope_and_a_list_the_heads(scope: CalibrationScope) -> None:
    budget = torch.tensor([[[0.3, 0.3], [0.25, 0.0], [1.0, 0.75]]]).double().expand(2, 3, 2)
    single = torch.tensor([[True, False, False]]).expand(2, 3)
    found = table(scope=scope).thresholds(budget, single)
    one = [4 * 0.7 - 2] * 2 if scope is CalibrationScope.layer else [10.7, 11.4]
    expected = torch.tensor([one, [10.75, math.inf], [-math.inf, 10.5]])
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)
    assert found[1, 0].isnan().all()
    assert found[1, 1].isnan().tolist() == [True, False]


def old_state(rows: Tensor) -> dict[str, Tensor]:
    """The state of a model of two routed layers as it was stored before levels had a buffer."""
    state = {k: v for k, v in tiny_model("rr").state_dict().items() if not k.startswith("calibration.")}
    return {**state, "calibration": rows}


def old_threshold(row: Tensor, budget: float) -> float:
    """What older versions made of a budget: even levels, float32."""
    place = (1.0 - budget) * 64
    low = min(int(place), 63)
    return float(torch.lerp(row[low], row[low + 1], place - low))


def loaded(rows: Tensor) -> RoutedLM:
    model = RoutedLM(tiny_config("rr"), POINTS)
    model.load_state_dict(old_state(rows))
    return model


def thresholds(model: RoutedLM, budget: float | tuple[float, ...]) -> Tensor:
    return model.compile_policy(RoutingPolicy.fill(model.kinds, 8, LayerPolicy(budget=budget)), 1).threshold[:, 0]


def test_an_old_table_gives_the_thresholds_that_it_gave() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(2, 1, POINTS, generator=generator).sort(-1).values.expand(2, 2, POINTS).clone()
    by_head = torch.randn(2, 2, POINTS, generator=generator).sort(-1).values
    for rows in (pooled, by_head):
        model = loaded(rows)
        assert torch.equal(model.calibration.levels, torch.arange(POINTS).double() / 64)
        for budget in (0.001, 0.02, 0.05, 0.137, 0.25, 0.333, 0.5, 0.9, 0.999):
            expected = [[old_threshold(row, budget) for row in layer] for layer in rows]
            assert thresholds(model, budget).tolist() == expected, budget


def test_an_old_table_over_layers_has_no_quantiles_of_heads() -> None:
    model = loaded(torch.linspace(-1, 1, POINTS).expand(2, 2, POINTS).clone())
    assert int(model.calibration.scope) == 0
    with pytest.raises(ValueError, match=r"layer 0 has budgets per head, .* make a table with natsl calibrate"):
        thresholds(model, (0.2, 0.0))
    assert thresholds(model, (1.0, 0.0)).tolist() == [[-math.inf, math.inf]] * 2


def test_an_old_table_per_head_has_no_pooled_quantiles() -> None:
    rows = torch.stack([torch.linspace(-1, 1, POINTS), torch.linspace(-2, 2, POINTS)]).expand(2, 2, POINTS).clone()
    model = loaded(rows)
    assert model.calibration.by_layer.isnan().all()
    assert torch.equal(thresholds(model, 0.25), thresholds(model, (0.25, 0.25)))
    assert thresholds(model, 0.25).tolist() == [[0.5, 1.0]] * 2


def test_an_old_table_without_calibration_stays_without() -> None:
    model = loaded(torch.full((2, 2, POINTS), math.nan))
    for budget in (0.5, (0.5, 0.5)):
        with pytest.raises(ValueError, match=r"the model is not calibrated: .* made at the end of training"):
            thresholds(model, budget)


def test_a_single_head_has_both_tables() -> None:
    state = upgraded({"calibration": torch.linspace(-1, 1, POINTS).view(1, 1, POINTS)})
    assert torch.equal(state["calibration.by_head"][0, 0], state["calibration.by_layer"][0])


def test_json_and_back() -> None:
    made, read = table(scope=CalibrationScope.head), table()
    read.load_plain(json.loads(json.dumps(to_plain(made.to_plain()))))
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    old = torch.linspace(-1, 1, POINTS).expand(2, 2, POINTS)
    read.load_plain({"quantiles": [], "margins": old.tolist()})
    assert torch.equal(read.by_layer, old[:, 0])
    assert int(read.scope) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"levels": None},
        {"levels": [0.0, 1.0]},
        {"levels": [0.0] * POINTS},
        {"by_head": [[[1.0]]]},
        {"by_layer": "x"},
        {"scope": "both"},
    ],
    ids=str,
)
def test_what_is_no_table_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        table().load_plain({**to_plain(table().to_plain()), **change})


def test_tables_that_change_are_looked_at_again() -> None:
    calibration, policy = table(), RoutingPolicy((LayerPolicy(budget=0.5), LayerPolicy(Op.delta)), 8)
    good = calibration.by_layer
    calibration.check([policy], [0])
    for bad in (math.nan, math.inf):
        calibration.by_layer = torch.full_like(good, bad)
        with pytest.raises(ValueError, match="not calibrated"):
            calibration.check([policy], [0])
        calibration.by_layer = good
        calibration.check([policy], [0])
    with torch.inference_mode():
        calibration.by_layer = good.clone()
        calibration.check([policy], [0])
        calibration.by_layer.fill_(math.nan)
        with pytest.raises(ValueError, match="not calibrated"):
            calibration.check([policy], [0])


def test_a_layer_that_is_not_routed_needs_none() -> None:
    calibration = Calibration(2, 2, 17)
    calibration.check([RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(threshold=0.5)), 8)], [0, 1])
    with pytest.raises(ValueError, match="not calibrated"):
        calibration.check([RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.5)), 8)], [0, 1])
