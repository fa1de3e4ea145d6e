"""Whole searches while something around them fails: one warning or one line, and what is finished stays."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl.cli.main import user_line
from natsl.counts import Counts
from natsl.errors import UserError
from natsl.evaluate import Evaluation, count, evaluate
from natsl.export import export_point
from natsl.files import read_json
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.search import judge, pipeline
from natsl.search.pipeline import run_search
from natsl.space.policy import Op, RoutingPolicy
from natsl.space.space import SearchSpace
from natsl.tracking import TrackingConfig, TrackingMode
from tests.search_helpers import is_png
from tests.test_files import failing
from tests.test_pipeline import results, tiny
from tests.test_tracking import Broken, fresh_environment

KEY, PASSWORD = "0123456789abcdef0123456789abcdef01234567", "hunter2hunter2"
TRIALS = 3


@pytest.fixture(autouse=True)
def _verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified in tests of their own."""
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: str) -> Run:
    """A search that nothing disturbed, with its report and its export, made under the umask 0."""
    root = tmp_path_factory.mktemp("finished")
    before = os.umask(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("natsl.export.verify", lambda folder: [])
        try:
            run_search(replace(tiny(root, text, n_trials=TRIALS), export=True))
        finally:
            os.umask(before)
    return Run.open("first", root, create=False)


def copied(run: Run, root: Path) -> Run:
    """The same run below another root."""
    shutil.copytree(run.path, root / run.name)
    return Run.open(run.name, root, create=False)


def line_of(action: Callable[[], object]) -> str:
    """The one line that a command shows when ``action`` fails; a defect with its traceback fails the test."""
    with pytest.raises((OSError, UserError)) as caught:
        action()
    line = user_line(caught.value)
    assert line is not None, repr(caught.value)
    assert "\n" not in line
    return line


def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)


def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.init", failing(errno.ENETUNREACH))


def dies_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.init", lambda **options: Broken(0))


def dies_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.init", lambda **options: Broken(10_000))


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("fault", [no_package, no_start, dies_at_first, dies_at_the_end])
def test_a_tracker_that_fails_is_one_warning_and_changes_no_result(
    fault: Callable[[pytest.MonkeyPatch], None],
    finished: Run,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wandb.teardown", lambda exit_code: None)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    fault(monkeypatch)
    config = replace(tiny(tmp_path, text, n_trials=TRIALS), tracking=TrackingConfig(mode=TrackingMode.offline))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_search(config) is not None
    (message,) = [str(item.message) for item in caught if item.category is UserWarning]
    assert message.startswith("wandb failed (")
    assert message.endswith("; the run goes on without it")
    run = Run.open("first", tmp_path, create=False)
    assert results(run) == results(finished)
    assert run.report.is_file()


def test_a_command_writes_no_secret_and_keeps_to_the_umask(text: str, tmp_path: Path) -> None:
    """With records for Weights & Biases, and a database whose URL has a password."""
    line = [sys.executable, "-m", "search", "experiment=smoke", "name=r", f"root={tmp_path}/runs", "device=cpu"]
    line += ["export=false", f"data.path={text}", "data.seq_len=96", "data.search_sequences=2", "model.width=16"]
    line += ["data.test_sequences=2", "train.steps=1", "search.n_trials=1", "search.uniform_budgets=[0.25]"]
    line += ["model.layers=[routed]", f"tracking.project={KEY}", f"tracking.tags=[{KEY}]", f"tracking.group={KEY}"]
    line += [f"search.storage=sqlite:///{tmp_path}/studies.db?password={PASSWORD}"]
    environment = fresh_environment() | {"WANDB_API_KEY": KEY, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, umask=0o077)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "front.json", "scores.jsonl"} <= {path.name for path in files}
    assert list((tmp_path / "runs/r/wandb").glob("offline-run-*/run-*.wandb"))
    written = {str(path): path.read_bytes() for path in files} | {"terminal": (done.stdout + done.stderr).encode()}
    for where, content in written.items():
        assert KEY.encode() not in content, where
        assert PASSWORD.encode() not in content, where
    for path in (tmp_path / "runs").rglob("*"):
        if "wandb" not in path.parts:
            assert oct(path.stat().st_mode & 0o777) == oct(0o700 if path.is_dir() else 0o600), path


def test_the_files_of_a_search_and_its_export_follow_the_umask(finished: Run) -> None:
    for path in (finished.path, *finished.path.rglob("*")):
        assert oct(path.stat().st_mode & 0o777) == oct(0o777 if path.is_dir() else 0o666), path


@pytest.mark.usefixtures("no_picture")
def test_a_search_on_a_file_system_without_locks_fsync_and_chmod(
    finished: Run, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((os, "fsync"), (os, "chmod"), (Path, "chmod"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, failing(errno.ENOTSUP))
    with pytest.warns(UserWarning, match="has no locks"):
        run_search(replace(tiny(tmp_path, text, n_trials=TRIALS), export=True))
    run = Run.open("first", tmp_path, create=False)
    assert results(run) == results(finished)
    assert [path.name for path in run.exports.iterdir()] == [path.name for path in finished.exports.iterdir()]


FRONTS: dict[str, tuple[dict[str, Any], int]] = {
    "no feasible trial": ({"constraints": {"recall_error": -1.0}}, 0),
    "one trial": ({"n_trials": 1, "anchors": 0}, 1),
    "equal trials": ({"n_trials": 4, "space": SearchSpace(ops=[Op.delta]), "uniform_budgets": []}, 1),
}


@pytest.mark.parametrize(("changes", "points"), FRONTS.values(), ids=FRONTS.keys())
def test_a_front_without_a_trade_is_reported_and_exported_if_there_is_a_point(
    changes: dict[str, Any], points: int, text: str, tmp_path: Path
) -> None:
    front = run_search(replace(tiny(tmp_path, text, **({"n_trials": 2} | changes)), export=True))
    assert front is not None
    assert len(front.points) == points
    run = Run.open("first", tmp_path, create=False)
    assert is_png(run.front_png.read_bytes())
    assert ("nothing to export" in run.report.read_text()) == (points == 0)
    if points:
        assert [path.name for path in run.exports.iterdir()] == [front.knee]
        return
    for pick in ("knee", "t0000"):
        line = line_of(lambda pick=pick: export_point(run, pick))  # type: ignore[misc]
        assert line == "the front of run 'first' is empty: no trial was feasible, so there is nothing to export"
    assert not run.exports.exists()


def test_four_objectives_are_searched_and_drawn_in_pairs(text: str, tmp_path: Path) -> None:
    names = ["recall_error", "val_loss", "kept_fraction", "decode_bytes"]
    front = run_search(tiny(tmp_path, text, n_trials=2, objectives=names))
    assert front is not None
    run = Run.open("first", tmp_path, create=False)
    assert [item["name"] for item in read_json(run.front_json)["objectives"]] == names
    report = run.report.read_text()
    assert report.split("Learned against random")[0].count('<svg viewBox="0 0 480') == 6
    assert is_png(run.front_png.read_bytes())


def in_a_process(work: Callable[[], object]) -> int | None:
    """Do something in a copy of this process; its exit code, negative for the signal that killed it."""

    def alone() -> None:
        torch.set_num_threads(1)  # those of this process are not in the copy
        work()

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


@pytest.mark.usefixtures("no_picture")
def test_a_search_killed_while_it_tests_reports_and_exports_goes_on_there(
    finished: Run, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed for real, at one place after another: nothing is tested twice, and the end is that of a straight run."""
    config, calls = replace(tiny(tmp_path, text, n_trials=TRIALS), export=True), tmp_path / "calls"

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def noted(at: int) -> None:
        """Note every evaluation on the test split, and die in number ``at``."""

        def note(kind: str, policy: RoutingPolicy, routing: object) -> None:
            with calls.open("a") as file:
                file.write(f"{kind} {policy.digest()} {routing}\n")
            if len(calls.read_text().splitlines()) == at:
                kill()

        def evaluated(model: RoutedLM, policy: RoutingPolicy, *more: Any, **named: Any) -> Evaluation:
            note("random", policy, named.get("random_routing"))
            return evaluate(model, policy, *more, **named)

        def counted(model: RoutedLM, policy: RoutingPolicy, *more: Any, **named: Any) -> dict[str, Counts]:
            note("test", policy, None)
            return count(model, policy, *more, **named)

        monkeypatch.setattr(judge, "evaluate", evaluated)
        monkeypatch.setattr(judge, "count", counted)

    def test() -> None:
        noted(at=7)
        run_search(config)

    def report() -> None:
        noted(at=10_000)
        monkeypatch.setattr(pipeline, "render", kill)
        run_search(config)

    def export() -> None:
        noted(at=10_000)
        monkeypatch.setattr("natsl.export.verify", kill)
        run_search(config)

    def rest() -> None:
        noted(at=10_000)
        run_search(config)

    run = Run(tmp_path / "first")
    assert in_a_process(test) == -signal.SIGKILL
    assert in_a_process(report) == -signal.SIGKILL
    assert (run.front_json.exists(), run.report.exists()) == (True, False)
    assert in_a_process(export) == -signal.SIGKILL
    assert run.report.exists()
    assert in_a_process(rest) == 0
    made = Counter(calls.read_text().splitlines())
    assert sum(times - 1 for times in made.values()) == 1  # the one that was cut off
    assert len(made) > 10
    assert results(run) == results(finished)
    knee = read_json(run.front_json)["knee"]
    assert knee in [path.name for path in run.exports.iterdir()]


@pytest.mark.parametrize("name", ["study.db", "front.json", "front.png", "scores.jsonl", "supernet"])
def test_a_folder_in_place_of_a_file_is_one_line_that_names_it(
    name: str, finished: Run, text: str, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink()
        path.mkdir()
    line = line_of(lambda: run_search(tiny(tmp_path, text, n_trials=TRIALS + 1)))
    assert line == f"{os.strerror(errno.EEXIST if name == 'supernet' else errno.EISDIR)}: {path}"


@pytest.mark.parametrize("content", [[], {}, {"points": []}], ids=str)
def test_a_front_of_something_else_is_not_taken_for_the_result(
    content: object, finished: Run, text: str, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    run.front_json.write_text(json.dumps(content))
    line = line_of(lambda: run_search(tiny(tmp_path, text, n_trials=TRIALS)))
    assert line == f"{run.front_json} is not a front written by natsl: move it away, and it is written again"
    run.front_json.unlink()
    assert run_search(tiny(tmp_path, text, n_trials=TRIALS)) is not None
    assert results(run) == results(finished)
