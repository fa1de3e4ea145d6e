"""Pictures of an ablation: the selection share of every variant, and one variant beside its controls."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from natsl.search.ablation.record import Row, Spread, anchors, deviation, mean, mean_share, rows
from natsl.search.controls.comparison import LEARNED
from natsl.search.objective import BYTES, OBJECTIVES
from natsl.search.report.png import COLOURS, figure_png, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {Spread.layers: "in the best layers", Spread.uniform: "in every routed layer"}
_SHAPES = "osD^vPX*<>"
_COLOURS = [COLOURS[name] for name in ("front", "random", "depth", *(f"family{i}" for i in range(6)), "extreme")]

_DASHED = len(_COLOURS)  # from this number on lines are dashed, in the same colours


def share_png(results: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> bytes:
    """A PNG: selection share against budget, a line per variant, a panel per task and way to spread the budget.

    Means over seeds; bars are the standard deviation over seeds, of one seed the error over sequences.
    """
    own = [row for row in rows(results) if row.length == 1]
    tasks = list(dict.fromkeys(row.task for row in own))
    widest = max((row.budget for row in own), default=1.0)
    figure, axes = new_figure(max(len(tasks), 1), len(Spread))
    for place, (task, spread) in zip(axes, [(task, spread) for task in tasks for spread in Spread], strict=False):
        for i, name in enumerate(variants):
            line = [row for row in own if (row.task, row.spread, row.variant) == (task, spread, name)]
            shares = [(budget, mean_share(of_budget)) for budget, of_budget in _by_budget(line)]
            known = [(budget, *share) for budget, share in shares if share is not None]
            _line(place, name, i, [(budget, value, error or 0.0) for budget, value, error in known])
        if all(row.share is None for row in own if (row.task, row.spread) == (task, spread)):
            place.text(0.5, 0.55, "nothing to select", transform=place.transAxes, ha="center")
        place.axhline(0, color=COLOURS["knee"], linewidth=0.8)
        place.set_xlim(0, 1.08 * widest)
        _finish(place, f"{task}, budget {_LABELS[spread]}", "budget", "selection share")
    return figure_png(figure, axes[0], "What the routers select: 0 only heads, 1 as in hindsight (test split)")


def loss_png(results: Sequence[Mapping[str, Any]], variant: str) -> bytes:
    """A PNG: quality against bytes stored of one variant's router and of every control, a panel per task.

    Means over seeds with the budget in the best layers; bars of the router are the standard deviation over seeds.
    """
    own = [row for row in rows(results) if row.length == 1 and row.variant == variant]
    ends = [end for end in anchors(results) if end.length == 1 and end.variant == variant]
    tasks = list(dict.fromkeys(row.task for row in own))
    names = list(dict.fromkeys(name for row in own for name in row.quality))
    figure, axes = new_figure(1, max(len(tasks), 1))
    for place, task in zip(axes, tasks, strict=False):
        best, uniform = ([row for row in own if (row.task, row.spread) == (task, spread)] for spread in Spread)
        metric = next(row.metric for row in own if row.task == task)
        for i, name in enumerate(names):
            _line(place, name.replace("_", " "), i + (i >= _DASHED), _qualities(best, name))
        _line(place, "learned, uniform", _DASHED, _qualities(uniform, LEARNED))  # as learned, but dashed
        for name, style in (("softmax", ":"), ("delta", "--")):
            value = mean(getattr(end, name) for end in ends if end.task == task)
            if value is not None:
                place.axhline(value, color=COLOURS["knee"], linewidth=1.0, linestyle=style, label=f"all-{name}")
        place.xaxis.set_major_formatter(lambda value, _: BYTES.tick(value))
        _finish(place, task, "bytes of keys and values kept, per sequence", OBJECTIVES[metric].axis_label)
    return figure_png(figure, axes[0], f"{variant}: the budget in the best layers, test split")


def kept_png(sample: Mapping[str, Any], title: str) -> bytes:
    """A PNG of a sample of text, a chunk in each row, with a mark for every head that keeps it."""
    rows, heads = sample["text"], sample["heads"]
    figure, (place,) = new_figure(1, 1)
    across = len(heads) + 1 + 0.36 * max(map(len, rows), default=0)  # in columns of heads
    figure.set_size_inches(max(7.0, 0.17 * across + 1.0), 0.19 * len(rows) + 1.2)
    for n, (text, kept) in enumerate(zip(rows, sample["kept"], strict=True)):
        if kept:
            shade = 0.12 + 0.38 * len(kept) / len(heads)
            place.axhspan(n - 0.5, n + 0.5, color=COLOURS["front"], alpha=shade, linewidth=0)
        printed = "".join(c if c.isascii() and c.isprintable() else "↵" if c == "\n" else "·" for c in text)
        place.text(len(heads) + 0.5, n, printed, family="monospace", fontsize=7, va="center")
        marks = [heads.index(name) for name in kept]
        place.plot(marks, [n] * len(marks), "s", color=COLOURS["front"], markersize=5)
    place.set_xlim(-1, max(across, 6.0 / 0.17))
    place.set_ylim(len(rows) - 0.5, -0.5)
    place.set_xticks(range(len(heads)), heads, rotation=90, fontsize=7)
    place.xaxis.tick_top()
    place.set_ylabel("chunk")
    place.set_xlabel("layer.head that keeps the chunk, and its text", fontsize=9)
    place.spines[["top", "right", "bottom"]].set_visible(False)
    return figure_png(figure, place, title)


def _by_budget(own: Sequence[Row]) -> list[tuple[float, list[Row]]]:
    return [(budget, [row for row in own if row.budget == budget]) for budget in sorted({row.budget for row in own})]


def _qualities(own: Sequence[Row], name: str) -> list[tuple[float, float, float]]:
    """(bytes, quality, bar) of the router or a control at every budget, ascending."""
    points = []
    for _, of_budget in _by_budget(own):
        known = [row for row in of_budget if name in row.quality]
        if known:
            values = [row.quality[name] for row in known]
            size = statistics.fmean(row.bytes[name] for row in known)
            bar = deviation(values) if name == LEARNED else None
            points.append((size, statistics.fmean(values), bar or 0.0))
    return sorted(points)


def _line(place: Axes, label: str, number: int, points: Sequence[tuple[float, float, float]]) -> None:
    """One series; without points it is in the legend only, so that all panels have the same series."""
    place.errorbar(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        yerr=[error for _, _, error in points] if any(error for _, _, error in points) else None,
        color=_COLOURS[number % len(_COLOURS)],
        marker=_SHAPES[number % len(_SHAPES)],
        linestyle="-" if number < _DASHED else "--",
        linewidth=1.4,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1.1,
        label=label,
    )


def _finish(place: Axes, title: str, x: str, y: str) -> None:
    place.set_title(title, fontsize=10)
    place.set_xlabel(x)
    place.set_ylabel(y)
    place.grid(alpha=0.25, linewidth=0.7)
    place.spines[["top", "right"]].set_visible(False)
