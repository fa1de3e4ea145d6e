"""What the page and the picture share: the planes in which a front is drawn, their axes, and the series in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from natsl.search.front import Baseline, Front, Kind, Point, amount
from natsl.search.objective import OBJECTIVES, QUALITY
from natsl.search.report.chart import Axis, Mark, Marker, Series

_KINDS = {
    Kind.uniform: ("same budget in every layer (learned router)", Marker.dot),
    Kind.depth: ("schedule over depth", Marker.square),
    Kind.single: ("one layer all-softmax, others delta", Marker.diamond),
    Kind.static: ("whole heads, chosen on the search split", Marker.square),
    Kind.extreme: ("all-softmax, all-delta", Marker.square),
}


def show(name: str, value: float | None) -> str:
    """A measure as text, such as ``3.1 %`` or ``1.23 MB``."""
    return OBJECTIVES[name].show(value)


def axis(name: str) -> Axis:
    """The axis on which a measure is drawn."""
    item = OBJECTIVES[name]
    return Axis(item.axis_label, item.format.tick, root=item.root, include=(0.0,) if item.zero else ())


def planes(front: Front) -> list[tuple[str, str]]:
    """Pairs of measures (across, up) in which the front is drawn: every pair of objectives, costs across."""
    names = sorted(front.objectives, key=lambda name: name in QUALITY)
    if len(names) == 1:
        return [(front.cost, names[0]) if names[0] in QUALITY else (names[0], front.quality)]
    return list(combinations(names, 2))


def series(front: Front, across: str, up: str) -> list[Series]:
    """The front, its knee, every kind of baseline and random routing in one plane, from the test split."""

    def marks(items: Sequence[Point | Baseline], link: bool = False) -> tuple[Mark, ...]:
        found = []
        for item in items:
            a, b = amount(item, across), amount(item, up)
            if a is not None and b is not None:
                name = item.id if isinstance(item, Point) else item.name
                spread = item.std.get(up, 0.0) if isinstance(item, Baseline) else 0.0
                text = f"{name}: {show(across, a)}, {show(up, b)}" + (f" ± {show(up, spread)}" if spread else "")
                text += f"\n{item.policy.describe()}" if len(item.policy.layers) <= 24 else ""
                found.append(Mark(a, b, text, spread, f"#{item.id}" if isinstance(item, Point) and link else ""))
        return tuple(sorted(found, key=lambda mark: (mark.x, mark.y)))

    of = {kind: [item for item in front.baselines if item.kind is kind] for kind in Kind}
    drawn = [
        Series(label, kind.value, marks(of[kind]), shape, line=kind is Kind.uniform, size=4)
        for kind, (label, shape) in _KINDS.items()
    ]
    drawn.append(
        Series("random routing, equal kept fractions", "random", marks(of[Kind.random]), Marker.diamond, size=3.5)
    )
    step = set(front.objectives) <= {across, up}  # a staircase means something only where both are objectives
    drawn.append(Series("front (learned)", "front", marks(front.points, True), line=step, step=True))
    knee = [point for point in front.points if point.id == front.knee]
    return [*drawn, Series("knee", "knee", marks(knee), Marker.ring)]
