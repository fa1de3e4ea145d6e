"""What a benchmark reports: rows, the printed tables and ``bench.png``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SDPA, FLEX = "dense, SDPA cuDNN", "FlexAttention, routed"

# Name of a row → colour and line; told apart with a colour weakness, on white.
LINES = {
    "layer": ("#1f5fd6", "-"),
    "routed_softmax": ("#b8377f", "-"),
    "routed_delta_rule": ("#0c8a7a", "-"),
    "routed_mix": ("#8a4fc7", "-"),
    SDPA: ("#d9730d", "-"),
    FLEX: ("#4b5563", "-"),
    "layer, torch backend": ("#4b5563", ":"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds, GiB and the floors; None where something was not measured."""

    name: str
    batch: int
    tokens: int
    fraction: float | None  # None: dense attention, whatever the routes
    forward_ms: float | None = None
    both_ms: float | None = None
    queued_ms: float | None = None
    floor_forward_ms: float | None = None
    floor_both_ms: float | None = None
    peak_gib: float | None = None
    note: str = ""


@dataclass(frozen=True)
class KernelRow:
    """Time of one Triton kernel in one forward and backward, and the floor of its own products and bytes."""

    kernel: str
    batch: int
    tokens: int
    fraction: float
    ms: float
    launches: int
    floor_ms: float | None


HEADER = (
    f"{'':<22}{'B':>3}{'T':>8}{'f':>5}{'forward':>10}{'fwd+bwd':>10}{'queued':>10}{'floor fwd':>11}{'f+b':>8}"
    f"{'of floor':>14}{'GiB':>7}\n"
    f"{'':<38}{'ms':>10}{'ms':>10}{'ms':>10}{'ms':>11}{'ms':>8}{'fwd':>7}{'f+b':>7}{'peak':>7}"
)


def line(row: Row) -> str:
    """One line of the table."""

    def number(value: float | None, width: int) -> str:
        if value is None:
            return f"{'–':>{width}}"
        return f"{value:>{width}.{3 if value < 10 else 2 if value < 100 else 1}f}"

    def share(floor: float | None, ms: float | None) -> str:
        return f"{'–':>7}" if floor is None or ms is None else f"{100 * floor / ms:>6.0f}%"

    start = f"{row.name:<22}{row.batch:>3}{row.tokens:>8}{'–' if row.fraction is None else f'{row.fraction:g}':>5}"
    if row.note:
        return f"{start}  {row.note}"
    times = "".join(number(x, 10) for x in (row.forward_ms, row.both_ms, row.queued_ms))
    floors = number(row.floor_forward_ms, 11) + number(row.floor_both_ms, 8)
    shares = share(row.floor_forward_ms, row.forward_ms) + share(row.floor_both_ms, row.queued_ms)
    return f"{start}{times}{floors}{shares}{number(row.peak_gib, 7)}"


def kernel_table(rows: Sequence[KernelRow]) -> str:
    """Kernels down, cases across: milliseconds in one forward and backward, and the floor as a share of them."""
    cases = list(dict.fromkeys((row.batch, row.tokens) for row in rows))
    cells = {(row.kernel, row.batch, row.tokens): row for row in rows}
    lines = ["", f"{'ms (share of its floor)':<27}" + "".join(f"{f'{b}×{t}':>13}" for b, t in cases)]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        text = f"{kernel:<27}"
        for case in cases:
            row = cells.get((kernel, *case))
            share = "" if row is None or not row.floor_ms else f" {100 * row.floor_ms / row.ms:.0f}%"
            text += f"{'–' if row is None else f'{row.ms:.3f}{share}':>13}"
        lines.append(text)
    totals = [sum(row.ms for row in rows if (row.batch, row.tokens) == case) for case in cases]
    lines.append(f"{'all, one after the other':<27}" + "".join(f"{total:>13.3f}" for total in totals))
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Row], fraction: float, title: str) -> None:
    """Write a PNG of the rows of the smallest batch at ``fraction``: forward, and forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    batch = min(row.batch for row in rows)
    shown = [row for row in rows if row.batch == batch and row.fraction in (fraction, None) and not row.note]
    figure = Figure(figsize=(12.4, 5.5), layout="constrained", dpi=130)
    for i, part in enumerate(("forward", "both")):
        place = figure.add_subplot(1, 2, i + 1)
        for name, (colour, style) in LINES.items():
            points = sorted((row.tokens, getattr(row, f"{part}_ms")) for row in shown if row.name == name)
            if points:
                place.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=4, lw=1.8, label=name)
        floor = sorted((row.tokens, getattr(row, f"floor_{part}_ms")) for row in shown if row.name == "layer")
        if floor:
            place.plot(*zip(*floor, strict=True), "--", color="#14171a", lw=1.4, label="floor of the layer")
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        lengths = sorted({row.tokens for row in shown})
        place.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        place.set_xlabel(f"tokens per sequence, batch {batch}")
        place.set_ylabel("milliseconds")
        place.set_title("forward" if part == "forward" else "forward and backward", fontsize=11)
        place.grid(color="#eceef0")
        place.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, format="png")
