"""How long a model takes under a routing policy, from times of its layers that were measured once (``natsl.latency``).

A table has the milliseconds of one layer of each kind over a grid of lengths in tokens and of kept fractions, for a
decoding step and for a prefill, and those of the rest of the model. The time of a policy is the rest and the sum over
layers. A prefill has two of them, which run side by side, and takes the larger: what the device computes, and what the
host needs to launch it. In between, times are linear in the kept fraction; in the length, those of a decoding step and
of launches are, and of a prefill the time per token, since its attention grows with the square. A layer of op delta
counts as of kind delta, which it is in an export. A fraction is a mean over heads, which share out a layer's work
whatever each keeps.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

from natsl.space.check import check, check_choice, check_count, check_number
from natsl.space.cost import LayerShape, layers_of
from natsl.space.policy import Op, RoutingPolicy

FORMAT = 2
FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the grid; times are nearly linear in between

Grid = tuple[tuple[float, ...], ...]  # a row for each length, in it a time for each fraction


class Step(Enum):
    """What is timed."""

    decode = "decode"  # one more token of every sequence
    prefill = "prefill"  # all tokens of every sequence at once, by the device
    launch = "launch"  # the host's part of that


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a model's layers on one device.

    ``made_from``: whose times these are, JSON-ready: device, versions, dtype, shape of the model, sequences at once.
    ``lengths`` in tokens and ``fractions`` from 0 to 1, both ascending. ``rest``: of the whole model without its layers
    at each length. ``layers``: of a layer of each kind, with a column for each fraction if it is routed, else with one.
    Raises ``ValueError`` for what is no such table.
    """

    made_from: Mapping[str, Any]
    lengths: tuple[int, ...]
    fractions: tuple[float, ...]
    rest: Mapping[Step, tuple[float, ...]]
    layers: Mapping[Op, Mapping[Step, Grid]]

    def __post_init__(self) -> None:
        for name, values in (("lengths", self.lengths), ("fractions", self.fractions)):
            rising = len(values) > 0 and all(a < b for a, b in pairwise(values))
            check(rising, f"latency.{name}", values, "they must rise")
        check(self.fractions[0] == 0 and self.fractions[-1] == 1, "latency.fractions", self.fractions, "from 0 to 1")
        check_count("latency.lengths", self.lengths[0], 1)
        for step in Step:
            self._check(f"latency.rest.{step.value}", [self.rest[step]], 1, len(self.lengths))
            for kind, grids in self.layers.items():
                columns = len(self.fractions) if kind is Op.routed else 1
                self._check(f"latency.layers.{kind.value}.{step.value}", grids[step], len(self.lengths), columns)

    @staticmethod
    def _check(name: str, grid: Sequence[Sequence[float]], rows: int, columns: int) -> None:
        sizes = [len(row) for row in grid]
        check(sizes == [columns] * rows, name, sizes, f"it must have {rows} rows of {columns}")
        for row in grid:
            for value in row:
                check_number(name, value, 0, 1e12)

    def covers(self, tokens: int) -> bool:
        """Whether this length lies on the grid or in between."""
        return self.lengths[0] <= tokens <= self.lengths[-1]

    def milliseconds(
        self, step: Step, shapes: Sequence[LayerShape], policy: RoutingPolicy, kept: Sequence[float], tokens: int
    ) -> float:
        """Time of a step of the whole model after, or of, ``tokens`` tokens of every sequence.

        ``shapes``, ``policy`` and ``kept`` as for ``natsl.space.cost``. ``ValueError`` if they do not fit, for a length
        beyond the grid and for a kind of layer that the table does not have.
        """
        span = f"the table goes from {self.lengths[0]} to {self.lengths[-1]} tokens"
        check(self.covers(tokens), "latency: tokens", tokens, span)
        parts = (Step.prefill, Step.launch) if step is Step.prefill else (step,)
        return max(self._sum(part, shapes, policy, kept, tokens) for part in parts)

    def _sum(
        self, step: Step, shapes: Sequence[LayerShape], policy: RoutingPolicy, kept: Sequence[float], tokens: int
    ) -> float:
        total = self._along(step, [(time,) for time in self.rest[step]], 0.0, tokens)
        for shape, layer, fraction in layers_of(shapes, policy, kept, tokens, 1):
            kind = Op.delta if layer.op is Op.delta else shape.kind
            known = ", ".join(item.value for item in self.layers)
            check(kind in self.layers, "latency: kind of layer", kind, f"the table has {known}")
            total += self._along(step, self.layers[kind][step], fraction, tokens)
        return total

    def _along(self, step: Step, grid: Sequence[Sequence[float]], fraction: float, tokens: int) -> float:
        """The time at a fraction and a length, from those around it."""
        if len(grid[0]) > 1:
            column = [_between(self.fractions, row, fraction) for row in grid]
        else:
            column = [row[0] for row in grid]
        if step is not Step.prefill:
            return _between(self.lengths, column, tokens)
        return tokens * _between(self.lengths, [t / n for t, n in zip(column, self.lengths, strict=True)], tokens)

    def digest(self) -> str:
        """Hex sha256 of the table: whose costs are of another table, has another one."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "made_from": dict(self.made_from),
            "lengths": list(self.lengths),
            "fractions": list(self.fractions),
            "rest_ms": {step.value: list(times) for step, times in self.rest.items()},
            "layer_ms": {
                kind.value: {step.value: [list(row) for row in grid] for step, grid in grids.items()}
                for kind, grids in self.layers.items()
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with its own ``digest``."""
        return {**self._plain(), "sha256": self.digest()}

    @classmethod
    def from_dict(cls, plain: object) -> LatencyTable:
        """The inverse of ``to_dict``, also after JSON; ``ValueError`` for anything else."""
        try:
            if not isinstance(plain, Mapping):
                raise TypeError("no mapping")
            check(plain["format"] == FORMAT, "latency.format", plain["format"], f"this natsl reads {FORMAT}")
            layers = {
                check_choice("latency.layer_ms", kind, Op): {Step(step): _grid(grid) for step, grid in grids.items()}
                for kind, grids in plain["layer_ms"].items()
            }
            rest = {Step(step): tuple(times) for step, times in plain["rest_ms"].items()}
            made = cls(plain["made_from"], tuple(plain["lengths"]), tuple(plain["fractions"]), rest, layers)
            stored = plain["sha256"]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is no table of times ({type(error).__name__}: {error})") from None
        if stored != made.digest():
            raise ValueError("checksum error")
        return made


def _grid(plain: Sequence[Sequence[float]]) -> Grid:
    return tuple(tuple(row) for row in plain)


def _between(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """The value at a place within ascending ``places``, linear between the two around it."""
    if len(places) == 1:
        return values[0]
    i = min(max(bisect_right(places, place), 1), len(places) - 1)
    share = (place - places[i - 1]) / (places[i] - places[i - 1])
    return (1 - share) * values[i - 1] + share * values[i]


def grid_lengths(wanted: Iterable[int], chunk_size: int) -> tuple[int, ...]:
    """Lengths of a grid that covers those that are wanted: chunks by powers of two, and the longest."""
    least, most = min(*wanted, chunk_size), max(*wanted, chunk_size)
    doubled = {chunk_size << i for i in range((most // chunk_size).bit_length())}
    return tuple(sorted({least, most} | {tokens for tokens in doubled if tokens < most}))
