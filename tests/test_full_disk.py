"""A disk that is full, for real where a small file system can be mounted: one line, and the same command goes on."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natsl.cli.main import user_line
from natsl.errors import UserError
from natsl.evaluate import Evaluation
from natsl.run import Run
from natsl.search.config import SearchConfig
from natsl.search.pipeline import run_search
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.space.policy import RoutingPolicy
from tests.search_helpers import problem, read_log, synthetic
from tests.test_pipeline import results, tiny

CONFIG = SearchConfig(n_trials=6)
DISK = 8 << 20  # bytes


def opened(folder: Path) -> PolicyStudy:
    return open_policy_study(folder / "study.db", "first", CONFIG, problem(CONFIG), 0, {"model": "m"})


def outcome(study: PolicyStudy) -> list[tuple[object, ...]]:
    return [(record.index, record.policy, record.values, record.reason) for record in study.records]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small file system can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, free: int) -> None:
    """Leave so many bytes free."""
    (disk / "full").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free))


def message(error: Exception) -> str:
    """What the command line shows; a defect with its traceback fails the test."""
    line = user_line(error)
    assert line is not None, repr(error)
    return line


@pytest.mark.parametrize("kilobytes", [4, 20, 36, 100, 132, 140, 148, 228, 256, 264, 292, 320, 348, 376])
def test_a_disk_full_while_a_study_is_made_leaves_nothing_malformed(kilobytes: int, disk: Path) -> None:
    fill(disk, kilobytes << 10)
    lines = []
    try:
        opened(disk)
    except UserError as error:
        lines.append(message(error))
    assert all("study.db cannot be read or written (d" in line for line in lines)  # disk I/O error, or disk is full
    assert not list(disk.glob("*.new*"))
    (disk / "full").unlink()
    study = opened(disk)
    study.run(synthetic)
    assert len(study.records) == CONFIG.n_trials


def limited(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """Let SQLite take the disk for full once a file has so many pages."""
    connect = sqlite3.connect

    def small(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **named)
        connection.execute(f"PRAGMA max_page_count={pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)


@pytest.mark.parametrize("pages", [1, 10, 25])
def test_a_study_that_does_not_fit_leaves_no_file(pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, pages)
    with pytest.raises(UserError, match=r"study.db cannot be read or written \(database or disk is full\)"):
        opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    opened(tmp_path).run(synthetic)


def test_a_disk_full_in_a_trial_is_one_line_and_loses_one_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).run(synthetic)
    straight = outcome(opened(tmp_path))
    folder = tmp_path / "other"
    folder.mkdir()
    opened(folder)
    pages = (folder / "study.db").stat().st_size // 4096
    limited(monkeypatch, pages)
    with pytest.raises(UserError, match=r"disk is full\): .* run the same command again") as caught:
        opened(folder).run(lambda policy, share: _large(policy))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    study = opened(folder)
    assert len(study.records) < CONFIG.n_trials
    study.run(synthetic)
    assert [row[:2] for row in outcome(study)] == [row[:2] for row in straight]


def _large(policy: RoutingPolicy) -> Evaluation:
    found = synthetic(policy)
    heads = tuple(tuple(kept for _ in range(500)) for kept in found.kept_by_layer)
    return Evaluation(**{**vars(found), "kept_by_head": heads})


def test_a_disk_full_leaves_no_half_line_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open("first", tmp_path)
    run.log({"event": "step", "step": 1})
    write, calls = os.write, []

    def half(handle: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return write(handle, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left") as caught:
        run.log({"event": "step", "step": 2})
    assert message(caught.value) == f"No space left on device: {run.log_file}"
    monkeypatch.undo()
    assert run.log_file.read_text().count("\n") == 1
    run.log({"event": "step", "step": 3})
    assert [record["step"] for record in read_log(run)] == [1, 3]


@pytest.mark.parametrize("kilobytes", [8, 120, 160, 340, 460, 800, 1100, 1130])
def test_a_search_goes_on_after_space_is_freed(
    kilobytes: int, disk: Path, text: str, straight: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first line of the log over checkpoint, study and chart to the report."""
    fill(disk, kilobytes << 10)
    try:
        run_search(tiny(disk, text))
        failed = False
    except (OSError, UserError) as error:
        line = message(error)
        failed = True
    assert failed, "there was space enough"
    assert str(disk) in line
    assert "\n" not in line
    assert not [path for path in disk.rglob("*") if path.name.endswith((".tmp", ".new"))]
    (disk / "full").unlink()
    assert run_search(tiny(disk, text)) is not None
    run = Run.open("first", disk, create=False)
    assert results(run) == straight
    assert [record["trial"] for record in read_log(run) if record["event"] == "trial"][-1] == "t0006"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, text: str) -> Run:
    """A search that has its report and its export."""
    root = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("natsl.export.verify", lambda folder: [])
        run_search(replace(tiny(root, text, n_trials=3), export=True))
    return Run.open("first", root, create=False)


def size(*paths: Path) -> int:
    """Bytes on a disk that gives out blocks."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files if file.is_file())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("stage", ["report", "export"])
def test_a_disk_full_while_it_reports_or_exports_loses_nothing(
    stage: str, share: float, reported: Run, text: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first file to the last: what is there is whole, and the same command goes on."""
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    run, config = Run(disk / "first"), replace(tiny(disk, text, n_trials=3), export=True)
    shutil.copytree(reported.path, run.path)
    reports = (run.front_json, run.front_csv, run.front_png, run.report)
    missing = (*reports, run.exports) if stage == "report" else (run.exports,)
    needed = size(*reports if stage == "report" else missing)
    for path in missing:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    database = size(run.study_db) if stage == "report" else 0  # as much again for its log of pending writes
    fill(disk, database + int(share * needed))
    with pytest.raises((OSError, UserError)) as caught:
        run_search(config)
    assert str(disk) in message(caught.value)
    there = [path for path in reports if path.exists()]
    assert there == list(reports[: len(there)])  # the report comes last
    if run.front_json in there:
        assert results(run) == results(reported)
    if run.front_png in there:
        assert run.front_png.read_bytes() == reported.front_png.read_bytes()
    assert not [path for path in disk.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert not run.exports.exists() or not list(run.exports.iterdir())
    (disk / "full").unlink()
    run_search(config)
    assert results(run) == results(reported)
    assert [path.name for path in run.exports.iterdir()] == [path.name for path in reported.exports.iterdir()]
