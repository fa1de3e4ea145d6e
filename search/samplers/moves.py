"""Moves from points of the front: what near_knee and sweep propose from. Shapes: p points, d numbers."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial

from natsl.search.samplers.history import Array, history_of, span_of

Params = dict[str, Any]

# How often a change is: a mix of two points, one with some numbers of another, one number set anew, some numbers moved,
# two numbers moved against each other. How often a number set anew is 0. How far numbers move (powers of 10).
_KINDS = (0.2, 0.25, 0.25, 0.15, 0.15)
_NOTHING = 0.2
_STEP = (-2.3, -0.7)


def front_of(study: Study) -> tuple[list[FrozenTrial], Array]:
    """Trials on the front and their objectives [points, objectives], scaled by the range of all trials."""
    history = history_of(study)
    front = history.front
    if not len(front):
        return [], np.empty((0, len(study.directions)))
    values = history.values[history.valid]
    scaled = (history.values[front] - values.min(axis=0)) / span_of(values)
    return [history.trials[i] for i in front.tolist()], scaled


def neighbours(scaled: Array, random: Random, among: set[int] | None = None) -> tuple[int, int] | None:
    """Two points that are next to each other in some objective, far apart ones more often; None if all are equal.

    ``among``: at least one of the two is one of these.
    """
    order = np.argsort(scaled[:, random.randrange(scaled.shape[1])], kind="stable").tolist()
    pairs = [(i, j) for i, j in pairwise(order) if among is None or i in among or j in among]
    gaps = [float(np.abs(scaled[i] - scaled[j]).sum()) for i, j in pairs]
    return random.choices(pairs, gaps)[0] if sum(gaps) > 0 else None


def between(first: FrozenTrial, second: FrozenTrial, share: float) -> Params | None:
    """Parameters on the line from one trial to another; None unless they have the same and differ in numbers."""
    if first.params.keys() != second.params.keys():
        return None
    params = {
        name: a + share * (second.params[name] - a) if isinstance(first.distributions[name], FloatDistribution) else a
        for name, a in first.params.items()
    }
    return params if params != first.params else None


def shift(params: Params, name: str, by: float, distribution: FloatDistribution) -> None:
    """Move one number by a share of its range, no further than its bounds."""
    moved = params[name] + by * (distribution.high - distribution.low)
    params[name] = min(max(moved, distribution.low), distribution.high)


def change(points: Array, chances: Array, count: int, random: np.random.Generator) -> Array:
    """Positions [count, d] beside and between points [p, d] of [0, 1], which are chosen with these chances [p]."""
    size = points.shape[1]
    single, pair = (count, 1), (count, size)
    first = points[random.choice(len(points), count, p=chances)]
    second = points[random.integers(len(points), size=count)]
    one, other = (np.arange(size) == random.integers(size, size=single) for _ in range(2))
    step = 10 ** random.uniform(*_STEP, single)
    anew = np.where(random.random(single) < _NOTHING, 0.0, random.random(single))
    some = one | (random.random(pair) < 0.5 * random.random(single))
    kinds = np.stack(
        (
            first + random.random(single) * (second - first),
            np.where(random.random(pair) < random.random(single), second, first),
            np.where(one, anew, first),
            first + some * step * random.standard_normal(pair),
            first + step * random.standard_normal(single) * (one.astype(float) - other),
        )
    )
    chosen = random.choice(len(_KINDS), count, p=_KINDS)
    moved: Array = np.clip(kinds[chosen, np.arange(count)], 0.0, 1.0)
    return moved
