"""A learned router beside its controls, at its own cost in every task, and what share of the selection it gets.

No torch: a report draws it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

LEARNED = "learned"  # the name of the policy itself, where controls are asked for by name
FLOORS = {"val_loss": 0.005}  # less is nothing to select: nats; of the errors of tasks .01
_FLOOR = 0.01

Array = npt.NDArray[np.float64]


class Trained(Enum):
    """Whether a supernet is trained with routes of a kind."""

    always = "always"
    with_noise = "with_noise"  # only with route noise
    never = "never"

    def covers(self, route_noise: float) -> bool:
        """Whether the routes are those of training, with this noise on the margins."""
        return self is Trained.always or (self is Trained.with_noise and route_noise > 0)


@dataclass(frozen=True)
class Share:
    """(shuffled − learned) / (shuffled − hindsight): 0 is a router whose chunks are worth as much as
    those of another sequence in the same heads, 1 is hindsight.

    ``value`` with its standard error ``error`` over sequences (null: nothing to select). ``gap``: shuffled −
    hindsight, in the task's own quality, with ``gap_error``.
    """

    value: float | None
    error: float | None
    gap: float
    gap_error: float


def selection_share(shuffled: Array, learned: Array, hindsight: Array, weights: Array, floor: float) -> Share | None:
    """The share from amounts per sequence, summed nats or wrong answers, of ``weights`` tokens or answers; each [B].

    Sequences are paired; errors are those of a ratio of means (delta method). Nothing to select: the gap is below
    ``floor`` or two of its standard errors. Never clipped. None: a single sequence has no error.
    """
    n, total = len(weights), float(weights.sum())
    if n < 2 or total == 0:
        return None

    def spread(residual: Array) -> float:
        return math.sqrt(n / (n - 1) * float((residual**2).sum()))

    above, span = shuffled - learned, shuffled - hindsight
    gap = float(span.sum()) / total
    gap_error = spread(span - gap * weights) / total
    if gap < max(floor, 2 * gap_error):
        return Share(None, None, gap, gap_error)
    value = float(above.sum() / span.sum())
    return Share(value, spread(above - value * span) / float(span.sum()), gap, gap_error)


def floor_of(metric: str) -> float:
    """The gap below which there is nothing to select, in this measure."""
    return FLOORS.get(metric, _FLOOR)


@dataclass(frozen=True)
class Rival:
    """One way to choose chunks in one task.

    ``value``: the task's quality, a mean over ``draws`` with standard deviation ``std`` (0 for one). ``kept``: fraction
    of the complete chunks, over the layers with a router, and ``bytes`` of key and value of one sequence's.
    ``trained``: whether the supernet knows such routes.
    """

    name: str
    label: str
    value: float
    std: float
    draws: int
    kept: float
    bytes: float
    trained: bool


@dataclass(frozen=True)
class InTask:
    """The comparison in one task, in its own quality ``metric``; ``rivals`` in the order of the registry.

    ``share`` is null without hindsight or with one sequence.
    """

    task: str
    metric: str
    learned: Rival
    rivals: tuple[Rival, ...]
    share: Share | None


@dataclass(frozen=True)
class Comparison:
    """The point ``of`` of a front beside its controls."""

    of: str
    tasks: tuple[InTask, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"of": self.of, "tasks": {item.task: _plain(item) for item in self.tasks}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Comparison:
        """The inverse of ``to_dict``, also after JSON."""
        return cls(plain["of"], tuple(_in_task(task, item) for task, item in plain["tasks"].items()))


def _plain(item: InTask) -> dict[str, Any]:
    share = None if item.share is None else vars(item.share).copy()
    rivals = {rival.name: _plain_rival(rival) for rival in item.rivals}
    return {"metric": item.metric, "learned": _plain_rival(item.learned), "controls": rivals, "selection_share": share}


def _plain_rival(rival: Rival) -> dict[str, Any]:
    return {name: value for name, value in vars(rival).items() if name != "name"}


def _in_task(task: str, plain: Mapping[str, Any]) -> InTask:
    share = plain["selection_share"]
    return InTask(
        task,
        plain["metric"],
        Rival(LEARNED, **plain["learned"]),
        tuple(Rival(name, **rival) for name, rival in plain["controls"].items()),
        None if share is None else Share(**share),
    )


def spread_out(count: int, most: int, must: int | None = None) -> list[int]:
    """At most ``most`` of ``count`` places, evenly with both ends; ``must`` replaces the nearest one that is no end."""
    places = list(range(count))
    if count > most:
        places = sorted({i * (count - 1) // max(most - 1, 1) for i in range(most)})
        if must is not None and must not in places:
            inner = places[1:-1] or places
            places.remove(min(inner, key=lambda place: abs(place - must)))
            places = sorted([*places, must])
    return places


def chosen_points(costs: Sequence[float], knee: int | None, most: int, hindsight: int) -> dict[int, bool]:
    """Which of a front's points, by cost, are compared: place → whether with hindsight.

    Of those that keep anything the two ends, the knee and others between them, at most ``most``.
    """
    routed = [i for i, cost in enumerate(costs) if cost > 0]
    must = routed.index(knee) if knee in routed else None
    places = [routed[i] for i in spread_out(len(routed), most, must)]
    seen = [places[i] for i in spread_out(len(places), hindsight, places.index(knee) if knee in places else None)]
    return {place: place in seen for place in places}
