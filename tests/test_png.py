"""The picture of a front. Fronts of every kind are drawn in the tests of the report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from natsl.search.config import SearchConfig
from natsl.search.front import Front
from natsl.search.report import png
from natsl.search.report.png import front_png
from tests.search_helpers import built, is_png, searched


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """A front of two objectives."""
    return built(searched(tmp_path_factory.mktemp("front"), SearchConfig(n_trials=20)))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn in a test, instead of their pictures."""
    figures: list[Figure] = []

    def kept(figure: Figure, *_: object) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(png, "figure_bytes", kept)
    return figures


def test_the_picture_is_a_png(front: Front) -> None:
    assert is_png(front_png(front))
    assert is_png(front_png(replace(front, run="costs 3$ or 4$ {\\alpha}")))


@pytest.mark.parametrize("points", [0, 1])
def test_fronts_of_few_points_are_drawn(points: int, front: Front) -> None:
    knee = front.points[0].id if points else None
    assert is_png(front_png(replace(front, points=front.points[:points], knee=knee, knee_choice=None)))


def test_the_staircase_passes_by_what_is_dominated(front: Front, drawn: list[Figure]) -> None:
    places = {"a": (0.0, 0.9), "b": (0.1, 0.3), "c": (0.15, 0.4), "d": (0.2, 0.1)}
    points = []
    for name, (kept, error) in places.items():
        values, point = {"recall_error": error, "kept_fraction": kept}, front.points[0]
        points.append(replace(point, id=name, values=values, measured=point.measured | values))
    front_png(replace(front, points=tuple(points), knee="d", families=()))
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert np.asarray(line.get_ydata()).tolist() == [0.9, 0.3, 0.1]


def test_ticks_are_shown_without_rounding(front: Front, drawn: list[Figure]) -> None:
    """Of a step of .0025 three decimals would show .003 and .002 in turn."""
    front_png(front)
    for place in drawn[0].axes:
        place.set_ylim(3.848, 3.871)
        steps = np.diff(place.get_yticks())
        assert np.allclose(steps, 0.005)


def test_marks_at_the_left_end_are_seen_whole(front: Front, drawn: list[Figure]) -> None:
    front_png(front)
    lines = [line for place in drawn[0].axes for line in place.lines if line.get_marker() not in ("", "None")]
    at_zero = [line for line in lines if (np.asarray(line.get_xdata()) == 0).any()]
    assert at_zero
    assert not any(line.get_clip_on() for line in at_zero)
