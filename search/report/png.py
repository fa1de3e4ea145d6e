"""``front.png``: the front beside its baselines, and what it costs in plain text quality."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from natsl.search.front import Front
from natsl.search.objective import OBJECTIVES
from natsl.search.report.chart import FRACTION_TICKS, Marker, nice_ticks
from natsl.search.report.plane import picture, planes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that can be told apart with a colour weakness, on white.
COLOURS = {
    "front": "#1f5fd6",
    "random": "#d9730d",
    "depth": "#8a4fc7",
    "extreme": "#4b5563",
    "family0": "#b8377f",
    "family1": "#6b8e23",
    "family2": "#5b9bd5",
    "family3": "#0c8a7a",
    "family4": "#a3760b",
    "family5": "#7a6a5a",
    "knee": "#14171a",
}
_NARROW = 7.0  # inches, a single panel
_STEPS = [1, 2, 5, 10]  # of the axes: what lies between would need another digit
_MARKERS = {Marker.dot: "o", Marker.ring: "o", Marker.square: "s", Marker.diamond: "D", Marker.none: ""}


def front_png(front: Front) -> bytes:
    """A PNG of ``front_figure``."""
    return figure_bytes(front_figure(front))


def front_figure(front: Front) -> Figure:
    """Each pair of objectives, then the loss on plain text over the fraction kept."""
    panels = planes(front)
    if any(item.measured.get("val_loss") is not None for item in front.rows):
        panels = list(dict.fromkeys([*panels, ("kept_fraction", "val_loss")]))
    columns = min(2, len(panels))
    figure, axes = new_figure(-(-len(panels) // columns), columns, len(panels))
    for place, (across, up) in zip(axes, panels, strict=True):
        _draw(place, front, across, up)
    return finished(figure, axes[0], f"{front.run}: {len(front.points)} policies on the front, test split")


def new_figure(rows: int, columns: int, panels: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with ``rows`` × ``columns`` panels, row by row, or with the first ``panels`` of them.

    It is none of pyplot's, which stays as the user has set it.
    """
    from natsl.search.report.figure import ShownFigure

    figure = ShownFigure(figsize=(6.2 * columns, 4.6 * rows + 0.9), layout="constrained", dpi=130)
    count = rows * columns if panels is None else panels
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def figure_png(figure: Figure, legend_of: Axes, title: str) -> bytes:
    """A PNG of ``finished``."""
    return figure_bytes(finished(figure, legend_of, title))


def finished(figure: Figure, legend_of: Axes, title: str) -> Figure:
    """The figure with a title and, below it, the legend of one panel."""
    from matplotlib.text import Text

    handles, labels = legend_of.get_legend_handles_labels()
    if handles:
        ncols = 3 if figure.get_figwidth() > _NARROW else 2
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # dollars in a name are dollars
    return figure


def figure_bytes(figure: Figure) -> bytes:
    """A PNG of a figure."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw(place: Axes, front: Front, across: str, up: str) -> None:
    drawn = picture(front, across, up)
    for order, item in enumerate(drawn.series):
        if not item.marks:
            continue
        marks = [mark for mark in item.marks if not mark.hidden]
        colour = COLOURS[item.style]
        hollow = item.marker is Marker.ring
        line = [mark for mark in item.marks if not mark.off_line]
        if item.line and len(line) > 1:
            place.plot(
                [mark.x for mark in line],
                [mark.y for mark in line],
                color=colour,
                linewidth=1.6 if item.step else 0.9,
                drawstyle="steps-post" if item.step else "default",
                zorder=order + 2,
            )
        place.errorbar(
            [mark.x for mark in marks],
            [mark.y for mark in marks],
            yerr=[mark.error for mark in marks] if any(mark.error for mark in marks) else None,
            fmt=_MARKERS[item.marker],
            color=colour,
            markerfacecolor="none" if hollow else colour,
            markeredgecolor=colour if hollow else "white",
            markeredgewidth=2.0 if hollow else 0.6,
            markersize=item.size * (2.6 if hollow else 1.35),
            elinewidth=1.1,
            label=item.label,
            zorder=order + 3,
            clip_on=False,  # marks at the left end, 0 %, are seen whole; what lies beyond the right one is not drawn
        )
    x, y = drawn.x, drawn.y
    place.set_xlabel(f"{x.label}\n{drawn.note}" if drawn.note else x.label)
    place.set_ylabel(y.label)
    if x.root:
        place.set_xscale("function", functions=(lambda v: abs(v) ** 0.5, lambda v: v**2))
        place.set_xlim(left=0)
        largest = x.end or max((mark.x for item in drawn.series for mark in item.marks), default=1.0) or 1.0
        ticks = [tick for tick in FRACTION_TICKS if tick <= largest * 1.01]
        place.set_xticks(ticks if len(ticks) > 3 else nice_ticks(0.0, largest))
    if x.end is not None:
        place.set_xlim(right=x.end)
    elif not x.root:
        place.locator_params(axis="x", steps=_STEPS)
    place.locator_params(axis="y", steps=_STEPS)
    place.xaxis.set_major_formatter(lambda value, _: x.show(value))
    place.yaxis.set_major_formatter(lambda value, _: y.show(value))
    place.grid(alpha=0.25, linewidth=0.7)
    place.spines[["top", "right"]].set_visible(False)
    if y.include and not y.root:
        place.set_ylim(bottom=-0.02)  # marks at zero are seen whole
    if OBJECTIVES[up].task is None and across == "kept_fraction":
        place.set_title("quality on plain text", fontsize=10)
