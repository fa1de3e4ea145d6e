"""What the page and the picture share: the planes in which a front is drawn, their axes, and the series in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from natsl.search.front import Baseline, Front, Kind, Point, amount
from natsl.search.objective import OBJECTIVES, QUALITY
from natsl.search.pareto import non_dominated
from natsl.search.report.chart import Axis, Mark, Marker, Series

_KINDS = {
    Kind.depth: ("schedule over depth", Marker.square),
    Kind.extreme: ("all-softmax, all-delta", Marker.square),
}
FAMILY_STYLES = 6  # classes of the style sheet, taken in turn
_NAMES = 2  # that a cell of a table holds
_STEPS = 16  # of a line between two members of a family
_NEAR, _BEYOND = 0.01, 1.15  # an axis ends so far beyond where the front is so near its best


def show(name: str, value: float | None) -> str:
    """A measure as text, such as ``3.1 %`` or ``1.23 MB``."""
    return OBJECTIVES[name].show(value)


def first_names(names: Sequence[str]) -> str:
    """The first two names and how many more there are, such as ``uniform, depth, +17``; a dash for none."""
    return ", ".join([*names[:_NAMES], *([f"+{len(names) - _NAMES}"] if len(names) > _NAMES else [])]) or "–"


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


@dataclass(frozen=True)
class Picture:
    """A plane with what is drawn in it; ``note`` says what lies beyond the end of the horizontal axis."""

    series: list[Series]
    x: Axis
    y: Axis
    note: str


def picture(front: Front, across: str, up: str) -> Picture:
    """The front, its knee, families, baselines of no family and random routing in one plane, from the test split.

    The horizontal axis ends soon after the cost at which the front is as good as it gets.
    """
    drawn, end = _series(front, across, up), _end(front, across, up)
    x = replace(axis(across), end=end)
    if end is None:
        return Picture(drawn, x, axis(up), "")
    points = _beyond([item for item in drawn if item.style == "front"], end)
    others = _beyond([item for item in drawn if item.style not in ("front", "knee")], end)
    parts = [f"{others} baseline{'s' * (others > 1)}"] if others else []
    parts += [f"{points} point{'s' * (points > 1)} of the front"] if points else []
    note = f"{' and '.join(parts)} {'lie' if points + others > 1 else 'lies'} outside" if parts else ""
    softmax = next((item for item in front.baselines if item.name == "all-softmax"), None)
    cost = None if softmax is None else amount(softmax, across)
    if cost is not None and cost > end:
        note += f", all-softmax at {show(across, cost)}"
    return Picture([_cut(item, end) for item in drawn], x, axis(up), note)


def _beyond(series: Sequence[Series], end: float) -> int:
    """How many policies lie beyond the end, each counted once."""
    return len({mark.text for item in series for mark in item.marks if mark.x > end and not mark.hidden})


def _end(front: Front, across: str, up: str) -> float | None:
    """The end of the axis of a cost under a quality (None: everything is shown)."""
    quality = up if up in front.objectives else front.quality
    if across in QUALITY or up not in QUALITY:
        return None
    pairs = [(amount(point, across), amount(point, quality), point.id) for point in front.points]
    known = [(cost, value, name) for cost, value, name in pairs if cost is not None and value is not None]
    if len(known) < 2:
        return None
    values = [value for _, value, _ in known]
    enough = min(values) + _NEAR * (max(values) - min(values))
    near = min(cost for cost, value, _ in known if value <= enough)
    knee = max((cost for cost, _, name in known if name == front.knee), default=0.0)
    return _BEYOND * max(near, knee) or None


def _cut(series: Series, end: float) -> Series:
    """The series up to the end of an axis; a line goes on to there."""
    inside = [mark for mark in series.marks if mark.x <= end]
    beyond = series.marks[len(inside) :]
    last = next((mark for mark in reversed(inside) if not mark.off_line), None)
    following = next((mark for mark in beyond if not mark.off_line), None)
    if series.line and last is not None and following is not None:
        y = last.y if series.step else _between(last, following, (end - last.x) / (following.x - last.x)).y
        inside.append(Mark(end, y, hidden=True))
    return replace(series, marks=tuple(inside))


def _between(first: Mark, second: Mark, share: float) -> Mark:
    """What a mixture of requests gives, as a place that only a line goes to."""
    x, y = (a + share * (b - a) for a, b in ((first.x, second.x), (first.y, second.y)))
    return Mark(x, y, hidden=True)


def _mixtures(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The marks with mixtures of neighbours between them, which a root axis does not show as a straight line."""
    found = list(marks[:1])
    for first, second in pairwise(marks):
        found += [*(_between(first, second, (i / _STEPS) ** 2) for i in range(1, _STEPS)), second]
    return tuple(found)


def _staircase(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The marks, of which those that another one dominates are off the line, which only falls."""
    places = [{"x": mark.x, "y": mark.y} for mark in marks]
    steps = [places[i] for i in non_dominated(places, ("x", "y"))]
    return tuple(replace(mark, off_line=place not in steps) for mark, place in zip(marks, places, strict=True))


def _series(front: Front, across: str, up: str) -> list[Series]:
    def marks(items: Sequence[Point | Baseline], link: bool = False) -> tuple[Mark, ...]:
        found = []
        for item in items:
            a, b = amount(item, across), amount(item, up)
            if a is not None and b is not None:
                spread = item.std.get(up, 0.0) if isinstance(item, Baseline) else 0.0
                text = f"{item.name}: {show(across, a)}, {show(up, b)}" + (f" ± {show(up, spread)}" if spread else "")
                text += f"\n{item.policy.describe()}" if len(item.policy.layers) <= 24 else ""
                found.append(Mark(a, b, text, spread, f"#{item.id}" if isinstance(item, Point) and link else ""))
        return tuple(sorted(found, key=lambda mark: (mark.x, mark.y)))

    def of(kind: Kind) -> list[Baseline]:
        return [item for item in front.baselines if item.kind is kind]

    line = set(front.objectives) <= {across, up}  # it means something only where both are objectives
    drawn = []
    for i, family in enumerate(front.families):
        members = marks(family.members)
        curve = _mixtures(members) if line else members
        drawn.append(Series(family.label, f"family{i % FAMILY_STYLES}", curve, line=line, size=2.4))
    drawn += [Series(label, kind.value, marks(of(kind)), shape, size=4) for kind, (label, shape) in _KINDS.items()]
    if "uniform" not in {family.name for family in front.families}:
        drawn.append(Series("one budget in every layer", f"family{FAMILY_STYLES - 1}", marks(of(Kind.uniform)), size=4))
    points = {point.id for point in front.points}
    random = [item for item in of(Kind.random) if item.of in points]
    drawn.append(Series("random routing, equal kept fractions", "random", marks(random), Marker.diamond, size=3.5))
    learned, label = marks(front.points, True), "front (learned)"
    if line:  # the points were chosen on the search split, and are drawn as on the test split
        learned = _staircase(learned)
        label += "; off the line: dominated by others of it" if any(mark.off_line for mark in learned) else ""
    drawn.append(Series(label, "front", learned, line=line, step=True))
    knee = [point for point in front.points if point.id == front.knee]
    return [*drawn, Series("knee", "knee", marks(knee), Marker.ring)]
