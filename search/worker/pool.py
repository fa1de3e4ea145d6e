"""The worker processes of a search on this machine: started, watched, started again, and ended with all they started.

No torch and no optuna at import.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from natsl.errors import UserError
from natsl.files import to_plain
from natsl.run import Run
from natsl.search.config import Launcher, SearchConfig, SearchRunConfig, SlurmConfig
from natsl.search.worker.child import in_turn, kill, reap, start, tell
from natsl.search.worker.process import DONE, EXIT_MISTAKE, READY, SUPERNET, Job
from natsl.search.worker.spare import Spares
from natsl.search.worker.table import TaskTable
from natsl.secrets import redact_text
from natsl.tracking import TrackingConfig

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)
_STARTS = 4  # in a row that end before a worker is ready
_LONGEST_LINE = 300


@dataclass
class _Seat:
    """A place for a worker, and the process that has it."""

    device: str
    log: Path
    begin: int = 0  # bytes of the log that are of workers before
    name: str = ""
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    starts: int = 0
    in_vain: int = 0  # starts since a worker was ready
    lease: str | None = None  # of the task that it works on, even if the lease has ended
    age: float = 0.0  # seconds since it has that task
    why: str | None = None  # it was ended by us, over that task


@dataclass(frozen=True)
class WorkerState:
    """A worker of this process: whether it is ready, how often one was started in its place, the log of that place."""

    name: str
    device: str
    ready: bool
    starts: int
    log: Path


class Workers:
    """``len(devices)`` workers that make the tasks of a table.

    ``job``: of all of them, but for device and name, which begins with the job's, if any. ``wanted``: whether somebody
    waits for a task, by its key. ``spares``: processes to begin with.
    """

    def __init__(
        self,
        job: Job,
        devices: Sequence[str],
        folder: Path,
        table: TaskTable,
        timeout: float | None = None,
        wanted: Callable[[str], bool] = lambda key: True,
        spares: Spares | None = None,
    ) -> None:
        self._job, self._table, self._timeout, self._wanted = job, table, timeout, wanted
        self._token = job.name or secrets.token_hex(4)
        self._count = 0
        self.done = 0  # tasks that workers have finished, with a result or an error
        folder.mkdir(parents=True, exist_ok=True)
        self._seats = [_Seat(device, folder / f"{i}.log") for i, device in enumerate(devices)]
        try:
            for seat in self._seats:
                seat.log.write_bytes(b"")
                self._start(seat, None if spares is None else spares.take())
            if spares is not None:
                spares.close()
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """How many workers there are to be."""
        return len(self._seats)

    @property
    def names(self) -> set[str]:
        """Of the workers that run."""
        return {seat.name for seat in self._seats if seat.process is not None}

    @property
    def states(self) -> list[WorkerState]:
        """Of all workers, in a fixed order."""
        return [WorkerState(seat.name, seat.device, seat.ready, seat.starts, seat.log) for seat in self._seats]

    @property
    def ready(self) -> bool:
        """Whether one of them takes tasks."""
        return any(seat.ready for seat in self._seats)

    def _start(self, seat: _Seat, process: subprocess.Popen[bytes] | None = None) -> None:
        self._count += 1
        seat.name, seat.ready = f"{self._token}-{self._count}", False
        seat.lease, seat.age, seat.why = None, 0.0, None
        seat.starts += 1
        seat.process = process
        with seat.log.open("ab") as log:
            seat.begin = log.tell()
            if process is None:
                seat.process = process = start(self._job.threads, log)
        path, parent = str(seat.log.absolute()), os.getpid()
        job = replace(self._job, name=seat.name, device=seat.device, log=path, parent=parent)
        tell(process, job.dump().encode() + b"\n")

    def announce(self) -> None:
        """Tell the workers that there are new tasks."""
        for seat in self._seats:
            if seat.ready and seat.process is not None:
                tell(seat.process, b"\n")

    def watch(self, seconds: float) -> bool:
        """Wait until a worker says something, at most so long; whether one did. Workers that ended are replaced.

        ``UserError`` if a worker cannot start.
        """
        seats = {_output(seat.process): seat for seat in self._seats if seat.process is not None}
        heard, _, _ = select.select(list(seats), [], [], seconds)
        for output in heard:
            seat, said = seats[output], os.read(output, 65536)
            if READY in said:
                seat.ready, seat.in_vain = True, 0
            self.done += said.count(DONE)
            if DONE in said and seat.why is None:
                seat.lease = None
            if not said:
                self._ended(seat)
        return bool(heard)

    def _ended(self, seat: _Seat) -> None:
        """Put back what a worker had that has closed its output, and start another one."""
        assert seat.process is not None
        reap(seat.process)
        code, seat.process = seat.process.returncode, None
        line = last_line(seat.log, seat.begin)
        why = seat.why or _ending(code) + (f" ({line})" if line else "")
        for task in self._table.running():
            if task.worker != seat.name:
                continue
            wanted = self._wanted(task.key)
            if seat.why is None:
                self._table.put_back(task.lease, why, counted=code != -signal.SIGTERM, wanted=wanted)
            elif task.lease == seat.lease:
                self._table.give_up(task.lease, why)
            else:  # claimed while the worker was being ended
                line = "its worker was ended over another task"
                self._table.put_back(task.lease, line, counted=False, wanted=wanted)
        _LOG.info("%s; another one is started on %s, log: %s", why, seat.device, seat.log)
        seat.in_vain += not seat.ready
        if not seat.ready and (code == EXIT_MISTAKE or seat.in_vain >= _STARTS):
            raise UserError(line if code == EXIT_MISTAKE and line else f"workers end before they are ready: {why}")
        self._start(seat)

    def look(self, seconds: float) -> None:
        """End workers whose task takes too long; ``seconds`` since the last look, as far as this process ran.

        One that does not even beat loses its lease before, but has not said that it is done.
        """
        leases = {task.worker: task.lease for task in self._table.running()}
        for seat in self._seats:
            if seat.process is None or seat.why is not None:
                continue
            lease = leases.get(seat.name, seat.lease)
            seat.age = seat.age + seconds if lease is not None and lease == seat.lease else 0.0
            seat.lease = lease
            if self._timeout is not None and seat.age > self._timeout:
                seat.why = f"an evaluation took longer than search.trial_timeout = {self._timeout:g} s"
                kill(seat.process)

    def add(self) -> None:
        """One more worker, beside those that give no sign of life."""
        log = self._seats[0].log.with_name(f"{len(self._seats)}.log")
        seat = _Seat(self._seats[0].device, log)
        self._seats.append(seat)
        self._start(seat)

    def close(self) -> None:
        """End all workers, with whatever they have started, and put back what they had, for others to take."""
        processes = {seat.name: seat.process for seat in self._seats if seat.process is not None}
        for process in processes.values():
            kill(process)
        for process in processes.values():
            reap(process)
        for seat in self._seats:
            seat.process = None
        with contextlib.suppress(SQLAlchemyError):  # else the next call sees that they are gone
            for task in self._table.running() if processes else ():
                if task.worker in processes:
                    self._table.put_back(task.lease, "its worker was stopped", counted=False)


def _output(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return process.stdout.fileno()


def _ending(code: int) -> str:
    name = ""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = f", {signal.Signals(-code).name}"
    return f"worker ended with exit code {code}{name}"


def last_line(log: Path, begin: int = 0) -> str:
    """The last line of a log after its first ``begin`` bytes, shortened, without secrets; empty: there is none."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").split("\n")
        line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return redact_text(line)[:_LONGEST_LINE]
    return ""


class Clock:
    """Seconds between two looks on the monotonic clock, at most ``most``: what a stopped process slept is left out."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._before = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        seconds, self._before = min(now - self._before, self._most), now
        return seconds


def worker_devices(config: SearchConfig, device: torch.device) -> list[str]:
    """The device of each worker of a search: GPUs in turn, unless the user has named one, or those of Slurm jobs."""
    if config.launcher is Launcher.slurm:
        return job_devices(config.slurm) * (config.workers or 1)
    gpus = 0
    if device.type == "cuda" and device.index is None:
        import torch

        gpus = torch.cuda.device_count()
    return in_turn(config.workers, gpus, str(device))


def job_devices(config: SlurmConfig) -> list[str]:
    """The device of each worker of a Slurm job."""
    return [f"cuda:{i}" for i in range(config.gpus)] or ["cpu"]


def supernet_job(config: SearchRunConfig, run: Run, study: int, threads: int, supernet: str, text: str) -> Job:
    """What the workers of a search have to know, the rest as in ``Job``.

    Their configuration is without the URL of the storage, which may hold a password.
    """
    settings = config.search
    plain = replace(settings, storage=None, launcher=Launcher.local)
    return Job(
        path=str(run.study_db),
        url=settings.storage,
        study=study,
        lease_seconds=settings.lease_seconds,
        answers=SUPERNET,
        run=str(run.path),
        threads=threads,
        config=to_plain(replace(config, search=plain, tracking=TrackingConfig())),
        supernet=supernet,
        text=text,
    )
