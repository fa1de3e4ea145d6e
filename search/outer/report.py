"""What an outer search leaves: ``outer.json``, ``outer.png``, ``report.html``, and a table on the terminal."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from natsl.command import command, run_options
from natsl.files import read_json, write_bytes, write_json, write_text
from natsl.run import Run
from natsl.search.outer.config import OuterSpace, shown_settings
from natsl.search.outer.study import OuterRecord, State, best_of
from natsl.search.pareto import Scale
from natsl.search.report.style import STYLE
from natsl.secrets import redact_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 20  # of the table on the terminal, the best ones


@dataclass(frozen=True)
class OuterResult:
    """An outer search: its trials in order, and the scale that their values are in.

    ``rungs``: steps after which supernets were judged. ``test``: hypervolume of the best trial's own front on the test
    split, in the same scale (null: its policies are not searched).
    """

    run: Run
    space: OuterSpace
    scale: Scale
    rungs: tuple[int, ...]
    records: tuple[OuterRecord, ...]
    notes: tuple[str, ...] = ()
    test: float | None = None

    @property
    def best(self) -> OuterRecord | None:
        """The trial with the largest value of those trained to the end, the first one of equals."""
        return best_of(self.records)

    @property
    def best_run(self) -> Run | None:
        """The run of the best trial, which export, generate and evaluate take."""
        return None if self.best is None else Run(self.run.trials / self.best.id)

    def tested(self) -> OuterResult:
        """With the test score of the best trial's front, if its policies are searched."""
        run = self.best_run
        if run is None or not run.front_json.exists():
            return self
        points = read_json(run.front_json)["points"]
        return replace(self, test=self.scale.hypervolume([point["values"] for point in points]))

    def commands(self) -> list[str]:
        """What can be done with the best trial, for a shell."""
        run = self.best_run
        if run is None:
            return []
        options = run_options(run.name, str(run.path.parent))
        return [command(verb, {**options, "pick": "knee"}) for verb in ("export", "evaluate")]

    def to_plain(self) -> dict[str, Any]:
        """The content of ``outer.json``."""
        return {
            "outer": self.run.name,
            "scale": {
                name: {"better": better, "worse": worse}
                for name, better, worse in zip(self.scale.names, self.scale.best, self.scale.worst, strict=True)
            },
            "best": None if self.best is None else {"id": self.best.id, "value": self.best.value, "test": self.test},
            "trials": [record.to_plain(self.rungs) for record in self.records],
            "notes": list(self.notes),
            "commands": self.commands(),
        }


def write(result: OuterResult) -> None:
    """Write all files of an outer search; the report is the last one."""
    folder, picture = result.run.path, _png(result)
    write_json(folder / "outer.json", result.to_plain())
    write_bytes(folder / "outer.png", picture)
    write_text(result.run.report, redact_text(_html(result, picture)))


def print_result(result: OuterResult) -> None:
    """Print the best trials, and what can be done with the best of them."""
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    console = Console()
    table = Table(title=f"trials of {plain(result.run.name)}, search split", title_justify="left")
    titles, rows = _cells(result)
    for title in titles:
        table.add_column(title)
    for row in rows[:_ROWS]:
        table.add_row(*map(plain, row))
    console.print(table)
    lines = [f"{_ROWS} of {len(rows)} trials; all of them are in {result.run.report}"] if len(rows) > _ROWS else []
    lines += [_headline(result), f"report  {result.run.report}", *(f"next    {line}" for line in result.commands())]
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _headline(result: OuterResult) -> str:
    best = result.best
    if best is None:
        return "no trial was trained to its end"
    tested = "" if result.test is None else f"; after a search of its policies {result.test:.4f} on the test split"
    return f"best: {best.id} ({shown_settings(best.settings)}), hypervolume {best.value:.4f}{tested}"


def _ranked(records: Sequence[OuterRecord]) -> list[OuterRecord]:
    """Trials that went furthest first, the better ones of these before the others."""
    return sorted(records, key=lambda r: (r.state is State.failed, -len(r.values), *(-v for v in r.values[-1:])))


def _cells(result: OuterResult) -> tuple[list[str], list[list[str]]]:
    options = [option for option, *_ in result.space.axes()]
    rows = [
        [record.id, *(_number(record.settings.get(option)) for option in options), record.outcome(result.rungs)]
        for record in _ranked(result.records)
    ]
    return ["trial", *options, "outcome"], rows


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _html(result: OuterResult, picture: bytes) -> str:
    titles, rows = _cells(result)
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    image = base64.b64encode(picture).decode()
    scale = "; ".join(
        f"{name} from {better:.4g} to {worse:.4g}"
        for name, better, worse in zip(result.scale.names, result.scale.best, result.scale.worst, strict=True)
    )
    title = escape(f"natsl outer: {result.run.name}")
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.notes)
    commands = escape("\n".join(result.commands()))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<section><p>{escape(_headline(result))}</p>{notes}<pre>{commands}</pre></section>
<section><h2>Trials</h2>
<p class="note">Value: the hypervolume of the same policies of every supernet on the search split, between the same
reference points ({escape(scale)}). It compares trials; the best of many is chosen by it, so its test score is the one
to quote. What was stopped is judged as it was then, on the schedule of all steps.</p>
<figure><img style="width: 100%; height: auto" alt="value of every trial, and its settings"
src="data:image/png;base64,{image}"></figure>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div></section>
</main>
</body>
</html>
"""


def _png(result: OuterResult) -> bytes:
    """A PNG: the value of every trial, and its settings as parallel coordinates."""
    from natsl.search.report.png import figure_png, new_figure

    figure, (left, right) = new_figure(1, 2)
    _draw_values(left, result)
    _draw_settings(figure, right, result)
    return figure_png(figure, left, f"{result.run.name}: {len(result.records)} trials, search split")


def _draw_values(place: Axes, result: OuterResult) -> None:
    from matplotlib.ticker import MaxNLocator

    from natsl.search.report.png import COLOURS

    done = [(r.index, r.value) for r in result.records if r.value is not None]
    stopped = [(r.index, r.values[-1]) for r in result.records if r.state is State.pruned]
    failed = [(r.index, 0.0) for r in result.records if r.state is State.failed]
    for marks, marker, colour, label in (
        (done, "o", "front", "trained to the end"),
        (stopped, "v", "random", "stopped, its value then"),
        (failed, "x", "extreme", "failed"),
    ):
        if marks:
            place.plot(*zip(*marks, strict=True), marker, color=COLOURS[colour], label=label, clip_on=False)
    if done:
        best = [max(value for _, value in done[: i + 1]) for i in range(len(done))]
        end = max(record.index for record in result.records)
        across = [index for index, _ in done]
        place.step([*across, end], [*best, best[-1]], where="post", color=COLOURS["knee"], linewidth=1, label="best")
    place.xaxis.set_major_locator(MaxNLocator(integer=True))
    place.set_xlabel("trial")
    place.set_ylabel("hypervolume")
    place.set_ylim(bottom=0)
    place.grid(alpha=0.3)


def _draw_settings(figure: Figure, place: Axes, result: OuterResult) -> None:
    import matplotlib as mpl

    axes = result.space.axes()
    values = [record.values[-1] for record in result.records if record.values]
    norm = mpl.colors.Normalize(min(values, default=0.0), max(values, default=1.0))
    shade = mpl.colormaps["viridis"]
    for record in sorted((r for r in result.records if r.values), key=lambda r: r.values[-1]):
        heights = [_height(record.settings[option], span, log) for option, span, log in axes]
        stopped = record.state is State.pruned
        style: dict[str, Any] = {"linestyle": ":" if stopped else "-", "linewidth": 1.0 if stopped else 1.8}
        place.plot(range(len(axes)), heights, color=shade(norm(record.values[-1])), marker="o", **style)
    for i, (_, span, _) in enumerate(axes):
        place.axvline(i, color="#9aa4af", linewidth=0.8, zorder=0)
        for end, height, alignment in ((span[0], -0.03, "top"), (span[-1], 1.03, "bottom")):
            place.text(i, height, _number(end), ha="center", va=alignment, fontsize=8)
    place.set_ylim(-0.12, 1.12)
    place.set_yticks([])
    place.set_xticks(range(len(axes)), [option.partition(".")[2] for option, *_ in axes], fontsize=8)
    figure.colorbar(mpl.cm.ScalarMappable(norm, shade), ax=place, label="hypervolume (dotted: stopped)")


def _height(value: Any, span: Sequence[Any], log: bool | None) -> float:
    """Where a setting is on its axis: 0 at the low end or the first choice, 1 at the other end."""
    if log is None:
        return span.index(value) / max(1, len(span) - 1)
    low, high, own = (math.log(x) if log else x for x in (*span, value))
    return float((own - low) / (high - low))
