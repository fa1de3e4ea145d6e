"""What a front has to beat: policies that need no search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from natsl.search.front import Kind
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import SearchSpace

_DEPTH_MEANS = (0.1, 0.25)  # mean budgets of the schedules that rise or fall with depth


@dataclass(frozen=True)
class Named:
    """A baseline before it is scored."""

    name: str
    kind: Kind
    policy: RoutingPolicy


def baselines(kinds: Sequence[Op], chunk_size: int, budgets: Sequence[float], space: SearchSpace) -> list[Named]:
    """Baselines that need no front: extremes, uniform budgets, schedules over depth, single softmax layers.

    Learned budgets obey the cap of the space and have its mix temperature nearest to 1. Of several that are the same
    policy, as happens with one routed layer, the first is kept.
    """
    places = [i for i, kind in enumerate(kinds) if kind is Op.routed]
    found: dict[str, Named] = {}

    def add(name: str, kind: Kind, layers: Mapping[int, LayerPolicy]) -> None:
        chosen = tuple(layers[i] if i in layers else LayerPolicy(item) for i, item in enumerate(kinds))
        policy = RoutingPolicy(chosen, chunk_size)
        found.setdefault(policy.digest(), Named(name, kind, policy))

    def softmax(selected: Sequence[int]) -> dict[int, LayerPolicy]:
        return {i: LayerPolicy(Op.softmax if i in selected else Op.delta) for i in places}

    routed = LayerPolicy(budget=0.0, cap=space.cap, burst=space.burst, mix_temperature=space.neutral_mix)

    def budget(values: Sequence[float]) -> dict[int, LayerPolicy]:
        return {i: replace(routed, budget=round(b, 4)) for i, b in zip(places, values, strict=True)}

    add("all-softmax", Kind.extreme, softmax(places))
    add("all-delta", Kind.extreme, softmax([]))
    n = len(places)
    for value in budgets:
        add(f"uniform-{value:g}", Kind.uniform, budget([value] * n))
    for i in places:
        add(f"only-layer-{i}", Kind.single, softmax([i]))
    add("every-second-softmax", Kind.depth, softmax(places[1::2]))
    add("first-half-softmax", Kind.depth, softmax(places[: (n + 1) // 2]))
    add("last-half-softmax", Kind.depth, softmax(places[n // 2 :]))
    for mean in _DEPTH_MEANS:
        rising = [2 * mean * (i + 0.5) / n for i in range(n)]
        add(f"rising-{mean:g}", Kind.depth, budget(rising))
        add(f"falling-{mean:g}", Kind.depth, budget(rising[::-1]))
    return list(found.values())
