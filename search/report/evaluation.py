"""Pictures of one evaluation: answers by length and depth, chunks kept by layer and head, bytes of the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from natsl.search.objective import BYTES
from natsl.search.report.chart import FRACTION_TICKS
from natsl.search.report.png import COLOURS, figure_png, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from natsl.answers import Answers, Cell
    from natsl.evaluate import Evaluation
    from natsl.footprint import Footprint
    from natsl.space.policy import RoutingPolicy

_WRITTEN = 12  # columns of cells that a panel of the usual width has room for
_LONGEST = 12  # characters of a layer's policy
_EDGE = "#b8bdc4"


def answers_png(results: Sequence[Answers], lengths: Sequence[int], trained_at: int, title: str) -> bytes:
    """A PNG: the share of right answers at every length and depth, a panel per task. What was not asked is hatched."""
    figure, axes = new_figure(1, len(results))
    for place, result in zip(axes, results, strict=True):
        spans = list(dict.fromkeys(cell.depth for cell in result.cells))
        known = {(cell.depth, cell.tokens): cell for cell in result.cells}
        rows = [[known.get((span, tokens)) for tokens in lengths] for span in spans]
        shares = [[None if cell is None else cell.accuracy for cell in row] for row in rows]
        _heat_map(place, shares or [[None] * len(lengths)], [[_answers(cell) for cell in row] for row in rows])
        place.set_xticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths])
        place.set_yticks(range(len(spans)), [_span(span) for span in spans])
        place.set_xlabel(f"tokens of a sequence (trained at {trained_at:,})")
        place.set_ylabel("depth of the key in the text before the questions")
        notes = [f"{result.planted} planted in a sequence"] + ([] if result.trained else ["not trained on"])
        place.set_title(f"{result.task}: {', '.join(notes)}", fontsize=10)
        if not spans:
            place.text(0.5, 0.5, "nothing could be asked", transform=place.transAxes, ha="center")
    _scale(figure, axes, "right answers", (0.0, 0.25, 0.5, 0.75, 1.0))
    return figure_png(figure, axes[0], title)


def kept_png(evaluation: Evaluation, policy: RoutingPolicy, title: str) -> bytes:
    """A PNG: the share of complete chunks that softmax keeps in every layer and head, of all tasks and of each."""
    panels = {"all tasks": evaluation.kept_by_head}
    panels = panels | dict(evaluation.kept_by_task) if len(evaluation.kept_by_task) > 1 else panels
    wide = max(1, len(policy.layers) // _WRITTEN)  # such panels go below each other
    columns = 1 if wide > 1 else len(panels)
    figure, axes = new_figure(-(-len(panels) // columns), columns)
    across, up = figure.get_size_inches()
    figure.set_size_inches(across * (1.6 if wide > 1 else 0.7) + 1.0, up * 0.75)
    layers = [layer.describe() for layer in policy.layers]
    layers = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in layers]
    narrow = max(map(len, layers)) > _LONGEST // 2 or len(layers) > _WRITTEN
    for place, (task, kept) in zip(axes, panels.items(), strict=True):
        shares = [list(row) for row in zip(*kept, strict=True)]  # heads × layers
        _heat_map(place, shares, [[_percent(share) for share in row] for row in shares], root=True)
        names = [f"{i} {text}" if narrow else f"{i}\n{text}" for i, text in enumerate(layers)]
        place.set_xticks(range(len(layers)), names, rotation=90 if narrow else 0, fontsize=8 if narrow else 9)
        place.set_yticks(range(len(shares)))
        place.set_xlabel("layer and its policy (D delta rule only, S every chunk)")
        place.set_ylabel("routing head")
        share = evaluation.kept_fraction_by_task.get(task, evaluation.kept_fraction)
        place.set_title(f"{task}: {100 * share:.1f} % in the layers with a router", fontsize=10)
    _scale(figure, axes, "complete chunks kept for softmax", FRACTION_TICKS)
    return figure_png(figure, axes[0], title)


def cache_png(rows: Sequence[Footprint], title: str) -> bytes:
    """A PNG: bytes of the cache of one sequence against its length, measured and by the cost model, beside dense."""
    figure, (place,) = new_figure(1, 1)
    tokens = [row.tokens for row in rows]
    series: list[tuple[str, list[float], dict[str, str]]] = [
        ("dense attention, keys and values", [row.dense for row in rows], {"color": COLOURS["extreme"], "marker": "s"}),
        ("held, with pages in reserve", [row.held for row in rows], {"color": COLOURS["random"], "marker": "D"}),
        ("in use, measured", [row.used for row in rows], {"color": COLOURS["front"], "marker": "o"}),
    ]
    for label, values, style in series:
        place.plot(
            tokens, values, style["marker"], color=style["color"], label=label, ls="-", lw=1.4, ms=5, mec="white"
        )
    place.plot(
        tokens,
        [row.predicted for row in rows],
        "o",
        label="in use, by the cost model",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=COLOURS["knee"],
        markeredgewidth=1.4,
    )
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.set_xticks(tokens, [f"{n:,}" for n in tokens])
    everything = [value for _, values, _ in series for value in values]
    powers = range(math.floor(math.log10(min(everything))), math.ceil(math.log10(max(everything))) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    low = max(tick for tick in ticks if tick <= min(everything))
    high = min(tick for tick in ticks if tick >= max(everything))
    place.set_yticks([tick for tick in ticks if low <= tick <= high])
    place.set_ylim(0.9 * low, 1.1 * high)
    place.minorticks_off()
    place.yaxis.set_major_formatter(lambda value, _: BYTES.tick(value))
    place.set_xlabel("tokens read")
    place.set_ylabel("bytes of one sequence")
    place.grid(alpha=0.25, linewidth=0.7)
    place.spines[["top", "right"]].set_visible(False)
    return figure_png(figure, place, title)


def _heat_map(
    place: Axes, shares: Sequence[Sequence[float | None]], texts: Sequence[Sequence[str]], root: bool = False
) -> None:
    """Shares in [0, 1] as shades with their texts; None is hatched. ``root``: small shares are spread."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    shades = LinearSegmentedColormap.from_list("share", ["#ffffff", COLOURS["front"]])
    norm = PowerNorm(0.5 if root else 1.0, vmin=0.0, vmax=1.0)
    values = [[math.nan if share is None else share for share in row] for row in shares]
    place.set_facecolor("#eceef0")
    place.patch.set(hatch="////", edgecolor=_EDGE)
    place.imshow(values, cmap=shades, norm=norm, aspect="auto", interpolation="nearest")
    size = 9 if len(shares[0]) <= _WRITTEN // 2 else 7
    for y, row in enumerate(texts if len(shares[0]) <= 3 * _WRITTEN else ()):
        for x, text in enumerate(row):
            share = shares[y][x]
            dark = share is not None and norm(share) > 0.55
            place.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else COLOURS["knee"])
    place.set_xticks([i + 0.5 for i in range(len(shares[0]) - 1)], minor=True)
    place.set_yticks([i + 0.5 for i in range(len(shares) - 1)], minor=True)
    place.grid(which="minor", color=_EDGE, linewidth=1.0)
    place.tick_params(which="both", length=0)
    place.spines[:].set_color(_EDGE)


def _scale(figure: Figure, axes: Sequence[Axes], label: str, ticks: Sequence[float]) -> None:
    """The scale of the shades, beside all panels."""
    bar = figure.colorbar(axes[0].images[0], ax=axes, aspect=30, pad=0.02)
    bar.set_ticks(list(ticks), labels=[f"{100 * tick:g} %" for tick in ticks])
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_edgecolor(_EDGE)


def _answers(cell: Cell | None) -> str:
    if cell is None or cell.accuracy is None:
        return ""
    return f"{100 * cell.accuracy:.0f} %\nof {cell.asked:,}"


def _percent(share: float) -> str:
    """A share in per cent, with a digit more where it is small."""
    return "0" if share == 0 else f"{100 * share:.{int(share < 0.0995)}f}"


def _span(depth: tuple[float, float]) -> str:
    low, high = (f"{100 * end:.3g}" for end in depth)
    return f"{low} %" if low == high else f"{low}–{high} %"
