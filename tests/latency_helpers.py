"""A table of times by formula, so that no test has to measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from natsl.space.latency import FRACTIONS, LatencyTable, Step
from natsl.space.policy import Op

LENGTHS = (8, 64, 512, 4096)
REST = {Step.decode: 0.5, Step.prefill: 0.25, Step.launch: 2.0}  # per token, of a prefill


def decode_ms(kind: Op, fraction: float, tokens: int) -> float:
    """Of a layer after so many tokens."""
    return 0.1 if kind is Op.delta else 0.2 + 0.001 * fraction * tokens


def prefill_ms(kind: Op, fraction: float, tokens: int) -> float:
    """Of a layer, of so many tokens; attention grows with the square."""
    return tokens * (0.01 if kind is Op.delta else 0.02 + 0.0001 * fraction * tokens)


def launch_ms(kind: Op, fraction: float, tokens: int) -> float:
    """What the host needs for a layer, whatever it keeps."""
    return 3.0 if kind is Op.routed else 1.0


MS = {Step.decode: decode_ms, Step.prefill: prefill_ms, Step.launch: launch_ms}


def made_table(made_from: Mapping[str, Any] | None = None) -> LatencyTable:
    """The table of these formulas for all kinds of layers."""
    layers = {}
    for kind in Op:
        fractions = FRACTIONS if kind is Op.routed else (float(kind is Op.softmax),)
        layers[kind] = {
            step: tuple(tuple(ms(kind, f, tokens) for f in fractions) for tokens in LENGTHS) for step, ms in MS.items()
        }
    rest = {
        Step.decode: (REST[Step.decode],) * len(LENGTHS),
        Step.prefill: tuple(REST[Step.prefill] * tokens for tokens in LENGTHS),
        Step.launch: (REST[Step.launch],) * len(LENGTHS),
    }
    made = {"device": "abacus", "batch_size": 1} if made_from is None else made_from
    return LatencyTable(made, LENGTHS, FRACTIONS, rest, layers)
