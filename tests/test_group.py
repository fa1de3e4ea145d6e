"""The same command on another machine joins a search: its workers evaluate, and leave when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage

from natsl.errors import UserError
from natsl.run import Run
from natsl.search.config import Launcher
from natsl.search.owner import OWNER, Owner
from natsl.search.pipeline import run_search
from natsl.search.storage import BEAT
from natsl.search.worker import group
from natsl.search.worker.group import Controller, serve
from natsl.search.worker.pool import Workers
from natsl.search.worker.process import Job
from natsl.search.worker.table import TaskTable
from tests.fake_search import FAKE, search
from tests.test_pipeline import tiny
from tests.test_workers import ROOT, TRIALS, calls, config, controller, outcome, pids, runs, until


@pytest.fixture
def stranger() -> Iterator[Owner]:
    """A process on this machine, with a run folder of its own."""
    code = "from natsl.search.owner import Owner; print(Owner.named('theirs').dump(), flush=True); input()"
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        owner = Owner.parse(process.stdout.readline())
        assert owner is not None
        yield owner


def test_workers_join_a_search_and_leave_with_it(tmp_path: Path) -> None:
    for name in ("straight", "theirs", "ours"):
        (tmp_path / name).mkdir()
    straight = search(tmp_path / "straight", config(workers=1))
    theirs, ours, url = tmp_path / "theirs", tmp_path / "ours", f"sqlite:///{tmp_path}/shared.db"
    options = {"folder": str(theirs), "n_trials": TRIALS, "anchors": 4, "batch": 4, "workers": 1, "storage": url}
    line = [sys.executable, "-m", "tests.fake_search", json.dumps({**options, "answers": {"seconds": 0.3}})]
    with subprocess.Popen(line, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        until(lambda: (theirs / "calls").exists())
        storage = RDBStorage(url)
        study = storage.get_study_id_from_name("first")
        elsewhere = Controller(storage, study)
        assert elsewhere.lives()
        assert f"process {process.pid} on" in elsewhere.describe()
        job = Job("", url, study, 60.0, FAKE, "", 1, {"folder": str(ours), "seconds": 0.05}, "", "")
        table = TaskTable(storage.engine, study)
        serve(lambda: Workers(job, ["cpu"] * 2, ours / "workers", table), lambda: elsewhere.beats(60.0))
        assert process.wait(20) == 0
    assert not elsewhere.lives()
    assert len(pids(ours)) == 2
    assert not any(map(runs, pids(ours)))
    begun = [*calls(theirs), *calls(ours)]
    assert len(begun) == len(set(begun))
    study_of_both = search(theirs, config(workers=1, storage=url))
    assert outcome(study_of_both.records) == outcome(straight.records)


def test_who_has_not_what_is_searched_cannot_join(
    text: str, tmp_path: Path, stranger: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    theirs = tiny(tmp_path / "theirs", text, n_trials=2, storage=url)
    run_search(theirs)
    optuna.load_study(storage=url, study_name="first").set_user_attr(OWNER, vars(stranger))
    ours = tiny(tmp_path / "ours", text, n_trials=2, storage=url, launcher=Launcher.local)
    with pytest.raises(UserError, match=r"which another process makes, is missing in .*/ours/first/supernet: to join"):
        run_search(ours)
    assert not (tmp_path / "ours").exists()
    source = Run.open("first", theirs.root, create=False)
    shutil.copytree(source.supernet, tmp_path / "ours/first/supernet")
    shutil.copy(source.version, tmp_path / "ours/first")
    with pytest.raises(UserError, match=r"has other settings \(seed: 0 → 1\): join it with the same command"):
        run_search(replace(ours, seed=1))
    with pytest.raises(UserError, match=r"has search\.batch_size = 8, not 4: join it with the same command"):
        run_search(replace(ours, search=replace(ours.search, batch_size=4)))
    jobs: list[Job] = []
    monkeypatch.setattr(group, "Workers", lambda job, *_: jobs.append(job))
    monkeypatch.setattr(group, "serve", lambda start, wanted: start())
    assert run_search(replace(ours, search=replace(ours.search, lease_seconds=7.0))) is None
    assert [job.lease_seconds for job in jobs] == [60.0], "as the search"
    with pytest.raises(UserError, match="in use by process"):
        run_search(tiny(tmp_path / "ours", text, n_trials=2, storage=url))  # whose process evaluates by itself


def test_a_search_elsewhere_that_gives_no_sign_of_life_is_not_joined(
    tmp_path: Path, stranger: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_FIRST_BEAT", 0.6)
    url = f"sqlite:///{tmp_path}/shared.db"
    study = optuna.create_study(storage=url, study_name="first")
    elsewhere = {"host": "other", "machine": "other", "boot": "other"}
    study.set_user_attr(OWNER, vars(replace(stranger, **elsewhere)))  # type: ignore[arg-type]
    theirs = Controller(RDBStorage(url), study._study_id)
    assert not theirs.lives()
    assert theirs.beats(60.0)
    assert not theirs.beats(0.0)
    study.set_user_attr(BEAT, 5.0)
    assert theirs.beats(0.5)


def test_workers_that_leave_in_the_middle_give_their_task_back(tmp_path: Path) -> None:
    theirs, ours, url = tmp_path / "theirs", tmp_path / "ours", f"sqlite:///{tmp_path}/shared.db"
    for folder in (theirs, ours):
        folder.mkdir()
    with controller(theirs, workers=1, storage=url, answers={"seconds": 0.3}) as process:
        until(lambda: (theirs / "calls").exists())
        storage = RDBStorage(url)
        study = storage.get_study_id_from_name("first")
        job = Job("", url, study, 60.0, FAKE, "", 1, {"folder": str(ours), "seconds": 600}, "", "")
        with contextlib.closing(Workers(job, ["cpu"], ours / "workers", TaskTable(storage.engine, study))):
            until(lambda: (ours / "calls").exists())
        assert process.wait(60) == 0, "the search does without them"
    assert len(calls(ours)) == 1
    assert calls(ours)[0] in calls(theirs)
