"""Small charts as inline SVG: axes, lines, marks with hover texts. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from html import escape

WIDTH, HEIGHT = 480.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 24.0, 12.0, 50.0
FRACTION_TICKS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


class Marker(Enum):
    """How a mark is drawn."""

    dot = "dot"
    ring = "ring"
    square = "square"
    diamond = "diamond"
    none = "none"


@dataclass(frozen=True)
class Mark:
    """One place in a chart; ``text`` shows on hover, ``error`` is half the length of a vertical bar.

    ``hidden``: only a line goes there. ``off_line``: no line does.
    """

    x: float
    y: float
    text: str = ""
    error: float = 0.0
    link: str = ""
    hidden: bool = False
    off_line: bool = False


@dataclass(frozen=True)
class Series:
    """Marks of one colour (a class of the style sheet), joined by a line if ``line`` (``step``: as a staircase)."""

    label: str
    style: str
    marks: tuple[Mark, ...]
    marker: Marker = Marker.dot
    line: bool = False
    step: bool = False
    size: float = 4.5


@dataclass(frozen=True)
class Axis:
    """One axis. ``root``: the square root of the value is what is linear, to spread small fractions.

    ``end``: the largest value (null: that of what is drawn).
    """

    label: str
    show: Callable[[float], str]
    root: bool = False
    include: tuple[float, ...] = ()
    end: float | None = None


@dataclass(frozen=True)
class _Scale:
    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...] = field(default=())

    def place(self, value: float) -> float:
        low, high = self._bend(self.low), self._bend(self.high)
        share = (self._bend(value) - low) / (high - low)
        return self.start + (self.end - self.start) * min(max(share, -0.02), 1.02)

    def _bend(self, value: float) -> float:
        return math.sqrt(max(value, 0.0)) if self.axis.root else value


def chart(name: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """An SVG of the series; ``name`` is read out for who cannot see it. Empty series leave empty axes."""
    xs = [mark.x for item in series for mark in item.marks]
    ys = [mark.y + sign * mark.error for item in series for mark in item.marks for sign in (-1, 1)]
    horizontal = _scale(x, xs, _LEFT, WIDTH - _RIGHT)
    vertical = _scale(y, ys, HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(name)}">',
        *_axes(horizontal, vertical),
        *(part for item in series for part in _draw(item, horizontal, vertical)),
        "</svg>",
    ]
    return "\n".join(parts)


def legend(series: Sequence[Series]) -> str:
    """The legend of a chart, to stand below it and wrap as the page does."""
    items = []
    for item in series:
        if item.marks:
            line = '<path class="line" d="M1 8H27"/>' if item.line else ""
            mark = _mark(replace(item, size=3.2 if item.marker is Marker.ring else 4.0), Mark(0, 0), 14, 8)
            picture = f'<svg viewBox="0 0 28 16" class="key {item.style}" aria-hidden="true">{line}{mark}</svg>'
            items.append(f"<li>{picture}{escape(item.label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def dumbbells(name: str, rows: Sequence[tuple[str, Mark, Mark, bool]], x: Axis) -> str:
    """Pairs of values, one row each: (label, ours, theirs, whether ours is better), lengths along ``x``."""
    step, top = 21.0, 8.0
    height = top + step * max(len(rows), 1) + _BOTTOM
    values = [mark.x + sign * mark.error for _, a, b, _ in rows for mark in (a, b) for sign in (-1, 1)]
    scale = _scale(x, values, _LEFT, WIDTH - _RIGHT)
    bottom = height - _BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(name)}">']
    for tick in scale.ticks:
        at = scale.place(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {top:g}V{bottom:g}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18:g}" text-anchor="middle">{escape(x.show(tick))}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle:g}" y="{height - 8:g}" text-anchor="middle">{escape(x.label)}</text>')
    for i, (label, ours, theirs, better) in enumerate(rows):
        at = top + step * (i + 0.5)
        a, b = scale.place(ours.x), scale.place(theirs.x)
        low, high = scale.place(theirs.x - theirs.error), scale.place(theirs.x + theirs.error)
        parts.append(f'<text x="{_LEFT - 10:g}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<path class="gap {"good" if better else "bad"}" d="M{a:.1f} {at:.1f}H{b:.1f}"/>')
        parts.append(f'<path class="random error" d="M{low:.1f} {at:.1f}H{high:.1f}"/>')
        for style, shape, mark, place in (("random", Marker.diamond, theirs, b), ("front", Marker.dot, ours, a)):
            parts.append(f'<g class="{style}">{_mark(Series("", style, (), shape), mark, place, at)}</g>')
    return "\n".join([*parts, "</svg>"])


def _scale(axis: Axis, values: Sequence[float], start: float, end: float) -> _Scale:
    known = [value for value in (*values, *axis.include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    high = high if axis.end is None else axis.end
    if axis.root:
        low = 0.0
        high = high or 1.0
        ticks = [tick for tick in FRACTION_TICKS if tick <= high]
        if len(ticks) < 4:
            ticks = nice_ticks(low, high)
    else:
        pad = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
        low = low if low in axis.include else low - pad
        high += pad if axis.end is None else 0.0
        ticks = nice_ticks(low, high)
    return _Scale(axis, low, high, start, end, tuple(ticks))


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two values."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(x: _Scale, y: _Scale) -> list[str]:
    left, right, top, bottom = x.start, x.end, y.end, y.start
    parts = []
    for tick in x.ticks:
        at = x.place(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {top:g}V{bottom:g}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18:g}" text-anchor="middle">{escape(x.axis.show(tick))}</text>')
    for tick in y.ticks:
        at = y.place(tick)
        parts.append(f'<path class="grid" d="M{left:g} {at:.1f}H{right:g}"/>')
        parts.append(f'<text x="{left - 7:g}" y="{at + 4:.1f}" text-anchor="end">{escape(y.axis.show(tick))}</text>')
    parts.append(f'<path class="axis" d="M{left:g} {top:g}V{bottom:g}H{right:g}"/>')
    middle, half = (left + right) / 2, (top + bottom) / 2
    parts.append(
        f'<text class="label" x="{middle:g}" y="{HEIGHT - 8:g}" text-anchor="middle">{escape(x.axis.label)}</text>'
    )
    turn = f'transform="translate(13 {half:g}) rotate(-90)"'
    parts.append(f'<text class="label" {turn} text-anchor="middle">{escape(y.axis.label)}</text>')
    return parts


def _draw(series: Series, x: _Scale, y: _Scale) -> list[str]:
    parts = [f'<g class="{series.style}">']
    places = [(x.place(mark.x), y.place(mark.y)) for mark in series.marks]
    line = [place for mark, place in zip(series.marks, places, strict=True) if not mark.off_line]
    if series.line and len(line) > 1:
        path = f"M{line[0][0]:.1f} {line[0][1]:.1f}"
        for place in line[1:]:
            path += f"H{place[0]:.1f}V{place[1]:.1f}" if series.step else f"L{place[0]:.1f} {place[1]:.1f}"
        parts.append(f'<path class="line" d="{path}"/>')
    for mark, (a, b) in zip(series.marks, places, strict=True):
        if mark.error:
            low, high = y.place(mark.y - mark.error), y.place(mark.y + mark.error)
            parts.append(f'<path class="error" d="M{a:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(_mark(series, mark, a, b))
    return [*parts, "</g>"]


def _mark(series: Series, mark: Mark, a: float, b: float) -> str:
    if mark.hidden:
        return ""
    s = series.size
    title = f"<title>{escape(mark.text)}</title>" if mark.text else ""
    match series.marker:
        case Marker.none:
            return ""
        case Marker.dot | Marker.ring:
            size = s if series.marker is Marker.dot else s * 1.9
            drawn = f'<circle class="{series.marker.value}" cx="{a:.1f}" cy="{b:.1f}" r="{size:g}">{title}</circle>'
        case Marker.square:
            drawn = f'<path class="dot" d="M{a - s:.1f} {b - s:.1f}h{2 * s:g}v{2 * s:g}h{-2 * s:g}z">{title}</path>'
        case Marker.diamond:
            t = s * 1.25
            drawn = f'<path class="dot" d="M{a:.1f} {b - t:.1f}l{t:g} {t:g}l{-t:g} {t:g}l{-t:g} {-t:g}z">{title}</path>'
    return f'<a href="{escape(mark.link)}">{drawn}</a>' if mark.link else drawn
