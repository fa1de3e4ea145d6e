"""Evaluations to be made, in a table of the study's database: any process that reaches it may make one.

A worker claims a task under a lease, a random token, and stores its result only if the lease is still its own. Every
change is one statement that compares what it replaces, so that SQLite, PostgreSQL and MySQL serve alike. No torch and
no optuna at import.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    case,
    create_engine,
    select,
    update,
)
from sqlalchemy.dialects.mysql import MEDIUMTEXT

from natsl.search.owner import Owner
from natsl.search.worker.error import ended_worker

BUSY_SECONDS = 60.0  # how long a process waits for another one to finish writing
ATTEMPTS = 2  # a task that so many workers ended over fails
_SOME = 200  # values in one statement

_LONG = Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")
METADATA = MetaData()
TASKS = Table(
    "natsl_tasks",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("study_id", Integer, nullable=False),
    Column("task_key", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("later", Integer, nullable=False),  # 1: when no other is left
    Column("near", String(64)),  # the worker that has the most of it at hand
    Column("payload", _LONG, nullable=False),
    Column("lease", String(64)),
    Column("worker", String(64)),
    Column("process", Text),  # of the worker: an Owner
    Column("beat", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("history", _LONG, nullable=False),  # a list of lines
    Column("result", _LONG),
    UniqueConstraint("study_id", "task_key"),
    Index("natsl_tasks_state", "study_id", "state"),
)


class State(Enum):
    """Where a task is."""

    held = "held"  # nobody wants it now
    waiting = "waiting"
    running = "running"
    done = "done"  # its result is an answer
    failed = "failed"  # its result says why
    used = "used"  # its answer is stored elsewhere


@dataclass(frozen=True)
class Task:
    """A task that a worker has claimed."""

    lease: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Running:
    """A task that is being worked on. ``process``: of the worker, if it is known."""

    key: str
    lease: str
    worker: str
    process: Owner | None
    beat: int


@dataclass(frozen=True)
class Ended:
    """A task with its result: an ``answer``, else ``error``, which says why there is none."""

    key: str
    worker: str | None
    answer: Any
    error: dict[str, Any] | None
    history: list[str]


def sqlite_connector(path: Path, journal: str = "WAL") -> Callable[[], sqlite3.Connection]:
    """Opens the SQLite file of a study; a reader does not block a writer, nor the other way round, in a WAL."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute(f"PRAGMA synchronous={'NORMAL' if journal == 'WAL' else 'FULL'}")
        return connection

    return connect


def open_engine(path: Path, url: str | None) -> Engine:
    """The database at ``url``, or else in the SQLite file ``path``, which is there."""
    if url is None:
        return create_engine("sqlite:///study.db", creator=sqlite_connector(path))
    options = {"connect_args": {"timeout": BUSY_SECONDS}} if url.startswith("sqlite") else {}
    return create_engine(url, pool_pre_ping=True, **options)


class TaskTable:
    """The tasks of one study."""

    def __init__(self, engine: Engine, study_id: int) -> None:
        self._engine = engine
        self._study = study_id

    def create(self) -> None:
        """Make the table unless the database has it; its tasks wait for nobody until they are wanted again.

        What failed may be tried again: its machine, or the user, may have changed.
        """
        METADATA.create_all(self._engine)
        idle = TASKS.c.state.in_([State.waiting.value, State.failed.value])
        self._change(idle, state=State.held.value, attempts=0, result=None)

    def submit(
        self, questions: Mapping[str, dict[str, Any]], near: Mapping[str, str] | None = None, later: bool = False
    ) -> None:
        """Have tasks done, payload by key, unless they are.

        ``near``: by key, who has most of one at hand. ``later``: when no others wait.
        """
        near = near or {}
        keys = list(questions)
        for first in range(0, len(keys), _SOME):
            some = keys[first : first + _SOME]
            with self._engine.begin() as connection:
                rows = connection.execute(
                    select(TASKS.c.task_key, TASKS.c.state).where(self._own, TASKS.c.task_key.in_(some))
                )
                known = {str(key): State(state) for key, state in rows}
                new = [key for key in some if key not in known]
                if new:
                    rest = {"study_id": self._study, "state": State.waiting.value, "beat": 0, "attempts": 0}
                    rest["later"] = int(later)
                    texts = {key: {"payload": json.dumps(questions[key]), "near": near.get(key)} for key in new}
                    lines = [{**rest, "task_key": key, "history": "[]", **texts[key]} for key in new]
                    connection.execute(TASKS.insert(), lines)
                again = [key for key in some if known.get(key) in (State.held, State.failed, State.used)]
                if again:
                    fresh = {"state": State.waiting.value, "attempts": 0, "result": None, "lease": None}
                    fresh["later"] = int(later)
                    stale = TASKS.c.state.in_([State.held.value, State.failed.value, State.used.value])
                    connection.execute(update(TASKS).where(self._own, TASKS.c.task_key.in_(again), stale).values(fresh))

    def hold(self) -> None:
        """Let nobody begin a task that waits."""
        self._change(TASKS.c.state == State.waiting.value, state=State.held.value)

    def claim(self, worker: str, process: Owner) -> Task | None:
        """A task for a worker, the oldest of those that it has most of at hand, else of the others; None: all wait."""
        order = case((TASKS.c.near == worker, 0), (TASKS.c.near.is_(None), 1), else_=2)
        wanted = select(TASKS.c.id, TASKS.c.payload).where(self._own, TASKS.c.state == State.waiting.value)
        while True:
            with self._engine.begin() as connection:
                row = connection.execute(wanted.order_by(TASKS.c.later, order, TASKS.c.id).limit(1)).fetchone()
            if row is None:
                return None
            lease = secrets.token_hex(16)
            values = {"state": State.running.value, "lease": lease, "worker": worker, "process": process.dump()}
            free = (TASKS.c.id == row[0]) & (TASKS.c.state == State.waiting.value)
            if self._change(free, **values, beat=TASKS.c.beat + 1, attempts=TASKS.c.attempts + 1):
                return Task(lease, json.loads(row[1]))

    def beat(self, lease: str) -> bool:
        """Show that the holder of a lease works; False: the lease has ended."""
        return self._change(self._held_by(lease), beat=TASKS.c.beat + 1)

    def finish(self, lease: str, answer: Any = None, error: dict[str, Any] | None = None) -> bool:
        """Store the result of a task, in one statement; False, and nothing stored: the lease has ended."""
        state = State.done if error is None else State.failed
        text = json.dumps(answer if error is None else error)
        return self._change(self._held_by(lease), state=state.value, result=text, lease=None)

    def put_back(self, lease: str, why: str, *, counted: bool, wanted: bool = True) -> bool:
        """End a lease whose task is to be done again, or fails: ``ATTEMPTS`` that count were in vain.

        ``why`` goes to its history. An attempt that is not ``counted`` is as none; what nobody has ``wanted`` is held.
        """
        with self._engine.begin() as connection:
            row = connection.execute(
                select(TASKS.c.attempts, TASKS.c.history).where(self._held_by(lease), self._own)
            ).fetchone()
        if row is None:
            return False
        attempts, history = int(row[0]) - (not counted), json.loads(row[1])
        if counted and attempts >= ATTEMPTS:
            return self.give_up(lease, why)
        state = State.waiting if wanted else State.held
        line = json.dumps([*history, f"{why}: put back"])
        return self._change(
            self._held_by(lease), state=state.value, attempts=attempts, history=line, lease=None, near=None
        )

    def give_up(self, lease: str, why: str) -> bool:
        """End a lease whose task fails."""
        return self.finish(lease, error=ended_worker(why))

    def running(self) -> list[Running]:
        """Tasks that are being worked on."""
        columns = (TASKS.c.task_key, TASKS.c.lease, TASKS.c.worker, TASKS.c.process, TASKS.c.beat)
        with self._engine.begin() as connection:
            rows = connection.execute(select(*columns).where(self._own, TASKS.c.state == State.running.value))
            return [
                Running(key, lease, worker, Owner.parse(process), beat) for key, lease, worker, process, beat in rows
            ]

    def ended(self, known: set[str]) -> list[Ended]:
        """Tasks with a result, in the order in which they were submitted, without those whose keys are ``known``."""
        over = [State.done.value, State.failed.value]
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(TASKS.c.id, TASKS.c.task_key).where(self._own, TASKS.c.state.in_(over)).order_by(TASKS.c.id)
            )
            new = [row[0] for row in rows if row[1] not in known]
            found: list[Ended] = []
            columns = (TASKS.c.task_key, TASKS.c.worker, TASKS.c.state, TASKS.c.result, TASKS.c.history)
            for first in range(0, len(new), _SOME):
                some = TASKS.c.id.in_(new[first : first + _SOME])
                for key, worker, state, result, history in connection.execute(select(*columns).where(some)):
                    plain, good = json.loads(result), state == State.done.value
                    found.append(
                        Ended(key, worker, plain if good else None, None if good else plain, json.loads(history))
                    )
        return found

    def use(self, keys: Sequence[str]) -> None:
        """Drop the results of tasks, which are stored elsewhere by now."""
        for first in range(0, len(keys), _SOME):
            some = TASKS.c.task_key.in_(keys[first : first + _SOME])
            over = TASKS.c.state.in_([State.done.value, State.failed.value])
            self._change(some & over, state=State.used.value, result=None)

    @property
    def _own(self) -> ColumnElement[bool]:
        return TASKS.c.study_id == self._study

    def _held_by(self, lease: str) -> ColumnElement[bool]:
        return (TASKS.c.lease == lease) & (TASKS.c.state == State.running.value)

    def _change(self, which: ColumnElement[bool], **values: Any) -> bool:
        """Change tasks in one statement; False: there are none such."""
        with self._engine.begin() as connection:
            return connection.execute(update(TASKS).where(self._own, which).values(values)).rowcount > 0
