"""What the tracker is shown of a search, and that nothing that happens to it matters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import wandb
from PIL import Image

from natsl.config import TrainConfig
from natsl.data import TaskData, load_text
from natsl.progress import Progress
from natsl.run import Run
from natsl.search.config import SearchConfig
from natsl.search.journal import Journal, _kept_picture
from natsl.search.pareto import non_dominated
from natsl.search.pipeline import run_search
from natsl.search.trial import Record
from natsl.tracking import Rows, Tracker, TrackingConfig, TrackingMode, start_tracker
from natsl.train import KEPT_BUDGET, TrainRecipe, fit
from tests.search_helpers import built, compared, is_png, read_log, searched
from tests.test_pipeline import tiny


class Recorder(Tracker):
    """Keeps summaries and tables."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}
        self.tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {}
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.grown: list[dict[str, Any]] = []
        self.earlier: list[bool] = []
        self.images: list[str] = []

    def summary(self, values: Mapping[str, Any]) -> None:
        self.numbers |= values

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[name] = columns, rows

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        self.logged.append((dict(values), step))

    def rows(self, name: str, columns: Sequence[str], make: Rows, earlier: bool = False) -> bool:
        self.grown += [dict(zip(columns, row, strict=True)) for row in make()]
        self.earlier.append(earlier)
        return len(self.earlier) % 5 == 0

    def image(self, name: str, source: Path | Callable[[], bytes]) -> None:
        self.images.append(name)


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


def test_trials_are_rows_and_the_front_so_far_comes_along(tmp_path: Path) -> None:
    study, recorder = searched(tmp_path, SearchConfig(n_trials=24, anchors=12)), Recorder()
    journal = Journal(Run.open("first", tmp_path), recorder, study.config.objectives)
    journal.resume(study.records[:9], 0.1)
    for record in study.records[9:]:
        journal.trial(record, 0.2)
    failed = Record(24, 24, study.records[0].policy, None, None, False, "out of luck")
    journal.trial(failed, 0.2)
    assert recorder.earlier == [True] + 16 * [False]
    assert [row["trial"] for row in recorder.grown] == [f"t{i:04d}" for i in range(25)]
    for row, record in zip(recorder.grown, study.records, strict=False):
        assert record.values is not None
        assert {name: row[name] for name in record.values} == record.values
        assert (row["policy"], row["share"]) == (record.policy.describe(), record.share)
    assert recorder.grown[-1]["failed"] == "out of luck"
    assert recorder.grown[-1]["recall_error"] is None
    columns, rows = recorder.tables["search/front"]
    told = study.records[:23]  # when rows were sent for the last time
    good = [record for record in told if record.result is not None]
    best = [good[i].id for i in non_dominated([r.values for r in good if r.values], study.config.objectives)]
    assert sorted(row[columns.index("trial")] for row in rows) == sorted(best)


def test_shares_come_as_points_are_compared_and_maps_with_the_front(tmp_path: Path) -> None:
    study = searched(tmp_path, SearchConfig(n_trials=20))
    front, recorder = compared(built(study), study), Recorder()
    journal = Journal(Run.open("first", tmp_path), recorder, study.config.objectives)
    for i, item in enumerate(front.comparisons):
        journal.comparison(item, i)
    shares = [share.value for item in front.comparisons[0].tasks if (share := item.share) is not None]
    assert recorder.logged[0] == (dict(zip(["share/mqar", "share/bytes"], shares, strict=False)), 0)
    journal.front(front)
    assert recorder.images[0] == "front_plot"
    assert set(recorder.images[1:]) == {f"kept_by_head/{item.of}" for item in front.comparisons}
    columns, rows = recorder.tables["kept"]
    assert columns == ["point", "layer", "head", "kept"]
    for point in front.points:
        heads = [[row[3] for row in rows if row[:2] == [point.id, layer]] for layer in range(len(point.policy.layers))]
        assert heads == [list(shares) for shares in point.measured["kept_by_head"]]
    picture = _kept_picture(front.points[0])
    assert is_png(picture)


class Raising:
    """A run of wandb of which call number ``fatal`` fails, whatever it is."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.calls, self.resumed = fatal, 0, False

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        if self.calls == self.fatal:
            raise BrokenPipeError("the service has died")
        return MagicMock()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[list[str], Raising, Run]]:
    """Shows a whole search in a run of wandb that fails at some call; returns the warnings."""
    folder = tmp_path_factory.mktemp("search")
    study = searched(folder, SearchConfig(n_trials=20))
    front = compared(built(study), study)

    def show(fatal: int) -> tuple[list[str], Raising, Run]:
        run, record = Run.open("first", folder / str(fatal)), Raising(fatal)
        run.report.write_text("<p>report</p>")
        run.front_json.write_text("{}")
        Image.new("RGB", (2, 2)).save(run.front_png)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            patch.setattr(wandb, "init", lambda **options: record)
            patch.setattr(wandb, "teardown", lambda exit_code: None)
            patch.setattr("natsl.search.journal._kept_picture", lambda point: run.front_png.read_bytes())
            warnings.simplefilter("always")
            with start_tracker(TrackingConfig(), run, {}) as tracker:
                journal = Journal(run, tracker, study.config.objectives)
                journal.resume(study.records[:15], 0.1)
                for item in study.records[15:]:
                    journal.trial(item, 0.2)
                for i, comparison in enumerate(front.comparisons):
                    journal.comparison(comparison, i)
                journal.front(front)
        return [str(item.message) for item in caught if item.category is UserWarning], record, run

    return show


def test_a_wandb_that_fails_at_any_call_is_one_warning(shown: Callable[[int], tuple[list[str], Raising, Run]]) -> None:
    messages, whole, _ = shown(0)
    assert messages == []
    assert whole.calls > 25
    for fatal in range(1, whole.calls + 1):
        messages, record, run = shown(fatal)
        assert messages == ["wandb failed (the service has died); the run goes on without it"]
        assert record.calls == fatal, "nothing is asked of it any more"
        assert len(read_log(run)) == 5


def test_a_search_goes_on_without_wandb(
    text: str, tmp_path: Path, no_picture: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "teardown", lambda exit_code: None)
    monkeypatch.setattr(wandb, "init", lambda **options: Raising(4))
    plain = {}
    for mode, messages in ((TrackingMode.disabled, 0), (TrackingMode.offline, 1)):
        config = tiny(tmp_path / mode.value, text, objectives=["val_loss", "kept_fraction"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_search(replace(config, tracking=TrackingConfig(mode=mode)))
        assert sum("wandb failed" in str(item.message) for item in caught) == messages
        plain[mode] = {**json.loads((tmp_path / mode.value / "first" / "front.json").read_text()), "facts": None}
    assert plain[TrackingMode.disabled] == plain[TrackingMode.offline]


def test_routers_are_shown_at_checkpoints_and_training_is_the_same(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[tuple[str, int, int]] = []

    def begin(stage: str, total: int, done: int) -> Progress:
        stages.append((stage, total, done))
        return Progress(stage, total, done)

    config = tiny(tmp_path, text)
    data = TaskData(config.data, load_text(text), config.model.vocab_size)
    shape = replace(config.model, router_norm=True)  # its statistics must be those of training alone
    weights = []
    for name, tracker in (("plain", Tracker()), ("shown", recorder := Recorder())):
        recipe = TrainRecipe(TrainConfig(steps=6, batch_size=4, checkpoint_every=2, log_every=3), config.supernet, 0)
        model = fit(Run.open(name, tmp_path), shape, data, recipe, torch.device("cpu"), tracker)
        assert not model.training
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with monkeypatch.context() as patch:
        patch.setattr("natsl.train.Progress", begin)
        fit(Run.open("shown", tmp_path), shape, data, recipe, torch.device("cpu"), Tracker())
    assert stages == [("train", 6, 6)], "resumed, it is finished from the start"
    places = [(row["step"], row["layer"], row["head"]) for row in recorder.grown]
    assert places == [(step, layer, head) for step in (3, 6) for layer in range(2) for head in range(2)]
    for step in (3, 6):
        for layer in range(2):
            kept = [row["kept"] for row in recorder.grown if (row["step"], row["layer"]) == (step, layer)]
            assert sum(kept) / len(kept) == pytest.approx(KEPT_BUDGET, abs=0.03)
