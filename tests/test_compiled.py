"""Policies compiled to tensors: what they hold, and that a batch of them gives each sequence what it gets by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from natsl.config import RouteGradient
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import fill_calibration, tiny_model

D, S = LayerPolicy(Op.delta), LayerPolicy(Op.softmax)


def policy(*layers: LayerPolicy) -> RoutingPolicy:
    return RoutingPolicy(layers, 8)


MIXED = [
    policy(LayerPolicy(budget=0.3), LayerPolicy(budget=(0.2, 0.0)), D),
    policy(LayerPolicy(budget=(0.0, 0.0)), S, LayerPolicy(budget=(1.0, 0.5), cap=0.3, burst=1, mix_temperature=2.0)),
    policy(D, LayerPolicy(threshold=(0.1, math.inf)), replace(S, mix_temperature=0.5)),
    policy(LayerPolicy(budget=0.6, cap=0.2), LayerPolicy(threshold=-0.2), LayerPolicy(budget=1.0)),
]


def calibrated(kinds: str = "rrr") -> RoutedLM:
    model = tiny_model(kinds)
    fill_calibration(model)
    model.calibration.by_head[:, 1] *= 2
    return model


def test_what_a_policy_is_compiled_to() -> None:
    layer = LayerPolicy(threshold=(0.5, -math.inf), cap=0.25, burst=3, mix_temperature=2.0)
    compiled = calibrated("rdr").compile_policy([policy(layer, D, S), policy(D, D, LayerPolicy(budget=0.25))], 4)
    first, delta, last = (compiled.layer(i) for i in range(3))
    assert compiled.batch == 4
    assert first.threshold.tolist() == [[0.5, -math.inf]] * 2 + [[math.inf] * 2] * 2
    assert first.cap.tolist() == [0.25, 0.25, 1.0, 1.0]
    assert first.burst.tolist() == [3, 3, 0, 0]
    assert first.temperature.tolist() == [2.0, 2.0, 1.0, 1.0]
    assert first.delta_only.tolist() == [False, False, True, True]
    assert [(span.rows, span.both, span.learns) for span in first.plan.spans] == [
        (slice(0, 2), True, True),
        (slice(2, 4), False, False),
    ]
    assert [span.rows for span in delta.plan.spans] == [slice(0, 4)]
    assert last.threshold[:2].tolist() == [[-math.inf] * 2] * 2
    # the quantile .75 of an even spread from −1 to 1
    torch.testing.assert_close(last.threshold[2:], torch.full((2, 2), 0.5))
    assert (first.plan.capped, last.plan.capped) == (True, False)


@pytest.mark.parametrize("per_kind", [True, False], ids=["per kind", "one plan"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 1, 2, 0, 1], [2, 2, 1, 0]], ids=str)
def test_every_sequence_of_a_batch_gets_what_its_policy_gives_it_alone(order: list[int], per_kind: bool) -> None:
    model, x = calibrated(), torch.randint(0, 300, (len(order), 61))
    with torch.no_grad():
        batch = model(x, model.compile_policy([MIXED[i] for i in order], len(order), per_kind=per_kind))
        for row, i in enumerate(order):
            alone = model(x[row : row + 1], MIXED[i])
            torch.testing.assert_close(batch.logits[row], alone.logits[0], rtol=0, atol=1e-5)
            for layer, single in zip(batch.layers, alone.layers, strict=True):
                assert torch.equal(layer.route[row], single.route[0])


def test_policies_are_exchanged_in_place() -> None:
    """As a captured graph needs it: the same tensors, other numbers, nothing decided on the host."""
    model, x = calibrated(), torch.randint(0, 300, (2, 61))
    first, second = (model.compile_policy(pair, 2, per_kind=False) for pair in (MIXED[:2], MIXED[2:]))
    pointer = first.threshold.data_ptr()
    with torch.no_grad():
        before = model(x, first)
        first.copy_(second)
        after, expected = model(x, first), model(x, second)
    assert first.threshold.data_ptr() == pointer
    assert torch.equal(after.logits, expected.logits)
    assert not torch.equal(after.logits, before.logits)
    bare = tiny_model("rrr").compile_policy(MIXED[:2], 2, per_kind=False, training=True)
    for other in (model.compile_policy(MIXED[:2], 2), model.compile_policy(MIXED[:2], 4, per_kind=False), bare):
        with pytest.raises(ValueError, match="only calibrated policies compiled with per_kind=False for one model"):
            first.copy_(other)


def test_one_plan_serves_every_kind_of_layer() -> None:
    model, x = calibrated("dsr"), torch.randint(0, 300, (2, 30))
    for layer in (D, S, LayerPolicy(budget=0.4)):
        chosen = policy(D, S, layer)
        with torch.no_grad():
            one = model(x, model.compile_policy(chosen, 2, per_kind=False))
            torch.testing.assert_close(one.logits, model(x, chosen).logits, rtol=0, atol=1e-5)


def test_static_heads_are_policies_and_need_no_table() -> None:
    model, x = tiny_model("r"), torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        route = model(x, policy(LayerPolicy(budget=(1, 0)))).layers[0].route
    assert route[..., 0].all()
    assert not route[..., 1].any()


def test_a_number_and_a_list_of_it_differ() -> None:
    """One number shares a threshold between heads, whose margins differ; a list has one for each."""
    model, x = calibrated("r"), torch.randint(0, 300, (8, 80))
    with torch.no_grad():
        one, each = (model(x, policy(LayerPolicy(budget=b))).layers[0].route for b in (0.3, (0.3, 0.3)))
    assert torch.equal(one[..., 0], each[..., 0])
    assert not torch.equal(one[..., 1], each[..., 1])


def test_a_compiled_policy_is_refused_where_it_does_not_hold() -> None:
    """It has been checked for one model, and its budgets may have become no thresholds."""
    model, bare = calibrated(), tiny_model("rrr")
    x = torch.randint(0, 300, (2, 40))
    for other in (tiny_model("rrd"), tiny_model("rrr", heads=1), tiny_model("rr"), tiny_model("rrr", chunk_size=16)):
        with pytest.raises(ValueError, match="the policy was compiled for another model"):
            other(x, model.compile_policy(MIXED[0], 2))
    routes = [torch.zeros(2, 5, 2)] * 3
    for compiled in (bare.compile_policy(MIXED[0], 2, training=True), bare.compile_policy(MIXED[0], 2, routes)):
        with pytest.raises(ValueError, match="compiled without calibration"):
            bare(x, compiled)
        bare(x, compiled, routes=routes)
        bare(x, compiled, route_gradient=RouteGradient())
    with pytest.raises(ValueError, match="per_kind=False, which is for evaluation"):
        model(x, model.compile_policy(MIXED[0], 2, per_kind=False), route_gradient=RouteGradient())


def test_a_compiled_policy_fits_one_size_of_batch() -> None:
    model = calibrated()
    compiled = model.compile_policy(MIXED[0], 2)
    with pytest.raises(ValueError, match="compiled for a batch of 2, not 3"):
        model(torch.zeros(3, 9, dtype=torch.int64), compiled)
    with pytest.raises(ValueError, match="a batch of 3 does not split into 2 equal policies"):
        model.compile_policy(MIXED[:2], 3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerPolicy(budget=(0.1, 0.2, 0.3)), r"layers\[0\].budget = \(0.1, 0.2, 0.3\) .* 2 routing heads, not 3"),
        (LayerPolicy(threshold=(0.1,)), r"layers\[0\].threshold = \(0.1,\) .* 2 routing heads, not 1"),
    ],
    ids=["budget", "threshold"],
)
def test_lists_have_one_number_for_each_head(layer: LayerPolicy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated("r")(torch.zeros(1, 9, dtype=torch.int64), policy(layer))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_the_policy() -> None:
    model = tiny_model("rrr", heads=2, key_dim=16, value_dim=16, chunk_size=16).to("cuda")
    fill_calibration(model)
    pair = [[replace(p, chunk_size=16) for p in half] for half in (MIXED[:2], MIXED[2:])]
    first, second = (model.compile_policy(policies, 2, per_kind=False) for policies in pair)
    x = torch.randint(0, 300, (2, 160), device="cuda")
    with torch.no_grad():
        expected = [model(x, p).logits.clone() for p in (first, second)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x, first, logits_to_keep=0)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(x, first).logits
        for compiled, wanted in zip((None, second), expected, strict=True):
            if compiled is not None:
                first.copy_(compiled)
            graph.replay()
            torch.testing.assert_close(logits, wanted)
