"""A worker process: evaluates policies for a search, one after another, until its controller ends.

It may import what it needs before it has a job: its arguments then are the ``answers`` and the device of a ``Job``, and
its parent. What it has to know comes as one line of JSON on its standard input, where later lines say that there are
new tasks, and whose end means that the controller is gone. On its standard output it says that it is ready, and that a
task is done. Everything else is in the table of tasks. No torch at import.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy.exc import SQLAlchemyError

from natsl.errors import UserError
from natsl.search.owner import Owner
from natsl.search.question import Question
from natsl.search.worker.error import is_known, store_error
from natsl.search.worker.table import BUSY_SECONDS, TaskTable, open_engine
from natsl.secrets import redact_text

SUPERNET = "natsl.search.worker.answers:SupernetAnswers"
EXIT_MISTAKE, EXIT_DEVICE, EXIT_ORPHAN = 2, 3, 4
READY, DONE = b"ready\n", b"done\n"
POLL_SECONDS, LONGEST_POLL = 0.05, 1.0  # between looks for a task, while nobody says that there is one
_PARENT_SECONDS, _LONGEST_BEAT = 0.5, 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What a worker has to know.

    ``path``, ``url``: as of ``open_engine``. ``answers``: module and class of the ``Answers`` that are made of the job.
    ``run``: folder of the run, with its configuration ``config``, plain. ``supernet``, ``text``: checksums of what must
    be there. ``device``, ``name``, ``log``, the file for what it prints, and ``parent``, the controller's process, are
    the worker's own.
    """

    path: str
    url: str | None
    study: int
    lease_seconds: float
    answers: str
    run: str
    threads: int
    config: dict[str, Any]
    supernet: str
    text: str
    device: str = "cpu"
    name: str = ""
    log: str = ""
    parent: int = 0

    def dump(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


class Answers(Protocol):
    """Answers questions; made from a ``Job``."""

    def __init__(self, job: Job) -> None: ...

    def __call__(self, question: Question) -> Any:
        """The answer, JSON-ready, or an error."""

    def recover(self) -> bool:
        """After an error: free memory; False if nothing can be evaluated in this process any more."""


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller decides
    with contextlib.suppress(OSError, AttributeError):  # Linux only; the end of our input shows the same a little later
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # What libraries print must not be taken for a message.
    messages = os.dup(1)
    os.dup2(2, 1)
    if sys.argv[1:]:
        _import_ahead(*sys.argv[1:])
    line = sys.stdin.buffer.readline()
    if not line:  # it was not needed
        os._exit(EXIT_ORPHAN)
    job = Job(**json.loads(line))
    _log_to(job.log)
    try:
        _Worker(job, messages).run()
    except UserError as error:
        print(redact_text(" ".join(str(error).split())), file=sys.stderr, flush=True)
        os._exit(EXIT_MISTAKE)


def _import_ahead(answers: str, device: str, parent: str) -> None:
    """Import what a job with these ``answers`` will need on a device; errors show again once it does."""
    if os.getppid() != int(parent):  # it ended before we could ask to end with it
        os._exit(EXIT_ORPHAN)
    with contextlib.suppress(Exception):
        import_module(answers.partition(":")[0]).import_ahead(device)


def _log_to(path: str) -> None:
    """Have what is printed in a file: a process that had no job yet printed nowhere."""
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 2)
        os.dup2(2, 1)


class _Worker:
    """A worker process. Threads of it listen to the controller, and beat for the task that it works on."""

    def __init__(self, job: Job, messages: int) -> None:
        self._job, self._messages = job, messages
        self._table = TaskTable(open_engine(Path(job.path), job.url), job.study)
        self._process = Owner.named(job.name)
        self._lease: str | None = None
        self._news = threading.Event()

    def run(self) -> None:
        """Work until the controller ends."""
        for target in (self._listen, self._watch, self._beat):
            threading.Thread(target=target, daemon=True).start()
        module, _, name = self._job.answers.partition(":")
        answers: Answers = getattr(import_module(module), name)(self._job)
        self._say(READY)
        pause = POLL_SECONDS
        while True:
            if self._work(answers):
                pause = POLL_SECONDS
                continue
            self._news.wait(pause)
            pause = POLL_SECONDS if self._news.is_set() else min(2 * pause, LONGEST_POLL)
            self._news.clear()

    def _work(self, answers: Answers) -> bool:
        """Do one task; False: there is none."""
        task = self._patiently(lambda: self._table.claim(self._job.name, self._process))
        if task is None:
            return False
        self._lease = task.lease
        answer, error = None, None
        try:
            answer = answers(Question.from_dict(task.payload))
        except Exception as fault:
            error = store_error(fault)
            if not is_known(fault):
                print(redact_text(traceback.format_exc()), file=sys.stderr, flush=True)
        usable = error is None or answers.recover()  # by now nothing holds what the evaluation had in memory
        finished = self._patiently(lambda: self._table.finish(task.lease, answer, error))
        self._lease = None  # it beats until then: the database may be busy
        if not finished:
            print("the lease of a task had ended: its result is ignored", file=sys.stderr, flush=True)
        self._say(DONE)
        if not usable:
            print("the device does not work any more", file=sys.stderr, flush=True)
            os._exit(EXIT_DEVICE)
        return True

    def _patiently(self, access: Any) -> Any:
        """Reach the database; one that cannot be reached for a minute ends the worker."""
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return access()
            except SQLAlchemyError as error:
                if time.monotonic() > end:
                    text = str(getattr(error, "orig", error)).splitlines()[0]  # without statement and parameters
                    raise UserError(f"the table of tasks cannot be read or written: {text}") from None
                time.sleep(LONGEST_POLL)

    def _say(self, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._messages, message)

    def _listen(self) -> None:
        """Note new tasks; end with the controller."""
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                self._news.set()
        os._exit(EXIT_ORPHAN)

    def _watch(self) -> None:
        """End with the controller also where something else holds the other end of our input open."""
        while os.getppid() == self._job.parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(EXIT_ORPHAN)

    def _beat(self) -> None:
        pause = min(_LONGEST_BEAT, self._job.lease_seconds / 4)
        while True:
            time.sleep(pause)
            lease = self._lease
            if lease is not None:
                with contextlib.suppress(SQLAlchemyError):  # the next beat, or the result, comes through
                    self._table.beat(lease)
