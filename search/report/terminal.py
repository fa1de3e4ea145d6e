"""What the terminal shows at the end of a search: a table of the front, the headline, and what can be done next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from natsl.run import Run
from natsl.search.front import Front, Point, amount, kept_in
from natsl.search.objective import OBJECTIVES
from natsl.search.report.headline import headline
from natsl.search.report.plane import first_names, show

_ROWS = 14  # of the table


def print_front(front: Front, run: Run, following: str, exported: Path | None) -> None:
    """Print a front whose files are written.

    ``following``: a command for the run, without what it picks. ``exported``: the folder of the exported knee, if there
    is one.
    """
    console = Console()
    points = _shown(front)
    if points:
        console.print(front_table(front, points))
    if len(points) < len(front.points):
        console.print(
            f"{len(points)} of {len(front.points)} points; all of them are in {run.front_csv}",
            markup=False,
            emoji=False,
        )
    lines = [text for text, _ in headline(front)]
    lines += [f"report  {run.report}", f"picture {run.front_png}"]
    lines += [f"export  {exported}"] if exported is not None else []
    if front.points:
        lines.append(f"next    natsl {following} pick=knee")
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_nothing_to_do(run: Run, trials: int, ended: str | None = None) -> None:
    """Print that all trials of a run were made before, or why (``ended``) there are no more."""
    state = f"all {trials} trials of {run.name!r} are made" if ended is None else f"of {run.name!r} {ended}"
    print(f"nothing to do: {state}; see {run.report}")


def _shown(front: Front) -> list[Point]:
    """The points that the table has room for: evenly spread ones and the knee."""
    points = front.points
    if len(points) <= _ROWS:
        return list(points)
    places = {i * (len(points) - 1) // (_ROWS - 2) for i in range(_ROWS - 1)}
    return [point for i, point in enumerate(points) if i in places or point.id == front.knee]


def front_table(front: Front, points: list[Point]) -> Table:
    table = Table(title=f"front of {escape(front.run)}, test split", title_justify="left")
    titles, rows = cells(front, points)
    for title in titles:
        table.add_column(title)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def cells(front: Front, points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and a row of texts for each point."""
    labels = [OBJECTIVES[name].label for name in front.measures]
    labels += [f"kept in {', '.join(front.tasks)}"] if front.tasks else []
    rows = []
    for point in points:
        control = front.random_of(point.id)
        random = None if control is None else amount(control, front.quality)
        values = [show(name, amount(point, name)) for name in front.measures]
        kept = ", ".join(show("kept_fraction", kept_in(point, task)) for task in front.tasks)
        values += [kept] if front.tasks else []
        mark = " knee" if point.id == front.knee else ""
        row = [point.id + mark, point.policy.describe(), *values, show(front.quality, random)]
        rows.append([*row, first_names(point.dominated_by)])
    return ["point", "policy", *labels, "random routing", "dominated by"], rows
