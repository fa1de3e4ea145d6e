"""Whole heads that keep everything while the others keep nothing: what a router that only chooses heads amounts to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

Head = tuple[int, int]  # layer, routing head

CANDIDATES = 6  # heads tried in a round: the best ones of the round before
EXTRA = 40  # evaluations beyond those of every head by itself


@dataclass(frozen=True)
class Shape:
    """What whole heads are chosen from: kinds of the layers, routing heads of each, and how branches are mixed."""

    kinds: tuple[Op, ...]
    heads: int
    chunk_size: int
    mix_temperature: float = 1.0

    def policy(self, chosen: Collection[Head]) -> RoutingPolicy:
        """The policy in which the chosen heads keep every chunk and the others none."""
        layers = []
        for i, kind in enumerate(self.kinds):
            budget = tuple(float((i, head) in chosen) for head in range(self.heads))
            if kind is not Op.routed:
                layers.append(LayerPolicy(kind))
            elif not any(budget):
                layers.append(LayerPolicy(Op.delta))
            elif all(budget):
                layers.append(LayerPolicy(Op.softmax, mix_temperature=self.mix_temperature))
            else:
                layers.append(LayerPolicy(budget=budget, mix_temperature=self.mix_temperature))
        return RoutingPolicy(tuple(layers), self.chunk_size)


def greedy_heads(
    shape: Shape,
    judge: Callable[[RoutingPolicy], tuple[float, ...]],
    ahead: Callable[[list[RoutingPolicy]], None] = lambda policies: None,
) -> list[RoutingPolicy]:
    """Policies with one chosen head, two, …: each adds the head that ``judge`` finds best, smaller being better.

    ``ahead`` is given those that it will be asked about next.

    All heads are tried in the first round, then only the best ones of the round before, so that the first round and
    ``EXTRA`` evaluations suffice; few heads are all tried in all rounds. The last policy is never all-softmax.
    """
    open_heads = [(i, head) for i, kind in enumerate(shape.kinds) if kind is Op.routed for head in range(shape.heads)]
    chosen: list[Head] = []
    path: list[RoutingPolicy] = []
    left = len(open_heads) + EXTRA
    while len(open_heads) > 1 and left > 0:
        tried = open_heads[: CANDIDATES if chosen else None][:left]
        left -= len(tried)
        ahead([shape.policy([*chosen, head]) for head in tried])
        order = sorted(tried, key=lambda head: judge(shape.policy([*chosen, head])))
        chosen.append(order[0])
        path.append(shape.policy(chosen))
        open_heads = [*order[1:], *open_heads[len(tried) :]]
    return path


def most_evaluations(heads: int) -> int:
    """How many policies ``greedy_heads`` evaluates at most, of so many heads."""
    return min(max(heads * (heads + 1) // 2 - 1, 0), heads + EXTRA)


def mixture(costs: Sequence[float], cost: float) -> tuple[int, int, float]:
    """Neighbours i, j of a cost in ascending ``costs`` and the weight of j: requests mixed so cost as much.

    Past an end it is that end.
    """
    if cost <= costs[0]:
        return 0, 0, 0.0
    for j in range(1, len(costs)):
        if cost <= costs[j]:
            return j - 1, j, (cost - costs[j - 1]) / (costs[j] - costs[j - 1])
    return len(costs) - 1, len(costs) - 1, 0.0
