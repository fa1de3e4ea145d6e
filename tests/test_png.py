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


def test_the_picture_is_a_png(front: Front) -> None:
    assert is_png(front_png(front))
    assert is_png(front_png(replace(front, run="costs 3$ or 4$ {\\alpha}")))


def test_marks_at_the_left_end_are_seen_whole(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def kept(figure: Figure, *_: object) -> bytes:
        drawn.append(figure)
        return b""

    monkeypatch.setattr(png, "figure_png", kept)
    front_png(front)
    lines = [line for place in drawn[0].axes for line in place.lines if line.get_marker() not in ("", "None")]
    at_zero = [line for line in lines if (np.asarray(line.get_xdata()) == 0).any()]
    assert at_zero
    assert not any(line.get_clip_on() for line in at_zero)
