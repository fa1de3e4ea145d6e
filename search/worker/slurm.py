"""Workers of a search in Slurm jobs, submitted through submitit, and submitted again when they end before the search.

A job joins the search like another machine: it works as long as the study has an owner that beats. No torch and no
optuna at import.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from natsl import signals
from natsl.errors import UserError
from natsl.search.config import SlurmConfig
from natsl.search.worker.child import environment
from natsl.search.worker.pool import Workers, WorkerState, job_devices, last_line
from natsl.search.worker.process import Job
from natsl.search.worker.table import Running, TaskTable
from natsl.secrets import redact_text

if TYPE_CHECKING:
    import submitit

_LOG = logging.getLogger(__name__)
_COMMANDS = ("sbatch", "srun", "squeue", "scancel")
_READY = "ready"  # a file in the folder of a job: one of its workers was
_STORAGE = "NATSL_STORAGE"  # the database URL, which has a password: no file of the run may hold it
_STARTS = 4  # in a row that end before a worker is ready
_SIGNAL_SECONDS = 15  # before its timeout, when a job is told; Slurm may do so up to a minute earlier
_RETRY_SECONDS = 30.0  # between submissions that Slurm refuses
_ASK_SECONDS = 20.0  # between questions to Slurm which jobs it still has
_ANSWER_SECONDS = 30.0  # that an answer may take


@dataclass
class _Seat:
    """A place for a job, and the job that has it. Its workers' names begin with ``name`` and a hyphen."""

    name: str = ""
    job: submitit.Job[str] | None = None
    in_vain: int = 0  # starts since a worker was ready
    not_before: float = 0.0  # on the monotonic clock, when the next job may be submitted


class SlurmWorkers:
    """``jobs`` Slurm jobs that make the tasks of a table, each with one worker per GPU.

    ``job``, ``timeout``, ``wanted``: as of ``Workers``. ``folder``: of the logs, which all nodes see. ``UserError``
    where submitit or Slurm is missing, and where Slurm refuses the jobs. ``cluster``: of submitit's executors.
    """

    def __init__(
        self,
        job: Job,
        config: SlurmConfig,
        jobs: int,
        folder: Path,
        table: TaskTable,
        timeout: float | None = None,
        wanted: Callable[[str], bool] = lambda key: True,
        cluster: str = "slurm",
    ) -> None:
        self._job, self._folder, self._table, self._timeout, self._wanted = job, folder, table, timeout, wanted
        self._devices = job_devices(config)
        self._token = secrets.token_hex(4)
        self._count = 0
        self._executor = make_executor(config, folder, cluster)
        self._on_slurm, self._next_ask = cluster == "slurm", 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._seats = [_Seat() for _ in range(jobs)]
        try:
            for seat in self._seats:
                self._submit(seat)
        except BaseException:
            self.close()
            raise
        ids = ", ".join(seat.job.job_id for seat in self._seats if seat.job is not None)
        _LOG.info("submitted to Slurm: %s; logs: %s", ids, folder)

    @property
    def count(self) -> int:
        """How many workers there are to be, in all jobs."""
        return len(self._seats) * len(self._devices)

    @property
    def names(self) -> set[str]:
        """Of the jobs that run or wait in the queue."""
        return {seat.name for seat in self._seats if seat.job is not None}

    @property
    def states(self) -> list[WorkerState]:
        """None of this process: workers in jobs are seen by their tasks, as those of other machines."""
        return []

    def _submit(self, seat: _Seat) -> None:
        self._count += 1
        seat.name = f"{self._token}-{self._count}"
        plain = replace(self._job, name=seat.name, url=None).dump()
        arguments = (plain, self._devices, str(self._folder / seat.name), self._timeout)
        try:
            with _submitting(self._job):
                seat.job = self._executor.submit(work, *arguments)
        except (OSError, RuntimeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(redact_text(f"Slurm refuses a job: {(lines or [type(error).__name__])[-1]}")) from None

    def announce(self) -> None:
        """Workers in jobs look for new tasks by themselves."""

    def watch(self, seconds: float) -> bool:
        """Wait so long; workers in jobs say nothing but in the table."""
        time.sleep(seconds)
        return False

    def look(self, seconds: float) -> None:
        """Put back what jobs had that have ended, and submit them again; ``UserError`` if they end in vain."""
        running, queued = self._table.running(), None
        if self._on_slurm and time.monotonic() >= self._next_ask:
            queued, self._next_ask = _queued(), time.monotonic() + _ASK_SECONDS
        for seat in self._seats:
            tasks = [task for task in running if task.worker.startswith(f"{seat.name}-")]
            if seat.job is not None and self._has_ended(seat.job, queued):
                self._ended(seat, seat.job, tasks)
            if seat.job is None and not signals.draining() and time.monotonic() >= seat.not_before:
                self._submit_again(seat)

    def _has_ended(self, job: submitit.Job[str], queued: set[str] | None) -> bool:
        """Whether a job has left its result, or is not among those that Slurm has (null: it was not asked).

        submitit asks sacct, which needs a database of accounts, and later the longer a job runs, up to ten minutes.
        """
        if not self._on_slurm:
            return job.done()
        return job.paths.result_pickle.exists() or (queued is not None and job.job_id not in queued)

    def _ended(self, seat: _Seat, job: submitit.Job[str], tasks: list[Running]) -> None:
        line = _reason(job)
        why = f"the Slurm job {job.job_id} ended" + (f" ({line})" if line else "")
        for task in tasks:
            self._table.put_back(task.lease, why, counted=True, wanted=self._wanted(task.key))
        seat.job = None
        seat.in_vain = 0 if tasks or (self._folder / seat.name / _READY).exists() else seat.in_vain + 1
        if seat.in_vain >= _STARTS:
            raise UserError(f"{_STARTS} Slurm jobs in a row ended before a worker was ready, the last one: {why}")
        _LOG.info("%s; another one is submitted", why)

    def _submit_again(self, seat: _Seat) -> None:
        """Submit a job unless Slurm refuses it, which may pass."""
        try:
            self._submit(seat)
        except UserError as error:
            seat.in_vain += 1
            if seat.in_vain >= _STARTS:
                raise
            _LOG.info("%s; the next attempt is made in %g s", error, _RETRY_SECONDS)
            seat.not_before = time.monotonic() + _RETRY_SECONDS

    def add(self) -> None:
        """Nothing: ``look`` submits jobs for those that have ended."""

    def close(self) -> None:
        """Cancel all jobs, and put back what their workers had, for others to take."""
        for seat in self._seats:
            if seat.job is not None:
                with contextlib.suppress(OSError):
                    seat.job.cancel(check=False)
                seat.job = None
        with contextlib.suppress(SQLAlchemyError):  # else the next call sees that they are gone
            for task in self._table.running() if self._count else ():
                if task.worker.startswith(f"{self._token}-"):
                    self._table.put_back(task.lease, "its worker was stopped", counted=False)


def make_executor(config: SlurmConfig, folder: Path, cluster: str = "slurm") -> submitit.AutoExecutor:
    """What submits jobs; ``UserError`` where submitit or Slurm is missing, or an extra parameter is unknown.

    Writes nothing for Slurm. The ``cluster`` local runs jobs as processes of this machine.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("search.launcher = slurm needs submitit: pip install 'natsl[slurm]'") from None
    missing = [name for name in _COMMANDS if cluster == "slurm" and shutil.which(name) is None]
    if missing:
        raise UserError(
            f"search.launcher = slurm needs Slurm, whose commands {', '.join(missing)} are not on this machine: start "
            "the search where jobs are submitted, or choose search.launcher = local"
        )
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        # Jobs that end are replaced here: one that Slurm starts again as well would stay when the search ends.
        extra = {"signal_delay_s": _SIGNAL_SECONDS, "additional_parameters": {}, **config.extra}
        extra["additional_parameters"] = {"no-requeue": True, **extra["additional_parameters"]}
        executor.update_parameters(
            name="natsl",
            timeout_min=config.timeout,
            cpus_per_task=config.cpus,
            gpus_per_node=config.gpus or None,
            mem_gb=config.memory,
            slurm_partition=config.partition,
            **{f"slurm_{name}": value for name, value in extra.items()},
        )
    except (AssertionError, AttributeError, NameError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).splitlines()[:1])
        raise UserError(f"search.slurm.extra = {config.extra} is not allowed: {text}") from None
    return executor


@contextlib.contextmanager
def _submitting(job: Job) -> Iterator[None]:
    """The environment that a job inherits; of a search that is a job itself, it is not told what that one has."""
    import submitit
    from submitit.core.utils import environment_variables

    within = "SLURM_JOB_ID" in os.environ
    path = environment(job.threads)["PYTHONPATH"]
    variables = {"PYTHONPATH": path} | ({} if job.url is None else {_STORAGE: job.url})
    with submitit.helpers.clean_env() if within else contextlib.nullcontext(), environment_variables(**variables):
        yield


def _queued() -> set[str] | None:
    """The user's jobs that wait or run; null: Slurm does not answer."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    line = ["squeue", f"--user={os.getuid()}", "--noheader", "--format=%i"]
    try:
        answer = subprocess.run(line, env=plain, capture_output=True, text=True, check=True, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(answer.stdout.split())


def _reason(job: submitit.Job[str]) -> str:
    """Why a job ended, in a line, as far as it said so."""
    if job.paths.result_pickle.exists() and job.exception() is None:
        return job.result()
    return last_line(job.paths.stderr)


class _TimeUpError(BaseException):
    """Slurm is about to end the job."""


@contextlib.contextmanager
def _notice_raises() -> Iterator[None]:
    """Within the block the signal that submitit has Slurm send before a job's timeout raises ``_TimeUpError``, once."""
    import submitit

    notice = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]

    def on_notice(number: int, frame: FrameType | None) -> None:
        signal.signal(notice, signal.SIG_IGN)
        raise _TimeUpError

    before = signal.signal(notice, on_notice)
    try:
        yield
    finally:
        signal.signal(notice, before)


def work(plain: str, devices: list[str], folder: str, timeout: float | None) -> str:
    """What a job does: have a worker on each device make tasks until the search ends. Returns why it stopped before."""
    from natsl.search.storage import connect
    from natsl.search.worker.group import SILENCE, Controller, serve

    job = Job(**json.loads(plain))
    try:
        if _STORAGE not in os.environ:
            raise UserError(f"the job has not inherited the environment of the search, which holds {_STORAGE}")
        job = replace(job, url=os.environ.pop(_STORAGE))
        storage = connect(str(job.url))
        table, controller = TaskTable(storage.engine, job.study), Controller(storage, job.study)
        with signals.sigterm_raises(), _notice_raises():
            workers = Workers(job, devices, Path(folder), table, timeout)

            def wanted() -> bool:
                if workers.ready:
                    Path(folder, _READY).touch()
                return controller.beats(SILENCE * job.lease_seconds)

            serve(lambda: workers, wanted)
    except UserError as error:
        return redact_text(" ".join(str(error).split()))
    except _TimeUpError:
        return "its time was up"
    except signals.TerminatedError:
        return "it was cancelled"
    return ""
