"""Tables of times: what lies between their points, what adds up, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from natsl.space.cost import LayerShape
from natsl.space.latency import LatencyTable, Step, grid_lengths
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.latency_helpers import LENGTHS, MS, REST, decode_ms, made_table, prefill_ms

C = 8
ROUTED = LayerShape(Op.routed, 16, 2, 8, 8, 1, 16, 4)
KINDS = (Op.routed, Op.softmax, Op.delta, Op.routed)
SHAPES = tuple(replace(ROUTED, kind=kind) for kind in KINDS)
TABLE = made_table()


def policy(first: LayerPolicy, last: LayerPolicy) -> RoutingPolicy:
    return RoutingPolicy((first, LayerPolicy(Op.softmax), LayerPolicy(Op.delta), last), C)


BUDGET = LayerPolicy(budget=0.3)


@pytest.mark.parametrize("tokens", [*LENGTHS, 9, 100, 3000])
@pytest.mark.parametrize("kept", [0.0, 0.07, 0.1, 0.6, 1.0])
def test_times_are_the_rest_and_the_sum_over_layers(kept: float, tokens: int) -> None:
    """The formulas are linear where the table is, so that it gives them back between its points too."""
    expected = {}
    for step, ms in MS.items():
        rest = REST[step] * (tokens if step is Step.prefill else 1)
        fixed = ms(Op.softmax, 1.0, tokens) + ms(Op.delta, 0.0, tokens)
        expected[step] = rest + fixed + ms(Op.routed, kept, tokens) + ms(Op.routed, 1.0, tokens)
    assert (expected[Step.launch] > expected[Step.prefill]) == (tokens < 16)
    expected[Step.prefill] = max(expected[Step.prefill], expected[Step.launch])
    for step in (Step.decode, Step.prefill):
        value = TABLE.milliseconds(step, SHAPES, policy(BUDGET, LayerPolicy(Op.softmax)), [kept, 0.5, 0.5, 0.5], tokens)
        assert value == pytest.approx(expected[step], rel=1e-12)


def test_op_delta_costs_what_a_layer_of_kind_delta_does() -> None:
    """Not what a routed layer that keeps nothing does."""
    for step, ms in ((Step.decode, decode_ms), (Step.prefill, prefill_ms)):
        times = [
            TABLE.milliseconds(step, SHAPES, policy(BUDGET, last), [0.0] * 4, 64)
            for last in (LayerPolicy(Op.delta), BUDGET)
        ]
        assert times[1] - times[0] == pytest.approx(ms(Op.routed, 0.0, 64) - ms(Op.delta, 0.0, 64))


def test_stored_and_read_back() -> None:
    plain = json.loads(json.dumps(TABLE.to_dict(), allow_nan=False))
    again = LatencyTable.from_dict(plain)
    assert again == TABLE
    assert again.digest() == TABLE.digest() == plain["sha256"]
    assert made_table({"device": "another"}).digest() != TABLE.digest()


def changed(*path: Any, value: Any) -> dict[str, Any]:
    """The stored table with another value at a place."""
    plain: dict[str, Any] = json.loads(json.dumps(TABLE.to_dict()))
    place: Any = plain
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return plain


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        (changed("layer_ms", "routed", "decode", 0, 0, value=7.0), "checksum error"),
        (changed("made_from", "device", value="quick"), "checksum error"),
        (changed("format", value=1), "latency.format = 1 is not allowed: this natsl reads 2"),
        (changed("lengths", value=[64, 8, 512, 4096]), "latency.lengths"),
        (changed("lengths", value=[8, 64]), r"latency.rest.decode = \[4\] is not allowed: it must have 1 rows of 2"),
        (changed("fractions", value=[0, 0.5]), "from 0 to 1"),
        (changed("layer_ms", "delta", "prefill", value=[[0.1]]), r"latency.layers.delta.prefill"),
        (changed("layer_ms", "linear", value={}), "linear"),
        (changed("rest_ms", "decode", 0, value=-1.0), "latency.rest.decode"),
        (changed("rest_ms", "decode", 0, value="1"), "latency.rest.decode"),
        ({"format": 2}, "it is no table of times"),
        ([], "it is no table of times"),
        (None, "it is no table of times"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_such_table_is_refused(plain: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LatencyTable.from_dict(plain)


def test_lengths_beyond_the_grid_are_refused() -> None:
    assert [TABLE.covers(tokens) for tokens in (7, 8, 4096, 4097)] == [False, True, True, False]
    with pytest.raises(ValueError, match="tokens = 4097 is not allowed: the table goes from 8 to 4096 tokens"):
        TABLE.milliseconds(Step.decode, SHAPES, policy(BUDGET, BUDGET), [0.1] * 4, 4097)


def test_a_kind_that_was_not_timed_is_refused() -> None:
    few = replace(TABLE, layers={Op.routed: TABLE.layers[Op.routed]})
    with pytest.raises(ValueError, match="'softmax' is not allowed: the table has routed"):
        few.milliseconds(Step.decode, SHAPES, policy(BUDGET, BUDGET), [0.1] * 4, 64)


@pytest.mark.parametrize(
    ("wanted", "lengths"),
    [
        ([384], (16, 32, 64, 128, 256, 384)),
        ([256], (16, 32, 64, 128, 256)),
        ([16], (16,)),
        ([5, 40], (5, 16, 32, 40)),
        ([7], (7, 16)),
    ],
    ids=str,
)
def test_a_grid_goes_from_a_chunk_to_the_longest(wanted: list[int], lengths: tuple[int, ...]) -> None:
    assert grid_lengths(wanted, 16) == lengths
