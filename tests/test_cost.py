"""Costs: against the published figures of the 340M shapes, counts by hand, and what must hold for any policy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from natsl.config import ModelConfig, Precision
from natsl.model import RoutedLM
from natsl.space.cost import (
    LayerShape,
    cache_bytes,
    decode_bytes,
    exported,
    kv_bytes,
    kv_bytes_per_token,
    kv_token_bytes,
    prefill_flops,
    state_bytes,
    visible_keys,
)
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

# The 340M model: width 1024, 6 heads of (128, 256), 12 softmax heads of (64, 128), chunks of 64.
ROUTED = LayerShape(Op.routed, 1024, 6, 128, 256, 2, 2816, 4)
DELTA, SOFTMAX = replace(ROUTED, kind=Op.delta), replace(ROUTED, kind=Op.softmax)
TINY = LayerShape(Op.routed, 8, 2, 4, 6, 1, 16, 4)
LENGTHS = [1, 63, 64, 65, 4096, 131072]
FRACTIONS = [0.0, 0.1, 0.3, 0.5, 1.0]


def routed(*budgets: float) -> RoutingPolicy:
    return RoutingPolicy(tuple(LayerPolicy(budget=budget) for budget in budgets), 64)


def only(op: Op, layers: int = 1) -> RoutingPolicy:
    return RoutingPolicy((LayerPolicy(op),) * layers, 64)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("f", FRACTIONS)
def test_kv_bytes_of_the_340m_layer(f: float, length: int) -> None:
    assert kv_bytes([ROUTED], routed(f), [f], length) == pytest.approx(4608 * (f * length + 32), rel=1e-12)


@pytest.mark.parametrize(("f", "microseconds"), [(0.1, 20), (0.3, 60), (0.5, 101), (1.0, 201)])
def test_decode_floor_of_the_340m_layer(f: float, microseconds: float) -> None:
    """KV bytes of one layer at a context of 131072 over 3 TB/s."""
    assert kv_bytes([ROUTED], routed(f), [f], 131072) / 3e12 * 1e6 == pytest.approx(microseconds, abs=0.7)


def test_state_of_the_340m_layer() -> None:
    assert state_bytes(ROUTED) == state_bytes(DELTA) == 786432  # 0.79 MB
    assert state_bytes(SOFTMAX) == 0
    assert 2 * state_bytes(ROUTED) / 3e12 * 1e6 == pytest.approx(0.5, abs=0.05)  # read and written, µs at 3 TB/s


@pytest.mark.parametrize(
    ("length", "f", "microseconds"),
    [
        (4096, 0.3, 15),
        (4096, 0.5, 25),
        (32768, 0.1, 315),
        (32768, 0.3, 932),
        (32768, 0.5, 1549),
        (131072, 0.1, 4970),
        (131072, 0.3, 14861),
        (131072, 0.5, 24752),
    ],
)
def test_softmax_floor_of_the_340m_layer(length: int, f: float, microseconds: float) -> None:
    """Operations of the softmax branch at 800 TFLOP/s: what a routed layer costs above its delta branch."""
    mixing_and_router = length * 4 * 6 * 128 * 12 + length // 64 * 4 * 1024 * 6
    branch = prefill_flops([ROUTED], routed(f), [f], length) - prefill_flops([ROUTED], only(Op.delta), [0], length)
    assert (branch - mixing_and_router) / 800e12 * 1e6 == pytest.approx(microseconds, rel=0.03)


def test_all_softmax_costs_the_same_per_token_at_every_length() -> None:
    for length in LENGTHS:
        assert kv_bytes_per_token([ROUTED, SOFTMAX], only(Op.softmax, 2), [1, 1], length) == pytest.approx(2 * 4608)
    assert kv_bytes_per_token([ROUTED], only(Op.delta), [0], 4096) == 0


def test_kv_bytes_follow_the_element_size() -> None:
    assert kv_token_bytes(ROUTED) == 4608
    assert kv_token_bytes(ROUTED, 4) == 9216
    assert kv_bytes([ROUTED], routed(0.5), [0.5], 640, 1) == 2304 * (320 + 32)


@pytest.mark.parametrize("f", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 11, 12, 41])
def test_visible_keys_count_what_the_mask_shows(length: int, f: float) -> None:
    C = 4
    own = sum(t // C == s // C for t in range(length) for s in range(t + 1))
    earlier = sum(s // C < t // C for t in range(length) for s in range(t + 1))
    assert visible_keys(f, length, C) == pytest.approx(own + f * earlier)
    assert visible_keys(1, length, C) == length * (length + 1) / 2


def test_decode_bytes_by_hand() -> None:
    """Three layers: a routed one, one of softmax, one of delta."""
    shapes = [ROUTED, SOFTMAX, DELTA]
    policy = RoutingPolicy((LayerPolicy(budget=0.25), LayerPolicy(Op.softmax), LayerPolicy(Op.delta)), 64)
    kv = 4608 * (0.25 * 6400 + 32) + 4608 * (6400 + 32)
    assert decode_bytes(shapes, policy, [0.25, 1, 0], 6400) == pytest.approx(kv + 2 * 2 * 786432)


def test_prefill_flops_by_hand() -> None:
    """One tiny layer (D 8, R 2, K 4, V 6, G 1, M 16, W 4), chunks of 4, 10 tokens, half of the chunks kept."""
    policy = RoutingPolicy((LayerPolicy(budget=0.5),), 4)
    projections = 10 * 2 * 8 * 2 * (4 + 4 + 6 + 6 + 6)
    convolution = 10 * 2 * 4 * 2 * (4 + 4 + 6)
    mlp = 10 * 2 * 3 * 8 * 16
    states, keys, values, inverse = 3 * 2 * 4 * 6, 3 * 2 * 4 * 4, 2 * 2 * 4 * 6, 2 * 4 * 4 / 3
    delta = 10 * 2 * (states + keys + values + inverse) + 10 * 2 * 8 * 2 * 2
    softmax = 2 * 2 * (4 + 6) * (10 + 10 + 3 + 0.5 * (4 * 4 + 2 * 8))
    mixing = 10 * 2 * 8 * 4
    router = 3 * 2 * 8 * 4
    expected = projections + convolution + mlp + delta + softmax + mixing + router
    assert prefill_flops([TINY], policy, [0.5], 10) == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [7, 64, 100])
@pytest.mark.parametrize("precision", Precision, ids=lambda precision: precision.value)
def test_cache_bytes_are_what_a_cache_holds(tokens: int, precision: Precision) -> None:
    """Of sequences that were read, without free pages; each by itself has a null page that here they share."""
    kinds = [Op.routed, Op.softmax, Op.delta, Op.routed]
    config = ModelConfig(layers=kinds, width=24, key_dim=8, value_dim=12, softmax_per_head=2, chunk_size=8)
    model = RoutedLM(config, precision=precision).eval()
    threshold = LayerPolicy(threshold=0.0)
    policy = RoutingPolicy((threshold, LayerPolicy(Op.softmax), LayerPolicy(Op.delta), threshold), 8)
    cache = model.new_cache(3)
    layers = model(torch.randint(384, (3, tokens)), policy, cache=cache).layers
    chunks = tokens // 8
    kept = [float(layer.route[:, :chunks].mean()) if chunks else 0.0 for layer in layers]
    assert 0 < kept[0] < 1 or tokens == 7
    held = cache.select(range(3))
    null = free = 0
    for layer in held.layers:
        if layer.pages is not None:
            null += sum(x[0].numel() * x.element_size() for x in (layer.pages.keys, layer.pages.values))
            free += 8 * int((layer.pages.table == 0).sum())  # places beyond those that are used
    expected = 3 * cache_bytes(config.layer_shapes(), policy, kept, tokens, 2 if precision is Precision.bfloat16 else 4)
    assert held.nbytes - free == pytest.approx(expected - 2 * null, rel=1e-6)


def test_cache_bytes_of_a_layer_that_is_all_delta() -> None:
    """What an export has of it: no pages and no router."""
    (shape,) = exported([ROUTED], only(Op.delta))
    one, other = (cache_bytes([shape], only(Op.delta), [0.0], 4096) for shape in (shape, DELTA))
    assert one == other == 8 + 2 * 3 * 6 * (2 * 128 + 256) + 2 * 786432 + 4 * 6 + 8
    assert cache_bytes([ROUTED], routed(0.0), [0.0], 4096) - one == 7 * 2 * 64 * 384 + 6 * (8 + 8) + 4 * 1024


def test_ops_leave_out_what_they_do_not_compute() -> None:
    def flops(shape: LayerShape, policy: RoutingPolicy, f: float) -> float:
        return prefill_flops([shape], policy, [f], 4096)

    assert flops(ROUTED, only(Op.delta), 0) == flops(DELTA, only(Op.delta), 0)
    assert flops(SOFTMAX, only(Op.softmax), 1) < flops(ROUTED, only(Op.softmax), 1)
    router = 64 * 4 * 1024 * 6
    assert flops(ROUTED, routed(1.0), 1) - flops(ROUTED, only(Op.softmax), 1) == pytest.approx(router)


def test_only_routed_layers_read_the_kept_fraction() -> None:
    for function in (kv_bytes, kv_bytes_per_token, decode_bytes, prefill_flops, cache_bytes):
        for op, f in ((Op.softmax, 1.0), (Op.delta, 0.0)):
            assert function([ROUTED], only(op), [math.nan], 4096) == function([ROUTED], only(op), [f], 4096)


def test_costs_grow_with_what_is_kept_and_add_up_over_layers() -> None:
    rng = random.Random(0)
    functions: list[Callable[..., float]] = [kv_bytes, kv_bytes_per_token, decode_bytes, prefill_flops, cache_bytes]
    for _ in range(200):
        kinds = [rng.choice(list(Op)) for _ in range(rng.randint(1, 5))]
        shapes = [replace(rng.choice([ROUTED, TINY]), kind=kind) for kind in kinds]
        policy = RoutingPolicy.uniform(kinds, rng.choice([16, 64]), rng.choice([0, 0.25, 1]))
        kept = [rng.random() for _ in kinds]
        more = [f + (1 - f) * rng.random() for f in kept]
        length = rng.randint(1, 10**5)
        for function in functions:
            cost = function(shapes, policy, kept, length)
            assert math.isfinite(cost)
            assert 0 <= cost <= function(shapes, policy, more, length) * (1 + 1e-12)
            layers = [
                function([shape], RoutingPolicy((layer,), policy.chunk_size), [f], length)
                for shape, layer, f in zip(shapes, policy.layers, kept, strict=True)
            ]
            once = 8 if function is cache_bytes else 0  # the length of the sequence
            assert cost - once == pytest.approx(sum(layer - once for layer in layers))
            low = function(shapes, RoutingPolicy.all_delta(kinds, policy.chunk_size), kept, length)
            assert low <= cost * (1 + 1e-12)


@pytest.mark.parametrize("function", [kv_bytes, kv_bytes_per_token, decode_bytes, prefill_flops, cache_bytes])
def test_bad_arguments_are_refused(function: Callable[..., float]) -> None:
    good = routed(0.5)
    with pytest.raises(ValueError, match=r"kept\[0\] = 1.5 .* \[0, 1\]"):
        function([ROUTED], good, [1.5], 4096)
    with pytest.raises(ValueError, match=r"kept\[0\] = nan"):
        function([ROUTED], good, [math.nan], 4096)
    with pytest.raises(ValueError, match=r"kept fractions = 2 .* 1 layers"):
        function([ROUTED], good, [0.5, 0.5], 4096)
    with pytest.raises(ValueError, match=r"context = 0 .* ≥ 1"):
        function([ROUTED], good, [0.5], 0)
    with pytest.raises(ValueError, match="kind delta"):
        function([DELTA], good, [0.5], 4096)
    with pytest.raises(ValueError, match="2 layers"):
        function([ROUTED, ROUTED], good, [0.5, 0.5], 4096)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape.heads = 0 .* ≥ 1"):
        replace(ROUTED, heads=0)
    with pytest.raises(ValueError, match=r"shape.kind = 'linear'"):
        replace(ROUTED, kind="linear")  # type: ignore[arg-type]
