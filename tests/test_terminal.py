"""What the terminal shows at the end: a table that fits, the headline, and the next command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from natsl.run import Run
from natsl.search.config import SearchConfig
from natsl.search.front import Front
from natsl.search.report.terminal import cells, print_front, print_nothing_to_do
from tests.search_helpers import built, searched, with_tasks

Show = Callable[..., str]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """A front of two objectives."""
    return built(searched(tmp_path_factory.mktemp("front"), SearchConfig(n_trials=20)))


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """A function that prints a front and gives what is on the terminal."""
    monkeypatch.setenv("COLUMNS", "400")
    run = Run.open("first", tmp_path)

    def show(front: Front, exported: Path | None = None) -> str:
        print_front(front, run, "generate run=first", exported)
        return capsys.readouterr().out

    return show


def rows(text: str) -> list[str]:
    return [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]


def test_every_point_of_a_short_front_has_a_row(front: Front, printed: Show) -> None:
    text = printed(front)
    assert rows(text) == [point.id + (" knee" if point.id == front.knee else "") for point in front.points]
    assert "front of first, test split" in text
    assert "At the knee" in text
    assert "natsl generate run=first pick=knee" in text
    assert "export " not in text


@pytest.mark.parametrize("knee", [0, 1, 33, 99])
def test_a_long_front_is_thinned_except_for_its_ends_and_the_knee(knee: int, front: Front, printed: Show) -> None:
    point = front.points[0]
    points = tuple(replace(point, id=f"t{i:04d}") for i in range(100))
    text = printed(replace(front, points=points, knee=f"t{knee:04d}"), Path("export/here"))
    shown = rows(text)
    assert len(shown) <= 14
    assert [name.split()[0] for name in (shown[0], shown[-1])] == ["t0000", "t0099"]
    assert f"t{knee:04d} knee" in shown
    assert f"{len(shown)} of 100 points; all of them are in" in text
    assert "export  export/here" in text


def test_several_tasks_have_a_column_of_kept_fractions(front: Front, printed: Show) -> None:
    assert "kept in" not in printed(front)
    assert "kept in" not in printed(with_tasks(front, "mqar"))
    text = printed(with_tasks(front, "bytes", "mqar", "needle"))
    assert "kept in bytes, mqar, needle" in text
    cell = "0.0 %, 50.0 %, 100.0 %".replace(" %", "\N{NO-BREAK SPACE}%")
    assert text.count(cell) == len(rows(text))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "–"), (1, "n0"), (2, "n0, n1"), (3, "n0, n1, +1"), (19, "n0, n1, +17")]
)
def test_of_what_dominates_a_point_two_are_named(count: int, text: str, front: Front) -> None:
    names = tuple(f"n{i}" for i in range(count))
    titles, rows = cells(front, [replace(front.points[0], dominated_by=names)])
    assert dict(zip(titles, rows[0], strict=True))["dominated by"] == text


def test_what_comes_from_outside_is_no_markup(front: Front, printed: Show) -> None:
    points = (replace(front.points[0], dominated_by=("[bold]x[/bold]",)),)
    text = printed(replace(front, run="[red]r[/red]", points=points, knee=points[0].id))
    assert "[bold]x[/bold]" in text
    assert "front of [red]r[/red]" in text


def test_a_front_of_nothing_has_no_table(front: Front, printed: Show) -> None:
    text = printed(replace(front, points=(), knee=None))
    assert "there is no front and nothing to export" in text
    assert rows(text) == []
    assert "generate" not in text


def test_a_finished_search_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.open("first", tmp_path)
    print_nothing_to_do(run, 7)
    assert capsys.readouterr().out == f"nothing to do: all 7 trials of 'first' are made; see {run.report}\n"
