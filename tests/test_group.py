"""The same command on another machine joins a search: its workers evaluate, and leave when it has ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import select

from natsl.errors import UserError
from natsl.run import Run
from natsl.search import heartbeat
from natsl.search.config import Launcher, SearchRunConfig
from natsl.search.owner import OWNER, Owner
from natsl.search.pipeline import run_search
from natsl.search.prepare import prepare
from natsl.search.storage import BEAT, SHARED
from natsl.search.study import open_policy_study
from natsl.search.trial import Record
from natsl.search.worker import group
from natsl.search.worker.group import Controller, join, serve
from natsl.search.worker.pool import Workers
from natsl.search.worker.process import Job
from natsl.search.worker.spare import Spares
from natsl.search.worker.table import TASKS, TaskTable
from tests.fake_search import FAKE, fake_search, search
from tests.search_helpers import problem, synthetic
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
        owner = Controller(storage, study)
        assert owner.lives()
        assert f"process {process.pid} on" in owner.describe()
        job = Job("", url, study, 60.0, FAKE, "", 1, {"folder": str(ours), "seconds": 0.05}, "", "")
        table = TaskTable(storage.engine, study)
        counts: list[int] = []
        serve(lambda: Workers(job, ["cpu"] * 2, ours / "workers", table), lambda: owner.beats(60.0), counts.append)
        assert process.wait(20) == 0
    assert not owner.lives()
    assert len(pids(ours)) == 2
    assert not any(map(runs, pids(ours)))
    assert counts == sorted(set(counts)), "only what has changed is shown"
    assert 0 <= len(calls(ours)) - counts[-1] <= 2, "but for what they were at when the search ended"
    begun = [*calls(theirs), *calls(ours)]
    assert len(begun) == len(set(begun))
    study_of_both = search(theirs, config(workers=1, storage=url))
    assert outcome(study_of_both.records) == outcome(straight.records)


def test_what_a_machine_was_at_when_it_left_is_evaluated_by_another(tmp_path: Path) -> None:
    theirs, ours, url = tmp_path / "theirs", tmp_path / "ours", f"sqlite:///{tmp_path}/shared.db"
    for folder in (theirs, ours):
        folder.mkdir()
    with controller(theirs, n_trials=4, workers=1, storage=url, answers={"seconds": 0.5}) as process:
        until(lambda: (theirs / "calls").exists())
        storage = RDBStorage(url)
        study = storage.get_study_id_from_name("first")
        job = Job("", url, study, 60.0, FAKE, "", 1, {"folder": str(ours), "seconds": 600.0}, "", "")
        table = TaskTable(storage.engine, study)
        serve(lambda: Workers(job, ["cpu"], ours / "workers", table), lambda: not (ours / "calls").exists())
        assert process.wait(20) == 0
    assert set(calls(ours)) <= set(calls(theirs))


def test_who_has_not_what_is_searched_cannot_join(
    text: str, tmp_path: Path, stranger: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    theirs = tiny(tmp_path / "theirs", text, n_trials=2, storage=url)
    run_search(theirs)
    study = optuna.load_study(storage=url, study_name="first")
    study.set_user_attr(OWNER, vars(stranger))
    ours = tiny(tmp_path / "ours", text, n_trials=2, storage=url, launcher=Launcher.local)
    with pytest.raises(
        UserError, match=rf"by process {stranger.pid} on .*, which evaluates by itself \(search.launcher"
    ):
        run_search(ours)
    study.set_user_attr(SHARED, {**study.user_attrs[SHARED], "launcher": "local"})
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
    jobs: list[tuple[Job, Spares]] = []
    monkeypatch.setattr(group, "Workers", lambda job, *_, spares: jobs.append((job, spares)))
    monkeypatch.setattr(group, "serve", lambda start, wanted, show: start())
    spares = Spares([])
    assert run_search(replace(ours, search=replace(ours.search, lease_seconds=7.0)), (), spares) is None
    assert [(job.lease_seconds, taken) for job, taken in jobs] == [(60.0, spares)], "as the search"
    alone = tiny(tmp_path / "alone", text, n_trials=2, storage=url)
    with pytest.raises(UserError, match=r"in use by process .* name, or join it with search\.launcher = local"):
        run_search(alone)
    assert not (tmp_path / "alone").exists(), "nothing is trained"


def joins(config: SearchRunConfig) -> bool:
    config, problem, data, _ = prepare(config)
    return join(config, problem, data, torch.device("cpu"))


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said, but for what the text is."""
    return [message for message in caplog.messages if not message.startswith("text: ")]


def test_a_process_that_trains_is_not_followed_in_silence(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    url = f"sqlite:///{tmp_path}/shared.db"
    config = tiny(tmp_path / "runs", text, n_trials=2, storage=url, launcher=Launcher.local)
    with Run.open("first", config.root).lock():
        with pytest.raises(
            UserError, match=r"'first' is in use by another process, which makes no trials at the moment"
        ):
            run_search(config)
        assert notes(caplog) == []
    elsewhere = replace(config, root=str(tmp_path / "elsewhere"))
    assert not joins(elsewhere)
    (note,) = notes(caplog)
    assert note.startswith("search.storage has no study 'first' yet, so this process makes the search and trains its")
    caplog.clear()
    optuna.create_study(storage=url, study_name="first")
    assert not joins(elsewhere)
    (note,) = notes(caplog)
    assert note.startswith(f"the supernet of the study 'first' is not in {tmp_path}/elsewhere/first/supernet: one is")


def test_a_search_whose_study_was_taken_stops_and_leaves_its_tasks(tmp_path: Path, stranger: Owner) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    options = config(workers=1, anchors=8, batch=8, storage=url)

    def take(record: Record) -> None:
        optuna.load_study(storage=url, study_name="first").set_user_attr(OWNER, vars(stranger))

    with (
        pytest.raises(UserError, match=rf"^the study 'first' is process {stranger.pid}'s on .*, which took it over"),
        fake_search(tmp_path, options, seconds=0.1) as (study, judge, _),
    ):
        study.run(judge.search, take, queue=judge.queue)
    after = optuna.load_study(storage=url, study_name="first")
    assert after.user_attrs[OWNER]["pid"] == stranger.pid
    assert len(after.get_trials(states=(TrialState.COMPLETE,))) == 1
    with RDBStorage(url).engine.begin() as connection:
        states = set(connection.execute(select(TASKS.c.state)).scalars())
    assert "waiting" in states
    assert "held" not in states, "another process may wait for it"


def test_a_search_in_its_own_process_stores_nothing_once_its_study_was_taken(tmp_path: Path, stranger: Owner) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    options = config(workers=None, storage=url, launcher=Launcher.inline)

    def take(record: Record) -> None:
        if record.index == at:
            optuna.load_study(storage=url, study_name="first").set_user_attr(OWNER, vars(stranger))

    for at, trials in ((1, 4), (7, 8)):  # in a batch of four, and before the next one is proposed
        study = open_policy_study(tmp_path / "study.db", "first", options, problem(options), 0, {})
        with contextlib.closing(study), pytest.raises(UserError, match="which took it over"):
            study.run(synthetic, take)
        after = optuna.load_study(storage=url, study_name="first")
        assert len(after.get_trials(states=(TrialState.COMPLETE,))) == at + 1
        assert len(after.trials) == trials
        after.set_user_attr(OWNER, "none")


def test_an_owner_beats_whatever_it_is_at_until_it_loses_the_study(
    tmp_path: Path, stranger: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_SECONDS", 0.02)
    url = f"sqlite:///{tmp_path}/shared.db"
    options = config(workers=None, storage=url, launcher=Launcher.inline)
    study = open_policy_study(tmp_path / "study.db", "first", options, problem(options), 0, {})
    attributes = partial(RDBStorage(url).get_study_user_attrs, study.id)
    with contextlib.closing(study):
        until(lambda: BEAT in attributes())
        first = attributes()[BEAT]
        until(lambda: attributes()[BEAT] != first)
        study.beat()
        optuna.load_study(storage=url, study_name="first").set_user_attr(OWNER, vars(stranger))
        study._heartbeat.close()
        last = attributes()[BEAT]
        with pytest.raises(UserError, match="which took it over"):
            study.beat()
    assert attributes()[BEAT] == last
    assert attributes()[OWNER]["pid"] == stranger.pid


def test_a_search_elsewhere_that_gives_no_sign_of_life_is_not_joined(
    tmp_path: Path, stranger: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_FIRST_BEAT", 0.6)
    url = f"sqlite:///{tmp_path}/shared.db"
    study = optuna.create_study(storage=url, study_name="first")
    elsewhere = {"host": "other", "machine": "other", "boot": "other"}
    study.set_user_attr(OWNER, vars(replace(stranger, **elsewhere)))  # type: ignore[arg-type]
    owner = Controller(RDBStorage(url), study._study_id)
    assert not owner.lives()
    assert owner.beats(60.0)
    assert not owner.beats(0.0)
    study.set_user_attr(BEAT, 5.0)
    assert owner.beats(0.5)
