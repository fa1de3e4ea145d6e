"""A finished search in Python: its front as a table, as a picture, and as models of its own."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from natsl.errors import UserError
from natsl.load import find_point, read_front
from natsl.run import Run
from natsl.search.front import Front, Point

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_WIDTH = 160  # characters of the table in a terminal


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The front of a run's search, as its files hold it.

    ``result["knee"]``, ``result["t0042"]`` and the beginning of an id or of a policy's digest give a point; iteration
    gives all, in order of the fraction kept. ``front`` holds all that the report shows.
    """

    run: Run
    front: Front

    @classmethod
    def read(cls, run: Run) -> SearchResult:
        """The result of a run; ``UserError`` if its search is not finished, or its front cannot be read."""
        plain = read_front(run)
        try:
            return cls(run, Front.from_dict(plain))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{run.front_json} cannot be read ({type(error).__name__}: {error})") from None

    @property
    def points(self) -> tuple[Point, ...]:
        """The points of the front."""
        return self.front.points

    @property
    def knee(self) -> Point | None:
        """The best compromise (null: the front has none)."""
        return None if self.front.knee is None else self.front.point(self.front.knee)

    def __getitem__(self, pick: str) -> Point:
        """A point; ``UserError`` for an empty front, an unknown pick and one that fits several points."""
        points = [{"id": point.id, "digest": point.policy.digest()} for point in self.points]
        found = find_point({"points": points, "knee": self.front.knee}, str(pick), self.run.name)
        return self.front.point(found["id"])

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def to_frame(self) -> pd.DataFrame:
        """The rows of ``front.csv``, points and baselines, as a data frame; ``UserError`` without pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise UserError("to_frame needs pandas, which is not installed: pip install pandas") from None
        head, rows = self.front.table()
        return pd.DataFrame(rows, columns=head)

    def plot(self) -> Figure:
        """The figure of ``front.png``, which notebooks show. It is none of pyplot's, so nothing has to be closed."""
        from natsl.search.report.png import front_figure

        return front_figure(self.front)

    def export(self, pick: str = "knee", name: str | None = None, overwrite: bool = False) -> Path:
        """Write a point as a model of its own, verify it in a fresh process, and return its folder.

        The knee that the search has exported is taken as it is, unless another ``name`` or ``overwrite`` is given.
        ``natsl.api.export`` has more options; errors as ``natsl.export.export_choice``.
        """
        from natsl.export import export_point
        from natsl.search.pipeline import export_knee

        point = self[pick]
        made = export_knee(self.run) if point == self.knee and name is None and not overwrite else None
        return made or export_point(self.run, point.id, name, overwrite)

    def __repr__(self) -> str:
        from rich.console import Console

        from natsl.search.report.terminal import front_table

        text = io.StringIO()
        # Otherwise a notebook would get the table at once, and the text would be empty.
        console = Console(file=text, width=_WIDTH, color_system=None, force_jupyter=False)
        console.print(front_table(self.front, list(self.points)))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        from natsl.search.report.terminal import cells

        titles, rows = cells(self.front, self.points)

        def row(texts: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

        head = f"<caption>front of {html.escape(self.front.run)}, test split</caption>{row(titles, 'th')}"
        return f"<table>{head}{''.join(row(texts, 'td') for texts in rows)}</table>"
