"""Bytes of a cache: what its tensors hold, what the cost model says, and what dense attention would hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from natsl.config import ModelConfig, Precision
from natsl.export import trimmed
from natsl.footprint import footprints
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import fill_calibration, tiny_model

DELTA, SOFTMAX = LayerPolicy(Op.delta), LayerPolicy(Op.softmax)
POLICIES = {
    "budgets": ("rrr", (LayerPolicy(budget=0.3), LayerPolicy(budget=(1, 0)), LayerPolicy(budget=0.05))),
    "ops": ("rrr", (DELTA, SOFTMAX, LayerPolicy(threshold=0.2))),
    "kinds": ("drs", (DELTA, LayerPolicy(budget=0.5), SOFTMAX)),
    "all delta": ("rrr", (DELTA,) * 3),
}
LENGTHS = (5, 48, 100, 331)


def made(kinds: str, **options: Any) -> RoutedLM:
    model = tiny_model(kinds, chunk_size=16, key_dim=12, value_dim=16, **options)
    fill_calibration(model)
    return model


def tokens(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("precision", Precision, ids=lambda precision: precision.value)
@pytest.mark.parametrize(("kinds", "layers"), POLICIES.values(), ids=POLICIES.keys())
def test_the_cost_model_says_what_a_cache_holds(
    kinds: str, layers: tuple[LayerPolicy, ...], precision: Precision
) -> None:
    model, policy = made(kinds, precision=precision), RoutingPolicy(layers, 16)
    for item in footprints(model, policy, tokens(3, 331), LENGTHS):
        assert item.predicted == pytest.approx(item.used)
        assert item.held > item.used


def test_an_export_without_unused_weights() -> None:
    policy = RoutingPolicy((DELTA, LayerPolicy(budget=0.3), DELTA), 16)
    models = made("rrr"), trimmed(made("rrr"), policy)
    full, small = (footprints(model, policy, tokens(1, 331), [331])[0] for model in models)
    assert small.used < full.used
    assert small.predicted == pytest.approx(small.used)


def test_bytes_are_those_of_the_tensors_of_a_cache() -> None:
    model, policy = made("rr"), RoutingPolicy((LayerPolicy(budget=0.4), DELTA), 16)
    x = tokens(2, 100)
    found = footprints(model, policy, x, [64, 100])
    held, used, kept = [], [], []
    for row in x:
        cache = model.new_cache(1)
        model(row[None, :64], policy, cache=cache)
        model(row[None, 64:], policy, cache=cache)
        held.append(cache.nbytes)
        parts = [x for layer in cache.layers for name, x in layer.tensors().items() if not name.startswith("pages.")]
        pages = cache.layers[0].pages, cache.layers[1].pages
        assert pages[0] is not None
        assert pages[1] is not None
        kept.append(int(pages[0].kept.sum()))
        assert int(pages[1].kept.sum()) == 0
        chunk = 4 * 16 * (12 + 16)  # float32
        numbers = 8 * (kept[-1] + 2 * 2 + 2 * 2)  # places in the tables, and numbers kept
        own = sum(x.numel() * x.element_size() for x in (*parts, cache.lengths))
        used.append(own + numbers + chunk * (kept[-1] + 2 * (1 + 2)))
    assert found[1].held == sum(held) / 2
    assert found[1].used == sum(used) / 2
    assert found[1].kept == (sum(kept) / 2 / (2 * 6), 0.0)
    assert found[1].held > found[1].used


def test_dense_attention_holds_keys_and_values_of_every_token() -> None:
    model = RoutedLM(ModelConfig(layers=[Op.softmax] * 2, heads=3, key_dim=8, value_dim=12, chunk_size=16))
    policy = RoutingPolicy((SOFTMAX,) * 2, 16)
    item = footprints(model, policy, tokens(1, 320), [320])[0]
    assert item.dense == 2 * 320 * 3 * (8 + 12) * 4
    assert item.kept == (1.0, 1.0)
    pages = (20 + 1) * 3 + 1  # the open chunk of each head, and the page of none
    assert item.used == pytest.approx(2 * (pages * 16 * 20 * 4 + 3 * 3 * 28 * 4), rel=0.02)
