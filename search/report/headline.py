"""What a search found, in a few sentences."""

from __future__ import annotations

from natsl.search.controls.comparison import Comparison
from natsl.search.front import Baseline, FamilyFront, Front, Kind, KneeChoice, Point, amount
from natsl.search.objective import OBJECTIVES
from natsl.search.pareto import Scale
from natsl.search.report.controls import share_line
from natsl.search.report.plane import show

_OUTSIDE = 0.1  # so far from the ends of the scale, in its widths, a value is told


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
    against = family_line(front)
    if against is not None:
        lines.append(against)
    scale = scale_line(front)
    if scale is not None:
        lines.append((scale, False))
    verdicts = [front.beats_random(point) for point in front.points]
    compared = [verdict for verdict in verdicts if verdict is not None]
    if compared:
        wins = sum(compared)
        text = f"Points at which learned routing beats random routing: {wins} of the {len(compared)} compared."
        lines.append((text, wins * 2 > len(compared)))
    comparison = front.comparison(knee.id)
    share = None if comparison is None else share_line(comparison)
    if share is not None:
        lines.insert(1, share)
    oracle = None if comparison is None else _oracle_line(comparison)
    if oracle is not None:
        lines.append((oracle, None))
    free, whole = sum(not point.dominated_by for point in front.points), len(front.points)
    text = "Points that no baseline dominates on the test split"
    text += ", mixtures of two of a family included" if front.families else ""
    lines.append((f"{text}: {free} of {whole}.", free * 2 > whole))
    if front.knee_choice is not None:
        lines.append((_knee_line(front.knee_choice), None))
    longest = _length_line(front, knee.id)
    return lines if longest is None else [*lines, (longest, None)]


def family_line(front: Front) -> tuple[str, bool | None] | None:
    """The front against the best family of baselines, as a sentence, and whether that is good news."""
    best = front.best_family
    if best is None or front.hypervolume_test is None:
        return None
    text = f"Hypervolume on the test split: front {front.hypervolume_test:.4f}, best sweep ({best.name}, {best.label}) "
    text += f"{best.hypervolume_test:.4f}: the front is "
    if best.is_beaten is None:
        return f"{text}{'better' if best.gain > 0 else 'not better'} ({gain(best)}).", None
    if best.is_beaten:
        return f"{text}better ({gain(best)}, one standard error).", True
    worse = best.gain_error is not None and best.gain < -best.gain_error
    verdict = "worse" if worse else "not better by more than one standard error"
    return f"{text}{verdict} ({gain(best)}).", False


def scale_line(front: Front) -> str | None:
    """Where policies on the test split are better than the scale of hypervolumes, which is of the search split, allows.

    It is narrow where the two references are nearly alike there, as after too little training.
    """
    known = {item.name: item.search_values for item in front.baselines}
    softmax, delta = known.get("all-softmax"), known.get("all-delta")
    if softmax is None or delta is None:
        return None
    best = front.best_family
    policies: list[Point | Baseline] = [*front.points, *(best.members if best is not None else ())]
    scaled = Scale.between(front.objectives, softmax, delta).apply([item.values for item in policies])
    parts = []
    for name, values in zip(front.objectives, scaled.T, strict=True):
        beyond = int((values < -_OUTSIDE).sum())
        if beyond:
            parts.append(
                f"{beyond} of {len(policies)} by up to {-values.min():.3g} widths in {OBJECTIVES[name].label}, where "
                f"all-softmax has {show(name, softmax[name])} and all-delta {show(name, delta[name])}"
            )
    if not parts:
        return None
    text = "; ".join(parts)
    return (
        f"The scale of hypervolumes is that of the search split; on the test split policies are better than it: {text}."
    )


def gain(family: FamilyFront) -> str:
    """Front − family with its standard error."""
    text = f"{family.gain:+.4f}".replace("-", "−")
    return text if family.gain_error is None else f"{text} ± {family.gain_error:.4f}"


def _oracle_line(comparison: Comparison) -> str | None:
    """Where the chunks with the answers are cheaper and better than what the router keeps."""
    found = []
    for item in comparison.tasks:
        oracle = next((rival for rival in item.rivals if rival.name == "oracle"), None)
        if oracle is not None and oracle.kept < item.learned.kept and oracle.value < item.learned.value:
            ours, theirs = (
                f"{show(item.metric, rival.value)} with {show('kept_fraction', rival.kept)} of the chunks"
                for rival in (item.learned, oracle)
            )
            found.append(f"{theirs} instead of {ours} on {item.task}")
    if not found:
        return None
    return f"At {comparison.of} the chunks that hold the answers would be cheaper and better: {'; '.join(found)}."


def _length_line(front: Front, name: str) -> str | None:
    """The point at the greatest length at which it was measured, beside all-softmax."""
    lengths = front.lengths
    measured = [item for item in lengths.measured if name in item.measured] if lengths is not None else []
    if lengths is None or not measured or measured[-1].tokens == lengths.searched_at:
        return None
    of, softmax = measured[-1].measured[name], measured[-1].measured.get("all-softmax", {})
    quality = front.quality
    text = f"At {measured[-1].tokens:,} tokens {name} keeps {show('kept_fraction', of['kept_fraction'])}: "
    text += f"{OBJECTIVES[quality].label} {show(quality, of.get(quality))}"
    return f"{text}, all-softmax {show(quality, softmax.get(quality))}."


def _knee_line(choice: KneeChoice) -> str:
    if choice.best == choice.point:
        return "The knee, chosen on the search split, has the least sum of scaled objectives on the test split too."
    cost = choice.sum - choice.best_sum
    return (
        f"Choosing the knee on the search split costs {cost:.4f}: on the test split its sum of scaled objectives is "
        f"{choice.sum:.4f}, that of {choice.best} {choice.best_sum:.4f}, the least."
    )
