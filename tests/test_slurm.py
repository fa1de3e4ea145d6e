"""Workers in jobs: run by submitit on this machine, and submitted to a Slurm that is a few lines of shell."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.storages import RDBStorage

from natsl.errors import UserError
from natsl.search.config import Launcher, SearchConfig, SlurmConfig
from natsl.search.pipeline import run_search
from natsl.search.question import Question
from natsl.search.score_cache import ScoreCache
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.search.worker import slurm
from natsl.search.worker.dispatch import Dispatcher
from natsl.search.worker.pool import worker_devices
from natsl.search.worker.process import Job
from natsl.search.worker.slurm import SlurmWorkers, make_executor
from natsl.search.worker.table import TaskTable
from tests.fake_search import FAKE, MADE_FROM, search
from tests.search_helpers import problem
from tests.test_pipeline import tiny
from tests.test_workers import FIRST, calls, config, outcome, pids, runs, until

SERVER = "postgresql+psycopg://me:secret@host/studies"
CPU = SlurmConfig(gpus=0, cpus=1)


@contextlib.contextmanager
def jobs(folder: Path, settings: SearchConfig, **answers: Any) -> Iterator[tuple[PolicyStudy, Dispatcher]]:
    """A search whose fake workers are in jobs of this machine."""
    count = settings.workers or 1
    study = open_policy_study(folder / "study.db", "first", settings, problem(settings), 0, MADE_FROM, count)
    with contextlib.closing(study):
        table = TaskTable(study.engine, study.id)
        plain = {"folder": str(folder), **answers}
        job = Job("", settings.storage, study.id, settings.lease_seconds, FAKE, "", 1, plain, "", "")

        def start(wanted: Callable[[str], bool]) -> SlurmWorkers:
            return SlurmWorkers(job, CPU, count, folder / "slurm", table, None, wanted, cluster="local")

        end = time.monotonic() + 120.0

        def on_beat() -> None:
            assert time.monotonic() < end, "nobody answers"
            study.beat()

        with contextlib.closing(Dispatcher(table, start, settings.lease_seconds, on_beat)) as dispatcher:
            yield study, dispatcher


def run(folder: Path, settings: SearchConfig, on_record: Callable[[], None] = lambda: None, **answers: Any) -> Any:
    """The outcome of such a search."""
    with jobs(folder, settings, **answers) as (study, dispatcher):
        judge = ScoreCache(folder / "scores.jsonl", MADE_FROM).judge(dispatcher.judge())
        study.run(judge.search, lambda record: on_record(), queue=judge.queue)
    return outcome(study.records)


@pytest.mark.parametrize("ends", ["SIGKILL", "SIGTERM", "SIGUSR2"])
def test_trials_are_the_same_and_a_job_that_ends_is_replaced(
    ends: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a failure of its node, ``scancel`` and its timeout."""
    caplog.set_level(logging.INFO, logger=slurm.__name__)
    for name in ("local", "jobs"):
        (tmp_path / name).mkdir()
    folder, url = tmp_path / "jobs", f"sqlite:///{tmp_path}/shared.db"
    killed: list[int] = []

    def end_once() -> None:
        if not killed:  # in the middle of a batch: the worker has begun the next policy
            until(lambda: len(calls(folder)) > 1)
            (worker,) = pids(folder)
            killed.append(worker)
            job = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(job, signal.Signals[ends])

    found = run(folder, config(n_trials=6, workers=1, storage=url), end_once, seconds=0.3)
    assert found == outcome(search(tmp_path / "local", config(n_trials=6, workers=1)).records)
    assert len(pids(folder)) == 2, "the job and the one in its place"
    (line,) = [line for line in caplog.messages if line.endswith("another one is submitted")]
    assert {"SIGKILL": "", "SIGTERM": "(it was cancelled)", "SIGUSR2": "(its time was up)"}[ends] in line
    assert len(calls(folder)) - len(set(calls(folder))) == 1, "what was cut off is made again"
    until(lambda: not any(map(runs, pids(folder))))
    logs = sorted(path.name for path in (folder / "slurm").glob("*/0.log"))
    assert logs == ["0.log"] * 2
    assert list((folder / "slurm").glob("*_log.err")) != []


def test_jobs_that_end_before_a_worker_is_ready_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_STARTS", 2)
    said = r"2 Slurm jobs in a row .* the Slurm job \d+ ended \(the text has changed\)"
    with jobs(tmp_path, config(workers=1, storage=f"sqlite:///{tmp_path}/shared.db"), broken=True) as (_, dispatcher):
        for _ in range(2):  # the first one may be taken for a fault of the question
            with pytest.raises(UserError, match=said):
                dispatcher.answer(Question.search(FIRST[0], 1.0))
        assert len(list((tmp_path / "slurm").glob("*_submitted.pkl"))) == 2


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands: sbatch numbers and keeps what it gets, with its environment, and runs nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "sbatch": '[ -e full ] && { echo "sbatch: error: Invalid partition name" >&2; exit 1; }\n'
        'n=$(($(ls *.sbatch 2>/dev/null | wc -l) + 1)); cp "$1" $n.sbatch; env > $n.env\n'
        'echo "Submitted batch job $n"',
        "scancel": 'echo "$1" >> cancelled',
        "squeue": "[ -e queue ] && cat queue",
        "srun": "",
    }
    for name, lines in commands.items():
        (folder / name).write_text(f"#!/bin/sh\ncd {folder}\n{lines}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_slurm_gets_what_the_options_say_and_no_password(
    tmp_path: Path, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "_ASK_SECONDS", 0.05)
    storage = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    table = TaskTable(storage.engine, 1)
    table.create()
    options = SlurmConfig(partition="long", timeout=90, gpus=2, cpus=8, memory=1.5, extra={"account": "mine"})
    folder = tmp_path / "slurm"
    job = Job("", SERVER, 1, 60.0, FAKE, "", 1, {}, "", "")
    with contextlib.closing(SlurmWorkers(job, options, 2, folder, table)) as workers:
        text = (fake_slurm / "1.sbatch").read_text()
        for flag in (
            "partition=long",
            "time=90",
            "gpus-per-node=2",
            "cpus-per-task=8",
            "mem=1536MB",
            "account=mine",
            "no-requeue",
        ):
            assert f"#SBATCH --{flag}\n" in text
        assert f"NATSL_STORAGE={SERVER}\n" in (fake_slurm / "1.env").read_text()
        assert "NATSL_STORAGE" not in os.environ
        written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert len(written) >= 4
        assert not any(b"secret" in content for content in written)
        assert (len(workers.names), workers.count) == (2, 4)
        before = workers.names
        workers.look(1.0)
        assert workers.names == before, "Slurm does not answer"
        (fake_slurm / "queue").write_text("1\n2\n")
        time.sleep(0.06)
        workers.look(1.0)
        assert workers.names == before
        (fake_slurm / "queue").write_text("2\n12\n")

        def replaced() -> bool:
            workers.look(1.0)
            return workers.names != before

        until(replaced)
        assert len(workers.names & before) == 1
        assert len(workers.names) == 2
        (fake_slurm / "full").touch()
        with pytest.raises(UserError, match="Slurm refuses a job: sbatch: error: Invalid partition name"):
            until(lambda: workers.look(1.0))
    assert sorted((fake_slurm / "cancelled").read_text().split()) == ["2"]
    with pytest.raises(UserError, match=r"search.slurm.extra = \{'acount': 'mine'\} is not allowed: .*'acount'"):
        make_executor(SlurmConfig(extra={"acount": "mine"}), folder)


def test_missing_submitit_and_missing_slurm_are_said_before_training(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == "sbatch" else f"/usr/bin/{name}")
    with pytest.raises(UserError, match=r"needs Slurm, whose commands sbatch are not on this machine"):
        make_executor(CPU, tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"needs submitit: pip install 'natsl\[slurm\]'"):
        make_executor(CPU, tmp_path)
    monkeypatch.setattr("natsl.search.pipeline.join", lambda *_: False)
    with pytest.raises(UserError, match="needs submitit"):
        run_search(tiny(tmp_path, text, launcher=Launcher.slurm, storage=SERVER))
    assert not (tmp_path / "first/supernet").exists()


@pytest.mark.parametrize("storage", [None, "sqlite:////shared/studies.db"])
def test_jobs_need_a_database_server(storage: str | None) -> None:
    with pytest.raises(ValueError, match=r"search.storage = .* search.launcher = slurm it must be a database server"):
        SearchConfig(launcher=Launcher.slurm, storage=storage)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"timeout": 0}, "search.slurm.timeout = 0"),
        ({"gpus": -1}, "search.slurm.gpus = -1"),
        ({"cpus": 0}, "search.slurm.cpus = 0"),
        ({"memory": float("nan")}, "search.slurm.memory = nan"),
        ({"extra": {"mem": "4GB"}}, "search.slurm.extra.mem = .* are options of search.slurm itself"),
        ({"extra": {"nodes": 2}}, "search.slurm.extra.nodes = 2 .* one task on one node"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SlurmConfig(**options)


def test_a_job_has_a_worker_on_each_of_its_gpus() -> None:
    settings = SearchConfig(launcher=Launcher.slurm, storage=SERVER, workers=3, slurm=SlurmConfig(gpus=2))
    assert worker_devices(settings, torch.device("cpu")) == ["cuda:0", "cuda:1"] * 3
