"""Giving a total budget to the layers that make the most of it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from natsl.search.controls.static import mixture
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy


@dataclass(frozen=True)
class Measured:
    """What a policy is worth on the search split: ``quality``, smaller is better, and the fraction ``kept`` there."""

    quality: float
    kept: float


Measure: TypeAlias = Callable[[RoutingPolicy], Measured]


def static_quality(family: Sequence[Measured], kept: float) -> float:
    """The quality of static heads, in ascending order of what they keep, mixed so as to keep this fraction.

    NaN without any.
    """
    if not family:
        return math.nan
    i, j, weight = mixture([item.kept for item in family], kept)
    return (1 - weight) * family[i].quality + weight * family[j].quality


def layers_policy(kinds: Sequence[Op], chunk_size: int, budgets: Mapping[int, float]) -> RoutingPolicy:
    """The policy with these budgets in some routed layers, by number; the others are delta."""

    def layer(i: int, kind: Op) -> LayerPolicy:
        budget = budgets.get(i, 0.0)
        if kind is not Op.routed:
            return LayerPolicy(kind)
        if budget in (0, 1):
            return LayerPolicy(Op.softmax if budget else Op.delta)
        return LayerPolicy(budget=budget)

    return RoutingPolicy(tuple(layer(i, kind) for i, kind in enumerate(kinds)), chunk_size)


def allocate(
    kinds: Sequence[Op], chunk_size: int, budget: float, measure: Measure, family: Sequence[Measured]
) -> RoutingPolicy:
    """The total of ``budget`` in each of n routed layers, given to the best k of them: min(1, budget · n / k) each.

    Layers are ordered by how good each is with all of it, the others delta. Of k = 1..n the one that is furthest below
    static heads (``family``, measured) at the fraction that it keeps itself, which is rarely the budget.
    """
    routed = [i for i, kind in enumerate(kinds) if kind is Op.routed]

    def spread(layers: Sequence[int]) -> RoutingPolicy:
        return layers_policy(kinds, chunk_size, dict.fromkeys(layers, min(1.0, budget * (len(routed) / len(layers)))))

    def gain(policy: RoutingPolicy) -> float:
        item = measure(policy)
        value = static_quality(family, item.kept) - item.quality
        return value if math.isfinite(value) else -math.inf

    order = sorted(routed, key=lambda i: measure(spread([i])).quality)
    return max((spread(order[: k + 1]) for k in range(len(order))), key=gain)
