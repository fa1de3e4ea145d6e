"""What a front is compared with as a whole: sweeps of one number, which anybody could make without a search.

A family is a function that lists policies, and an entry of ``FAMILIES``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from natsl.search.baseline import Named
from natsl.search.controls.comparison import spread_out
from natsl.search.front import Kind
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import Control, Granularity, SearchSpace

BUDGETS = (0.02, 0.025, 0.035, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25, 0.375, 0.5, 0.75, 1.0)
MOST = 45  # policies of a family, without its ends
_DECIMALS = 3  # of a threshold


@dataclass(frozen=True)
class Sweep:
    """What the families of a search are made of.

    ``budgets``: of uniform baselines, which that family has as well. ``static``: whole heads, chosen on the search
    split.
    """

    kinds: tuple[Op, ...]
    chunk_size: int
    heads: int
    space: SearchSpace
    budgets: tuple[float, ...] = ()
    static: tuple[Named, ...] = ()

    @property
    def places(self) -> list[int]:
        """The routed layers."""
        return [i for i, kind in enumerate(self.kinds) if kind is Op.routed]

    @property
    def levels(self) -> list[float]:
        """How much is kept, ascending: budgets, or with thresholds how far they are from the highest to the lowest."""
        if self.space.control is Control.budget:
            return list(BUDGETS)
        return [(i + 1) / len(BUDGETS) for i in range(len(BUDGETS))]

    def keep(self, name: str, shares: dict[int, float | Sequence[float]]) -> Named:
        """The policy with these levels in some layers, each one number or one for each head; the others keep nothing.

        It has the cap and the mix temperature of the space.
        """
        nothing, some = LayerPolicy(Op.delta), {i: self._layer(share) for i, share in shares.items()}
        layers = [some.get(i, nothing) if kind is Op.routed else LayerPolicy(kind) for i, kind in enumerate(self.kinds)]
        return Named(name, Kind.family, RoutingPolicy(tuple(layers), self.chunk_size))

    @property
    def ends(self) -> list[Named]:
        """All-delta and all-softmax, or what the space has in place of the latter under a cap."""
        most = "all-softmax" if self.space.cap is None else "uniform-1"
        ends = [self.keep("all-delta", {}), self.keep(most, dict.fromkeys(self.places, 1.0))]
        return [item for item in ends if self.allows(item.policy)]

    def _layer(self, share: float | Sequence[float]) -> LayerPolicy:
        values = (share,) * self.heads if isinstance(share, float) else tuple(share)
        space = self.space
        if not any(values):
            return LayerPolicy(Op.delta)
        if min(values) == 1 and space.cap is None:
            return LayerPolicy(Op.softmax, mix_temperature=space.neutral_mix)
        numbers = tuple(map(self._number, values))
        by_head = space.granularity is Granularity.head or len(set(values)) > 1
        number = numbers if by_head else numbers[0]
        by_budget = space.control is Control.budget
        return LayerPolicy(
            budget=number if by_budget else None,
            threshold=None if by_budget else number,
            cap=space.cap,
            burst=space.burst,
            mix_temperature=space.neutral_mix,
        )

    def _number(self, level: float) -> float:
        """A budget, or the threshold that stands for it."""
        if self.space.control is Control.budget:
            return level
        if level == 0 or (level == 1 and self.space.cap is None):
            return float("-inf") if level else float("inf")
        low, high = self.space.threshold_min, self.space.threshold_max
        return round(high - (high - low) * level, _DECIMALS)

    def allows(self, policy: RoutingPolicy) -> bool:
        """Whether the space has such layers: their ops, budgets within its limits, and its cap where any is kept."""
        layers = zip(policy.layers, self.kinds, strict=True)
        return all(self._allows(layer) for layer, kind in layers if kind is Op.routed)

    def _allows(self, layer: LayerPolicy) -> bool:
        space = self.space
        if layer.op not in space.ops or (layer.op is not Op.delta and layer.cap != space.cap):
            return False
        budgets = layer.budget if isinstance(layer.budget, tuple) else () if layer.budget is None else (layer.budget,)
        ends = {0.0} if Op.delta in space.ops else set()
        ends |= {1.0} if Op.softmax in space.ops and space.cap is None else set()
        return all(budget in ends or space.budget_min <= budget <= space.budget_max for budget in budgets)


@dataclass(frozen=True)
class Family:
    """Policies that are compared with a front as one: the best of them on the search split.

    ``members`` lists them; all-delta and all-softmax are added, what the space does not have is left out, and of more
    than ``MOST`` as many are taken, evenly.
    """

    name: str
    label: str
    members: Callable[[Sweep], list[Named]]


def _one_layer(sweep: Sweep) -> list[Named]:
    return [sweep.keep(f"layer-{i}-{level:.4g}", {i: level}) for i in sweep.places for level in sweep.levels]


def _one_head(sweep: Sweep) -> list[Named]:
    def only(head: int, level: float) -> list[float]:
        return [level if head == other else 0.0 for other in range(sweep.heads)]

    heads = [(i, head) for i in sweep.places for head in range(sweep.heads)]
    return [
        sweep.keep(f"head-{i}.{head}-{level:.4g}", {i: only(head, level)})
        for i, head in heads
        for level in sweep.levels
    ]


def _prefix(sweep: Sweep) -> list[Named]:
    places = sweep.places
    return [
        sweep.keep(f"first-{k}-{level:.4g}", dict.fromkeys(places[:k], level))
        for k in range(1, len(places) + 1)
        for level in sweep.levels
    ]


def _uniform(sweep: Sweep) -> list[Named]:
    more = sweep.budgets if sweep.space.control is Control.budget else ()
    levels = sorted({*sweep.levels, *more})
    return [sweep.keep(f"uniform-{level:.4g}", dict.fromkeys(sweep.places, level)) for level in levels]


def _static(sweep: Sweep) -> list[Named]:
    return list(sweep.static)


FAMILIES = {
    item.name: item
    for item in (
        Family("one-layer", "one routed layer, the others delta", _one_layer),
        Family("one-head", "one routing head, the others keep nothing", _one_head),
        Family("prefix", "one budget in the first layers, the others delta", _prefix),
        Family("uniform", "one budget in every layer", _uniform),
        Family("static", "whole heads, chosen on the search split", _static),
    )
}


@dataclass(frozen=True)
class Swept:
    """A family on the search split.

    ``members``: those that keep all constraints and that no other dominates, which is what goes to the test split.
    ``hypervolume`` on the search split.
    """

    family: Family
    members: tuple[Named, ...]
    hypervolume: float


def listed(sweep: Sweep) -> list[tuple[Family, list[Named]]]:
    """The families with their members, each policy once; without those that have nothing of their own."""
    ends = sweep.ends
    known = {item.policy for item in ends}
    found: list[tuple[Family, list[Named]]] = []
    for family in FAMILIES.values():
        members: dict[RoutingPolicy, Named] = {}
        for item in family.members(sweep):
            if item.policy not in known and sweep.allows(item.policy):
                members.setdefault(item.policy, item)
        taken = list(members.values())
        taken = [taken[i] for i in spread_out(len(taken), MOST)]
        policies = {item.policy for item in taken}
        if taken and all(policies != {item.policy for item in others[: -len(ends) or None]} for _, others in found):
            found.append((family, [*taken, *ends]))
    return found
