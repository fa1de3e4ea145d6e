"""Workers of a search under real signals: no trial is lost or made twice, whatever ends, hangs or stops."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from sqlalchemy.exc import OperationalError

from natsl.errors import UserError
from natsl.files import from_plain, to_plain
from natsl.search.config import Launcher, SearchConfig, SearchRunConfig
from natsl.search.fault import SearchFailedError, WorkerError
from natsl.search.judge import Judge
from natsl.search.owner import Owner
from natsl.search.question import Question
from natsl.search.study import PolicyStudy
from natsl.search.trial import Record
from natsl.search.worker.child import kill
from natsl.search.worker.pool import Workers, last_line, worker_devices
from natsl.search.worker.process import Job, _Worker
from natsl.search.worker.table import TaskTable, open_engine
from natsl.threads import threads_each
from tests.fake_answers import FakeAnswers, evaluation
from tests.fake_search import fake_search, search
from tests.search_helpers import problem
from tests.soak import soak

ROOT = Path(__file__).parents[1]
TRIALS = 12
FIRST = problem(SearchConfig()).first
THIRD = FIRST[2].digest()
Outcome = list[tuple[object, ...]]


def config(**changes: Any) -> SearchConfig:
    return SearchConfig(**{"n_trials": TRIALS, "anchors": 4, "batch": 4, "workers": 2, **changes})


def outcome(records: Sequence[Record]) -> Outcome:
    return [(r.index, r.policy.digest(), r.values, r.reason, r.same_as, r.feasible) for r in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The trials of a search with one worker in which nothing went wrong."""
    return outcome(search(tmp_path_factory.mktemp("straight"), config(workers=1)).records)


def calls(folder: Path) -> list[str]:
    """Policy and share of every evaluation that was begun."""
    return [line.rpartition(" ")[0] for line in (folder / "calls").read_text().splitlines()]


def pids(folder: Path) -> set[int]:
    """The workers that have evaluated anything."""
    return {int(line.rpartition(" ")[2]) for line in (folder / "calls").read_text().splitlines()}


def hung(folder: Path) -> str:
    """The process that an evaluation which hangs has started; empty: there is none."""
    child = folder / "child"
    return child.read_text() if child.exists() else ""


def runs(pid: int) -> bool:
    """Whether a process is there, zombies included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.02)


@contextmanager
def controller(folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A search in a process of its own."""
    line = json.dumps({"folder": str(folder), "n_trials": TRIALS, "anchors": 4, "batch": 4, "workers": 2, **options})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.fake_search", line]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_trials_are_those_of_one_worker(straight: Outcome, tmp_path: Path) -> None:
    study = search(tmp_path, config())
    assert outcome(study.records) == straight
    assert len(calls(tmp_path)) == len(set(calls(tmp_path)))
    assert len(pids(tmp_path)) == 2
    assert not any(runs(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize(("fault", "name"), [("kill", "-9, SIGKILL"), ("exit", "7 (out of luck)")])
def test_a_trial_whose_worker_ends_is_evaluated_again(
    fault: str, name: str, straight: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    study = search(tmp_path, config(), fault=fault, policy=THIRD, times=1)
    assert outcome(study.records) == straight
    assert [item for item in calls(tmp_path) if calls(tmp_path).count(item) > 1] == [f"{THIRD} 0.25"] * 2
    trials = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="first").trials
    assert [trial.user_attrs.get("history") for trial in trials if "history" in trial.user_attrs] == [
        [f"worker ended with exit code {name}: put back"]
    ]
    (note,) = caplog.messages
    text, _, log = note.rpartition("; another one is started on cpu, log: ")
    assert text == f"worker ended with exit code {name}"
    assert Path(log).parent == tmp_path / "workers"
    assert ("out of luck" in Path(log).read_text()) is (fault == "exit")


@pytest.mark.parametrize("fault", ["exit", "segfault", "kill"])
def test_a_trial_that_ends_workers_again_and_again_fails(fault: str, straight: Outcome, tmp_path: Path) -> None:
    study = search(tmp_path, config(), fault=fault, policy=THIRD, times=99)
    code = {"exit": "7 (out of luck)", "segfault": "-11, SIGSEGV", "kill": "-9, SIGKILL"}[fault]
    assert study.records[2].reason == f"worker ended with exit code {code}"
    assert study.records[2].transient
    assert calls(tmp_path).count(f"{THIRD} 0.25") == 2
    assert len(study.records) == TRIALS
    again = search(tmp_path, config())  # it may have been the machine's fault
    assert outcome(again.records)[:4] == straight[:4]


def test_a_trial_without_memory_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    study = search(tmp_path, config(workers=1), fault="oom", policy=THIRD, times=1)
    assert study.records[2].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert study.records[2].transient
    assert [record.reason for record in study.records].count(None) == TRIALS - 1
    assert len(pids(tmp_path)) == 1, "the worker goes on"


def test_a_policy_that_gives_no_number_fails_for_good(tmp_path: Path) -> None:
    study = search(tmp_path, config(), fault="nan", policy=THIRD, times=1)
    assert study.records[2].reason == "val_loss is nan"
    assert not study.records[2].transient


def test_a_worker_whose_device_is_lost_is_replaced(straight: Outcome, tmp_path: Path) -> None:
    fault: dict[str, Any] = {"fault": "oom", "policy": THIRD, "times": 1, "device lost": True}
    study = search(tmp_path, config(workers=1), **fault)
    assert [record.reason for record in study.records].count(None) == TRIALS - 1
    assert len(pids(tmp_path)) == 2


def test_a_trial_that_hangs_is_ended_with_its_processes(tmp_path: Path) -> None:
    study = search(tmp_path, config(trial_timeout=1.0), fault="hang", policy=THIRD, times=1)
    assert study.records[2].reason == "an evaluation took longer than search.trial_timeout = 1 s"
    assert [record.reason for record in study.records].count(None) == TRIALS - 1
    child = int(hung(tmp_path))
    until(lambda: not runs(child) or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:3])
    assert calls(tmp_path).count(f"{THIRD} 0.25") == 1


def test_the_search_stops_when_too_many_trials_fail(tmp_path: Path) -> None:
    with pytest.raises(SearchFailedError, match="trials failed, more than search"):
        search(tmp_path, config(n_trials=40, min_failures=4), fault="exit", times=999)
    assert not any(runs(pid) for pid in pids(tmp_path))


def test_a_worker_that_cannot_start_ends_the_search_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the text has changed$"):
        search(tmp_path, config(), broken=True)


def test_a_worker_that_is_stopped_loses_its_trial_and_goes_on_later(
    straight: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock jumps meanwhile, which must not matter."""
    wall = iter(range(0, 10**9, 10**5))
    monkeypatch.setattr(time, "time", lambda: float(next(wall)))
    with fake_search(tmp_path, config(lease_seconds=1.0), fault="stop", policy=THIRD, times=1) as (study, judge, _):
        study.run(judge.search, queue=judge.queue)
        stopped = int(next(line for line in (tmp_path / "calls").read_text().splitlines() if THIRD in line).split()[-1])
        assert Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        os.kill(stopped, signal.SIGCONT)
        log = tmp_path / "workers"
        until(lambda: any("its result is ignored" in item.read_text() for item in log.iterdir()))
        questions = [Question.search(policy, 0.5) for policy in FIRST[:8]]
        judge.queue.ahead(questions)
        for question in questions:
            judge.search(question.policies[0], 0.5)
        assert runs(stopped)
        assert any(str(stopped) in line and " 0.5 " in line for line in (tmp_path / "calls").read_text().splitlines())
    assert outcome(study.records) == straight
    assert not runs(stopped)


def test_a_worker_that_is_stopped_is_ended_when_its_time_is_up(straight: Outcome, tmp_path: Path) -> None:
    settings = config(workers=1, lease_seconds=1.0, trial_timeout=3.0)
    with fake_search(tmp_path, settings, fault="stop", policy=THIRD, times=1) as (study, judge, dispatcher):
        study.run(judge.search, queue=judge.queue)
        stopped = int(next(line for line in (tmp_path / "calls").read_text().splitlines() if THIRD in line).split()[-1])
        until(lambda: dispatcher._step() or not runs(stopped))
    assert outcome(study.records) == straight


def test_a_worker_that_waits_for_a_task_is_not_timed(tmp_path: Path) -> None:
    with fake_search(tmp_path, config(workers=1, trial_timeout=100.0), seconds=1.0) as (_, judge, dispatcher):
        judge.search(FIRST[0], 0.25)
        workers = dispatcher._workers
        assert isinstance(workers, Workers)
        until(lambda: dispatcher._step() or workers._seats[0].lease is None)
        workers.look(1000.0)
        workers.look(1000.0)
        judge.search(FIRST[1], 0.25)
        assert workers.states[0].starts == 1
    assert len(pids(tmp_path)) == 1


def test_a_task_that_was_claimed_while_its_worker_was_ended_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Question.search(policy, 0.25) for policy in FIRST[:2])
    with fake_search(tmp_path, config(workers=1, trial_timeout=100.0), fault="hang", times=1) as (_, judge, dispatcher):
        table, workers = dispatcher._table, dispatcher._workers

        def claim_and_kill(process: subprocess.Popen[bytes]) -> None:
            monkeypatch.setattr("natsl.search.worker.pool.kill", kill)
            (task,) = table.running()
            assert table.finish(task.lease, evaluation(FIRST[0], 0.25))
            assert table.claim(task.worker, Owner.named(task.worker)) is not None
            kill(process)

        judge.queue.ahead([first, second])
        until(lambda: dispatcher._step() or hung(tmp_path))
        workers.look(0.0)
        monkeypatch.setattr("natsl.search.worker.pool.kill", claim_and_kill)
        workers.look(1000.0)
        assert judge.search(FIRST[1], 0.25).val_loss is not None
        assert judge.queue.history(second) == ["its worker was ended over another task: put back"]
        assert judge.search(FIRST[0], 0.25).val_loss is not None


def test_a_worker_beats_until_its_result_is_stored_and_a_defect_leaves_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "1234-secret")
    question = Question.search(FIRST[0], 0.25)
    table = TaskTable(open_engine(tmp_path / "study.db", None), 1)
    table.create()
    table.submit({question.key: question.to_dict()})
    worker = _Worker(Job(str(tmp_path / "study.db"), None, 1, 60.0, "", "", 1, {}, "", "", name="w"), os.dup(1))
    leases = []

    def finish(lease: str, answer: Any, error: Any) -> bool:
        leases.append(worker._lease == lease)
        return table.finish(lease, answer, error)

    monkeypatch.setattr(worker._table, "finish", finish)

    class Faulty(FakeAnswers):
        def __init__(self) -> None:
            self._config = {}

        def __call__(self, question: Question) -> Any:
            raise KeyError("1234-secret")

    assert worker._work(Faulty())
    assert leases == [True]
    assert worker._lease is None
    trace = capfd.readouterr().err
    assert "Traceback" in trace
    assert "KeyError: '<removed>'" in trace


def test_the_last_line_of_a_log_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "1234-secret")
    log = tmp_path / "0.log"
    log.write_text("before\n" + "x" * 292 + " 1234-secret of postgresql://me:hidden@host\n\n")
    assert last_line(log) == ("x" * 292 + " <removed>")[:300]
    log.write_text("no postgresql://me:hidden@host\n")
    assert last_line(log) == "no postgresql://me:<removed>@host"


def test_another_worker_is_started_for_one_that_is_stopped(
    straight: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    study = search(tmp_path, config(workers=1, lease_seconds=1.0), fault="stop", policy=THIRD, times=1)
    assert outcome(study.records) == straight
    why = "worker gave no sign of life for search.lease_seconds = 1 s"
    assert caplog.messages == [f"{why} (on cpu, log: {tmp_path}/workers/0.log)"]
    assert len(pids(tmp_path)) == 2


def test_a_result_whose_search_ended_before_it_was_told_is_adopted(
    straight: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(PolicyStudy, "tell", kill)
    with pytest.raises(Killed):
        search(tmp_path, config())
    monkeypatch.undo()
    before = calls(tmp_path)
    assert outcome(search(tmp_path, config()).records) == straight
    again = [item for item in calls(tmp_path) if calls(tmp_path).count(item) > 1]
    assert set(again) <= set(before[-2:]), "at most what the two workers were at"


def test_workers_end_with_their_controller_and_the_search_goes_on(straight: Outcome, tmp_path: Path) -> None:
    with controller(tmp_path, answers={"fault": "hang", "policy": THIRD, "times": 1}) as process:
        until(lambda: hung(tmp_path) and len(pids(tmp_path)) == 2)
        workers = pids(tmp_path)
        assert all(map(runs, workers))
        process.kill()
        process.wait()
        until(lambda: not any(map(runs, workers)), 5.0)
    os.kill(int(hung(tmp_path)), signal.SIGKILL)
    study = search(tmp_path, config())
    assert outcome(study.records) == straight
    assert not study.records[2].history


def test_sigterm_puts_back_what_was_running(straight: Outcome, tmp_path: Path) -> None:
    with controller(tmp_path, answers={"fault": "hang", "policy": THIRD, "times": 1}) as process:
        until(lambda: hung(tmp_path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        assert not any(map(runs, pids(tmp_path)))
    assert outcome(search(tmp_path, config()).records) == straight


@pytest.mark.parametrize("times", [1, 2], ids="Ctrl-C {}×".format)
def test_ctrl_c(times: int, straight: Outcome, tmp_path: Path) -> None:
    """Once: what is being evaluated is finished. Twice: nothing is waited for."""
    with controller(tmp_path, workers=1, answers={"seconds": 1.0 if times == 1 else 600.0}) as process:
        until(lambda: (tmp_path / "calls").exists() and calls(tmp_path))
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "draining\n"
        if times == 2:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert not any(map(runs, pids(tmp_path)))
    begun = calls(tmp_path)
    assert len(begun) == 1
    assert outcome(search(tmp_path, config()).records) == straight
    assert calls(tmp_path).count(begun[0]) == times


@pytest.mark.parametrize("workers", [1, 2])
def test_what_can_wait_is_for_workers_that_would_be_idle(workers: int, tmp_path: Path) -> None:
    question, next_one = Question.search(FIRST[0], 0.5), Question.search(FIRST[1], 0.5)
    with fake_search(tmp_path, config(workers=workers), seconds=0.5) as (_, judge, _):
        judge.queue.later([question])
        judge.queue.ahead([next_one])
        while not judge.queue.ready(next_one):
            judge.queue.wait()
        assert judge.search(FIRST[1], 0.5).val_loss is not None
        if workers > 1:
            until(lambda: f"{FIRST[0].digest()} 0.5" in calls(tmp_path))
        else:
            assert len(calls(tmp_path)) == 1
        assert judge.search(FIRST[0], 0.5).val_loss is not None
    assert len(calls(tmp_path)) == 2


def test_errors_keep_their_kind(tmp_path: Path) -> None:
    with fake_search(tmp_path, config(workers=1), fault="oom", times=1) as (_, judge, _):
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried"):
            judge.search(FIRST[0], 0.25)
        assert judge.search(FIRST[0], 0.25).val_loss is not None, "asked again, it is evaluated again"


def test_a_worker_error_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    with fake_search(tmp_path, config(workers=1), fault="exit", times=2) as (_, judge, _), pytest.raises(WorkerError):
        judge.search(FIRST[0], 0.25)


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", 0), ("batch", 0), ("trial_timeout", 0.0), ("lease_seconds", -1.0), ("lease_seconds", float("inf"))],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"search.{name} = {value!r}"):
        SearchConfig(**{name: value})  # type: ignore[arg-type]


def take_answers(judge: Judge) -> None:
    """Wait for three answers, and then take all of them."""
    questions = [Question.search(policy, 0.5) for policy in FIRST[:3]]
    judge.queue.ahead(questions)
    while not all(map(judge.queue.ready, questions)):
        judge.queue.wait()
    for question in questions:
        judge.search(question.policies[0], 0.5)


def test_answers_that_were_given_out_leave_the_table(tmp_path: Path) -> None:
    with fake_search(tmp_path, config(workers=1)) as (_, judge, _):
        take_answers(judge)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        states = [state for (state,) in connection.execute("SELECT state FROM natsl_tasks ORDER BY id")]
    assert states == ["used", "used", "done"], "the last answer may be what could not be stored"


def test_a_database_that_is_gone_at_the_end_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise OperationalError("UPDATE", {}, Exception("gone"))

    def end(judge: Judge) -> None:
        take_answers(judge)
        monkeypatch.setattr(TaskTable, "use", gone)
        monkeypatch.setattr(TaskTable, "hold", gone)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fake_search(tmp_path, config(workers=1)) as (_, judge, _):
        end(judge)


def test_workers_that_cannot_start_are_reported_to_whoever_asks_again(tmp_path: Path) -> None:
    with fake_search(tmp_path, config(workers=1), broken=True) as (_, judge, _):
        for _ in range(2):  # passes over several policies are given up at any ValueError
            with pytest.raises(UserError, match="the text has changed"):
                judge.search(FIRST[0], 1.0)


def test_workers_need_a_launcher() -> None:
    with pytest.raises(ValueError, match=r"search.workers = 2 .* search.launcher = inline"):
        SearchConfig(workers=2, launcher=Launcher.inline)


def test_a_search_survives_signals_at_random(tmp_path: Path) -> None:
    """A short form of ``python -m tests.soak``."""
    assert "of 12 trials survived 5 signals" in soak(tmp_path, kills=5, seed=3, trials=12)


@pytest.mark.parametrize(
    ("device", "workers", "devices"),
    [
        ("cpu", None, ["cpu"]),
        ("cpu", 3, ["cpu"] * 3),
        ("cuda", None, ["cuda:0", "cuda:1"]),
        ("cuda", 3, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", None, ["cuda:1"]),
        ("cuda:1", 2, ["cuda:1"] * 2),
    ],
)
def test_workers_take_the_gpus_in_turn(
    device: str, workers: int | None, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert worker_devices(SearchConfig(workers=workers), torch.device(device)) == devices


def test_workers_share_the_threads_and_a_study_keeps_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [threads_each(count) for count in (1, 2, 4, 12)] == [6, 3, 1, 1]
    with fake_search(tmp_path, config(workers=1)) as (study, _, _):
        assert study.threads(3) == 3
    with fake_search(tmp_path, config(workers=1)) as (study, _, _):
        assert study.threads(6) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert threads_each(2) == 6


def test_a_configuration_survives_json() -> None:
    settings = SearchConfig(constraints={"val_loss": 2.0}, rungs=[0.5, 1.0], trial_timeout=2.0)
    plain = SearchRunConfig(seed=3, search=settings)
    assert from_plain(SearchRunConfig, json.loads(json.dumps(to_plain(plain)))) == plain
