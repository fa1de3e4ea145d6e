"""Calibration on held-out text: budgets keep what they say, whatever the number of passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from natsl import calibrate as calibration
from natsl.calibrate import BUDGETS, blend, calibrate, mixed_sequences
from natsl.calibration import Calibration
from natsl.config import CalibrationScope, SupernetConfig
from natsl.data import Split, TaskData
from natsl.kernels.routing import budget_threshold, quantile_table
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, RoutingPolicy
from natsl.supernet import seed_of
from natsl.tasks.sequences import Batch
from tests.oracles import tiny_data, tiny_model


def made(config: SupernetConfig, kinds: str = "rrr", seed: int = 0, **options: Any) -> tuple[RoutedLM, TaskData]:
    torch.manual_seed(0)
    model, data = tiny_model(kinds, **options), tiny_data(tasks={"mqar": 3.0, "bytes": 1.0})
    model.calibration = Calibration(len(kinds), 2, 65)
    calibrate(model, data, config, seed)
    return model, data


def kept(model: RoutedLM, budget: float | tuple[float, ...], tokens: Tensor) -> Tensor:
    """Kept fraction of complete chunks [layers,R] under one layer policy everywhere."""
    policy = RoutingPolicy.fill(model.kinds, 8, LayerPolicy(budget=budget))
    with torch.no_grad():
        return torch.stack([layer.route.mean((0, 1)) for layer in model(tokens, policy, logits_to_keep=0).layers])


def thresholds(model: RoutedLM, layer: LayerPolicy) -> Tensor:
    """Thresholds [1,layers,R] under one layer policy everywhere."""
    return model.compile_policy(RoutingPolicy.fill(model.kinds, 8, layer), 1).threshold


@pytest.mark.parametrize(
    ("at_once", "sequences", "budgets"),
    [(1 << 15, 800, (0.01, 0.025, 0.05, 0.07, 0.1, 0.25, 0.5, 0.8)), (640, 400, (0.01, 0.07, 0.5))],
    ids=["one pass", "many passes"],
)
def test_budgets_keep_what_they_say(
    at_once: int, sequences: int, budgets: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tenth on the sequences of the calibration, at its budgets and between them, and nearly so on others."""
    monkeypatch.setattr(calibration, "PASS_TOKENS", at_once)
    model, data = made(SupernetConfig(calibration_sequences=sequences))
    tokens = mixed_sequences(data, sequences, seed_of("calibration", 0))
    fresh = mixed_sequences(data, 400, 12345)
    for budget in budgets:
        near = 0.1 if budget > 0.01 or at_once > 640 else 0.2  # each pass has quantiles of its own
        pair = (budget, budget)
        # One number for a layer, and one for each head; of others, a hundred kept chunks and more: what is left is
        # chance.
        for scope, value in ((CalibrationScope.layer, budget), (CalibrationScope.head, pair)):
            model.calibration.set_scope(scope)
            over = (1,) if scope is CalibrationScope.layer else ()
            for text, tolerance in ((tokens, near), (fresh, 0.3))[: 1 + (budget >= 0.1)]:
                found = kept(model, value, text)
                found = found.mean(over) if over else found
                assert (found / budget - 1).abs().max() < tolerance, (budget, value, found)
        # The scope is of single numbers only: these are the other two ways to say the same.
        one, two = (LayerPolicy(budget=value) for value in (budget, pair))
        model.calibration.set_scope(CalibrationScope.head)
        by_head = thresholds(model, two)
        assert torch.equal(thresholds(model, one), by_head)
        model.calibration.set_scope(CalibrationScope.layer)
        assert torch.equal(thresholds(model, two), by_head)


def test_the_scope_is_what_one_number_uses() -> None:
    for scope in CalibrationScope:
        model, _ = made(SupernetConfig(calibration=scope))
        policy = RoutingPolicy.uniform(model.kinds, 8, 0.2)
        theta = model.compile_policy(policy, 1).threshold[:, 0]
        assert bool((theta[:, 0] == theta[:, 1]).all()) is (scope is CalibrationScope.layer)


def test_route_noise_is_not_calibrated() -> None:
    tables = [made(SupernetConfig(route_noise=noise))[0].calibration.by_head for noise in (0.0, 2.0)]
    assert torch.equal(*tables)


def test_calibration_is_determined_by_the_seed() -> None:
    tables = [made(SupernetConfig(), seed=seed)[0].calibration.by_layer for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_only_the_table_changes_and_only_of_routed_layers() -> None:
    torch.manual_seed(0)
    before = {name: t.clone() for name, t in tiny_model("drs").state_dict().items()}
    model, _ = made(SupernetConfig(), "drs")
    changed = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert sorted({name.split(".")[0] for name in changed}) == ["calibration"]
    assert model.calibration.by_head.isnan().all(2).all(1).tolist() == [True, False, True]
    assert model.calibration.by_layer.isnan().all(1).tolist() == [True, False, True]
    assert made(SupernetConfig(), "ds")[0].calibration.by_layer.isnan().all()


def test_calibration_needs_complete_chunks() -> None:
    with pytest.raises(ValueError, match="sequences are shorter than chunk_size = 128"):
        made(SupernetConfig(), chunk_size=128)


def test_calibration_never_reads_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = tiny_data(), []
    batch = data.batch

    def spy(task: str, split: Split, count: int, seed: int) -> Batch:
        seen.append(split)
        return batch(task, split, count, seed)

    monkeypatch.setattr(data, "batch", spy)
    calibrate(tiny_model("r"), data, SupernetConfig(calibration_sequences=1), seed=0)
    assert seen == [Split.search]


def test_calibration_sequences_are_not_those_of_trials() -> None:
    """Else trials would be judged on the sequences that their thresholds were fitted to."""
    data = tiny_data()
    judged = {tuple(row.tolist()) for row in data.eval_sets(Split.search)["mqar"].tokens}
    for seed in range(5):
        rows = mixed_sequences(data, 48, seed_of("calibration", seed))
        assert not judged & {tuple(row.tolist()) for row in rows}


def test_any_stretch_holds_the_tasks_by_weight() -> None:
    data = tiny_data(tasks={"mqar": 3.0, "bytes": 1.0})
    tokens = mixed_sequences(data, 80, 0)
    recall = (tokens >= 256).any(1)
    assert (len(tokens), int(recall.sum())) == (80, 60)
    assert recall.view(10, 8).sum(1).tolist() == [6] * 10
    assert len(mixed_sequences(data, 1, 0)) == 2, "each task at least once"


def test_passes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = RoutedLM.forward

    def spy(self: RoutedLM, tokens: Tensor, policy: Any, **options: Any) -> Any:
        sizes.append(len(tokens))
        return forward(self, tokens, policy, **options)

    monkeypatch.setattr(RoutedLM, "forward", spy)
    monkeypatch.setattr(calibration, "PASS_TOKENS", 10 * 64)
    made(SupernetConfig(calibration_sequences=25))
    assert sizes == [9, 8, 8] * len(BUDGETS) * 2
    sizes.clear()
    monkeypatch.setattr(calibration, "PASS_TOKENS", 1)
    made(SupernetConfig(calibration_sequences=24))
    assert sizes == [8, 8, 8] * len(BUDGETS) * 2


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("logits were made")

    monkeypatch.setattr(RoutedLM, "_output_weight", refuse)
    made(SupernetConfig())


def test_blended_quantiles_are_exact_at_the_budgets_and_never_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(999, 2, generator=generator) + 0.05 * i for i in range(4)]
    budgets = (0.02, 0.1, 0.4, 0.7)
    levels = torch.cat((torch.linspace(0, 1, 60).double(), 1 - torch.tensor(budgets, dtype=torch.float64)))
    levels = levels.sort().values
    table = blend(pools, budgets, levels)
    assert (table.diff(dim=0) >= 0).all()
    for pool, budget in zip(pools, budgets, strict=True):
        theta = budget_threshold(table.T, levels, torch.tensor([budget] * 2, dtype=torch.float64))
        torch.testing.assert_close(theta, torch.quantile(pool.double(), 1 - budget, dim=0))
    for pool, level in ((pools[0], 0.99), (pools[-1], 0.1)):
        ends = blend(pools, budgets, torch.tensor([0.0, level, 1.0]).double())
        torch.testing.assert_close(ends[1], quantile_table(pool, torch.tensor([level]).double())[0])


def test_a_larger_budget_keeps_a_superset() -> None:
    model, data = made(SupernetConfig())
    tokens = data.eval_sets(Split.test)["mqar"].tokens
    last = torch.zeros(1)
    for step in range(1, 100):
        policy = RoutingPolicy((LayerPolicy(budget=step / 100), *[LayerPolicy(threshold=0.0)] * 2), 8)
        with torch.no_grad():
            route = model(tokens, policy, logits_to_keep=0).layers[0].route
        assert (route >= last).all()
        last = route


def test_a_config_is_not_changed() -> None:
    config = SupernetConfig(calibration=CalibrationScope.head, route_noise=1.0)
    before = replace(config)
    made(config)
    assert config == before
