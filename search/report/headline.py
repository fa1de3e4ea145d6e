"""What a search found, in a few sentences."""

from __future__ import annotations

from natsl.search.front import Front, Kind, amount
from natsl.search.objective import OBJECTIVES
from natsl.search.report.controls import share_line
from natsl.search.report.plane import show


def headline(front: Front) -> list[tuple[str, bool | None]]:
    """What the search found, as sentences; the flag says whether it is good news (None: neutral)."""
    lines: list[tuple[str, bool | None]] = []
    if not front.points:
        return [("No trial gave a result that keeps the constraints: there is no front and nothing to export.", False)]
    quality, cost = front.quality, front.cost
    label = OBJECTIVES[quality].label
    knee = front.point(front.knee) if front.knee else front.points[0]
    ends = {item.name: item for item in front.baselines if item.kind is Kind.extreme}
    text = f"At the knee ({knee.id}): {OBJECTIVES[cost].label} {show(cost, amount(knee, cost))}, "
    text += f"{label} {show(quality, amount(knee, quality))}"
    control = front.random_of(knee.id)
    others = [f"random routing at the same fractions {show(quality, amount(control, quality))}"] if control else []
    others += [f"{name} {show(quality, amount(item, quality))}" for name, item in ends.items()]
    lines.append((text + (f" ({', '.join(others)})." if others else "."), None))
    verdicts = [front.beats_random(point) for point in front.points]
    compared = [verdict for verdict in verdicts if verdict is not None]
    if compared:
        wins = sum(compared)
        text = f"Points at which learned routing beats random routing: {wins} of {len(compared)}."
        lines.append((text, wins * 2 > len(compared)))
    comparison = front.comparison(knee.id)
    share = None if comparison is None else share_line(comparison)
    if share is not None:
        lines.insert(1, share)
    free, whole = sum(not point.dominated_by for point in front.points), len(front.points)
    lines.append((f"Points that no baseline dominates on the test split: {free} of {whole}.", free * 2 > whole))
    return lines
