"""What the tracker is shown of a front: the share at the knee and a table of the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from natsl.run import Run
from natsl.search.config import SearchConfig
from natsl.search.journal import Journal
from natsl.tracking import Tracker
from tests.search_helpers import built, compared, searched


class Recorder(Tracker):
    """Keeps summaries and tables."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}
        self.tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {}

    def summary(self, values: Mapping[str, Any]) -> None:
        self.numbers |= values

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[name] = columns, rows


def test_shares_and_controls_are_tracked(tmp_path: Path) -> None:
    study = searched(tmp_path, SearchConfig(n_trials=20))
    front, recorder = compared(built(study), study), Recorder()
    run = Run.open("first", tmp_path)
    Journal(run, recorder).front(front)
    knee = front.comparison(front.knee)
    assert knee is not None
    share = knee.tasks[0].share
    assert share is not None
    assert recorder.numbers["selection_share/mqar"] == share.value
    assert recorder.numbers["selection_share/bytes"] is None
    columns, rows = recorder.tables["controls"]
    assert len(rows) == sum(1 + len(item.rivals) for one in front.comparisons for item in one.tasks)
    assert all(len(row) == len(columns) for row in rows)
    plain = Recorder()
    Journal(run, plain).front(replace(front, comparisons=()))
    assert plain.tables["controls"][1] == []
    assert not any(name.startswith("selection_share") for name in plain.numbers)


def test_the_front_against_sweeps_is_tracked(tmp_path: Path) -> None:
    front, recorder = built(searched(tmp_path, SearchConfig(n_trials=20))), Recorder()
    run = Run.open("first", tmp_path)
    Journal(run, recorder).front(front)
    assert recorder.numbers["hypervolume"] == front.hypervolume
    assert recorder.numbers["hypervolume_test"] == front.hypervolume_test
    for family in front.families:
        assert recorder.numbers[f"families/{family.name}/hypervolume_test"] == family.hypervolume_test
        assert recorder.numbers[f"families/{family.name}/gain"] == family.gain
        assert recorder.numbers[f"families/{family.name}/error"] == family.gain_error
    assert recorder.numbers["front_against_sweeps"].startswith("Hypervolume on the test split: front")
    plain = Recorder()
    Journal(run, plain).front(replace(front, families=()))
    assert plain.numbers["front_against_sweeps"] is None
