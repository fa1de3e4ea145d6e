"""Weights & Biases as a guest: nothing that happens to it reaches the run, and no secret reaches it."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from natsl.run import Run
from natsl.tracking import Tracker, TrackingConfig, TrackingMode, WandbTracker, start_tracker
from tests.wandb_helpers import read_history

ROOT = Path(__file__).parents[1]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open("r", tmp_path)


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account, and the variable that a tracker sets is taken back."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", "x")
    monkeypatch.delenv("WANDB_DATA_DIR")
    yield
    os.environ.pop("WANDB_DATA_DIR", None)


def fresh_environment() -> dict[str, str]:
    """Variables for a process that starts a wandb service of its own instead of using ours."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}, "PYTHONPATH": str(ROOT)}


def row(i: int) -> list[list[str | None]]:
    """A row of a table that grows."""
    return [[f"t{i}", None if i % 2 else "why"]]


def use_everything(tracker: Tracker, run: Run) -> None:
    """Call every method of a tracker."""
    run.report.write_text("<p>report</p>")
    Image.new("RGB", (2, 2)).save(run.front_png)
    for step in range(3):
        tracker.log({"train/loss": 1.0 / (step + 1), "train/lr": float("nan")}, step)
    tracker.log({"search/recall_error": 0.5, "state": "complete"}, 0)
    tracker.log({"seconds": 3.5})
    tracker.summary({"knee": {"recall_error": 0.1}, "hypervolume": float("inf")})
    tracker.table("front", ["id", "kept"], [["t1", 0.25], ["t2", None], [3, "x"]])
    for i in range(12):
        tracker.rows("search/trials", ["id", "failed"], partial(row, i))
    tracker.html("report", run.report)
    tracker.image("front", run.front_png)
    tracker.image("kept", run.front_png.read_bytes)
    tracker.file("report", run.report)
    tracker.file("folder", run.path / "data")
    tracker.finish()
    tracker.log({"after": 1})
    tracker.finish()


def test_disabled_does_nothing(run: Run) -> None:
    tracker = start_tracker(TrackingConfig(mode=TrackingMode.disabled), run, {})
    assert type(tracker) is Tracker
    use_everything(tracker, run)
    assert not run.wandb.exists()


OFFLINE = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("error", UserWarning)
from pathlib import Path
from natsl.run import Run
from natsl.tracking import TrackingConfig, WandbTracker, start_tracker
from test_tracking import use_everything
run = Run.open("r", sys.argv[1])
(run.path / "data").mkdir()
(run.path / "data" / "a.txt").write_text("a")
settings = {{"seed": 3, "model": {{"key_dim": 16}}, "api_key": "hunter2hunter2", "text": {key!r}}}
tracker = start_tracker(TrackingConfig(project={key!r}, group={key!r}, tags=[{key!r}]), run, settings)
assert type(tracker) is WandbTracker
print({key!r})
tracker.log({{"text": {key!r}, "password": "hunter2hunter2"}})
use_everything(tracker, run)
"""


def test_offline_records_everything_but_secrets(tmp_path: Path) -> None:
    code = OFFLINE.format(tests=str(ROOT / "tests"), key=KEY)
    environment = fresh_environment() | {"WANDB_API_KEY": KEY}
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == KEY + "\n"
    assert done.stderr == ""
    folder = tmp_path / "runs" / "r" / "wandb"
    (record,) = folder.glob("offline-run-*/run-*.wandb")
    data = record.read_bytes()
    for text in (b"train/loss", b"train/step", b"search/recall_error", b"hypervolume", b"key_dim", b"report"):
        assert text in data
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
            assert b"hunter2hunter2" not in path.read_bytes(), path
    assert list(folder.glob("offline-run-*/files/media/table/front*"))
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["runs"]


JOBS = """
import sys
from pathlib import Path
from wandb.sdk.artifacts.staging import get_staging_dir
from natsl.run import Run
from natsl.tracking import TrackingConfig, start_tracker
for name in ("a", "b", "a"):
    run = Run.open(name, sys.argv[1])
    (run.path / "a.txt").write_text(name)
    tracker = start_tracker(TrackingConfig(), run, {})
    assert Path(get_staging_dir()) == run.wandb.absolute() / "artifacts" / "staging"
    tracker.file("text", run.path / "a.txt")
    tracker.finish()
"""


def test_a_resumed_run_is_one_wandb_run_and_jobs_stage_apart(tmp_path: Path) -> None:
    command = [sys.executable, "-c", JOBS, str(tmp_path)]
    done = subprocess.run(command, env=fresh_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = {name: [path.name for path in (tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")] for name in "ab"}
    assert len(set(ids["a"])) == 1, "twice the same id"
    assert set(ids["a"]).isdisjoint(ids["b"])


def count_warnings(action: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(item.message) for item in caught if item.category is UserWarning]


def one_warning(run: Run, config: TrackingConfig | None = None) -> str:
    """The one warning of a tracker that cannot start; all its methods then do nothing."""

    def action() -> None:
        tracker = start_tracker(config or TrackingConfig(), run, {})
        assert type(tracker) is Tracker
        use_everything(tracker, run)

    (message,) = count_warnings(action)
    assert message.startswith("wandb failed (")
    assert message.endswith("); the run goes on without it")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("error", [ImportError("No module named 'wandb'"), TypeError("protobuf"), RuntimeError("")])
def test_a_package_that_is_missing_or_broken(error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "wandb":
            raise error
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert (str(error) or "RuntimeError") in one_warning(run)


def test_a_folder_that_cannot_be_written_is_not_replaced_by_another(run: Run) -> None:
    run.wandb.write_text("a file in its place")
    assert "File exists" in one_warning(run)
    assert run.wandb.read_text() == "a file in its place"


def test_online_without_a_key(run: Run) -> None:
    assert "there is no API key" in one_warning(run, TrackingConfig(mode=TrackingMode.online))


def test_a_start_that_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(*arguments: Any, **options: Any) -> None:
        raise wandb.errors.CommError(f"no network\nfor {KEY}")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "init", fail)
    assert one_warning(run) == "wandb failed (no network for <removed>); the run goes on without it"


class Broken:
    """A record that fails from some call on."""

    def __init__(self, good: int) -> None:
        self.good = good
        self.resumed = False
        self.summary: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, *arguments: Any, **options: Any) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        if len(self.rows) == self.good:
            raise BrokenPipeError("the service has died")
        self.rows.append(row)

    def log_artifact(self, artifact: object) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        raise BrokenPipeError("the service has died")


@pytest.mark.parametrize("good", [0, 2, 5, 7, 99], ids=["first", "third", "later", "media", "finish"])
def test_dying_in_the_middle(good: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    record = Broken(good)
    ended = []
    monkeypatch.setattr(wandb, "init", lambda **options: record)
    monkeypatch.setattr(wandb, "teardown", lambda exit_code: ended.append(exit_code))
    (run.path / "data").mkdir()
    (run.path / "data" / "a").touch()
    messages = count_warnings(lambda: use_everything(start_tracker(TrackingConfig(), run, {}), run))
    assert messages == ["wandb failed (the service has died); the run goes on without it"]
    assert ended == [1]


def test_steps_of_stages_are_kept_apart(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    record = Broken(99)
    monkeypatch.setattr(wandb, "init", lambda **options: record)
    tracker = start_tracker(TrackingConfig(), run, {})
    tracker.log({"train/loss": 1.0}, 240)
    tracker.log({"search/error": 0.5, "search/cost": float("inf")}, 0)
    assert record.rows == [
        {"train/loss": 1.0, "train/step": 240},
        {"search/error": 0.5, "search/cost": None, "search/step": 0},
    ]


GROWING = """
import sys
from natsl.run import Run
from natsl.tracking import TrackingConfig, start_tracker
run = Run.open("r", sys.argv[1])
tracker = start_tracker(TrackingConfig(), run, {})
columns = ["trial", "kept", "failed"]
tracker.rows("search/trials", columns, lambda: [[f"t{i}", 0.5, None] for i in range(40)], earlier=True)
for i in range(40, 400):
    row = [f"t{i}", None, "out of memory"] if i % 7 == 0 else [f"t{i}", i / 400, None]
    tracker.rows("search/trials", columns, lambda: [row])
tracker.finish()
"""


def test_a_growing_table_is_sent_in_few_pieces_and_no_row_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GROWING, str(tmp_path)]
    done = subprocess.run(command, env=fresh_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = tmp_path.glob("r/wandb/offline-run-*/run-*.wandb")
    pieces = [row for row in read_history(record) if "search/trials/path" in row]
    assert {piece["search/trials/_type"] for piece in pieces} == {"incremental-table-file"}
    assert [piece["search/trials/increment_num"] for piece in pieces] == list(range(len(pieces)))
    rows = [
        row
        for piece in pieces
        for row in json.loads((record.parent / "files" / piece["search/trials/path"]).read_text())["data"]
    ]
    assert [row[0] for row in rows] == [f"t{i}" for i in range(400)]
    assert rows[42] == ["t42", None, "out of memory"]
    assert rows[43] == ["t43", 43 / 400, None]
    assert len(pieces) < 40


def test_a_run_that_is_gone_on_with_online_has_the_earlier_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    record = Broken(99)
    record.resumed = True
    monkeypatch.setattr(wandb, "init", lambda **options: record)
    tracker = start_tracker(TrackingConfig(), run, {})
    made: list[int] = []

    def rows(count: int) -> list[list[int]]:
        made.append(count)
        return [[i] for i in range(count)]

    assert not tracker.rows("trials", ["i"], lambda: rows(30), earlier=True)
    assert not tracker.rows("trials", ["i"], lambda: rows(7))
    assert tracker.rows("trials", ["i"], lambda: rows(1))
    assert (made, len(record.rows)) == ([7, 1], 1)
    assert not Tracker().rows("trials", ["i"], lambda: rows(1))
    assert made == [7, 1], "the null object asks for nothing"


def test_workers_start_no_runs() -> None:
    sources = list((ROOT / "search" / "worker").glob("*.py"))
    assert len(sources) > 5
    assert not [path.name for path in sources if re.search("start_tracker|wandb", path.read_text())]


def test_interrupts_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def interrupt(**options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start_tracker(TrackingConfig(), run, {})


def test_the_end_tells_success_from_failure() -> None:
    class Noted(Tracker):
        def __init__(self) -> None:
            self.ends: list[bool] = []

        def finish(self, ok: bool = True) -> None:
            self.ends.append(ok)

    tracker = Noted()
    with tracker:
        pass
    with pytest.raises(RuntimeError), tracker:
        raise RuntimeError
    assert tracker.ends == [True, False]


KILLED = """
import os, sys, subprocess, json
from natsl.run import Run
from natsl.tracking import TrackingConfig, start_tracker
tracker = start_tracker(TrackingConfig(), Run.open("r", sys.argv[1]), {})
print("ready", flush=True)
input()
for i in range(3):
    tracker.log({"a": i}, i)
tracker.finish()
print("done")
"""


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def test_a_killed_service_is_one_warning_and_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "runs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=fresh_environment(),
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        services = children(process.pid)
        assert services
        for service in services:
            os.kill(service, signal.SIGKILL)
        time.sleep(0.3)
        out, err = process.communicate("\n", timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "done\n")
    assert err.count("UserWarning: wandb failed") == 1
    assert "Traceback" not in err


def test_a_tracker_is_what_the_null_object_is() -> None:
    """Every method of the null object is overridden, and nothing else is public."""

    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(WandbTracker) == public(Tracker)
    assert json.dumps(sorted(public(Tracker))) == json.dumps(
        ["file", "finish", "html", "image", "log", "rows", "summary", "table"]
    )
