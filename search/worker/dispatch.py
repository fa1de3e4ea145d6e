"""A judge whose answers come from workers: asks through the table of tasks, and sees to it that none is lost."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from natsl import signals
from natsl.errors import UserError
from natsl.search.judge import Judge
from natsl.search.owner import Owner
from natsl.search.question import Method, Question, Queue, from_plain
from natsl.search.worker.error import load_error
from natsl.search.worker.pool import Clock, WorkerState
from natsl.search.worker.table import Ended, Running, TaskTable

_LOG = logging.getLogger(__name__)
_POLL, _LONGEST_POLL = 0.05, 0.5  # seconds between looks for answers; workers on this machine say when there is one
_LOOK_SECONDS = 0.5  # between looks at what is being worked on
_REMEMBERED = 10_000  # policies of which it is known who answered last
OnLook = Callable[[Sequence[WorkerState], Mapping[str, Question | None]], None]


class Pool(Protocol):
    """The workers that a search has started: ``Workers`` on this machine, ``SlurmWorkers`` in jobs."""

    @property
    def count(self) -> int: ...

    @property
    def names(self) -> set[str]: ...

    @property
    def states(self) -> list[WorkerState]: ...

    def announce(self) -> None: ...

    def watch(self, seconds: float) -> bool: ...

    def look(self, seconds: float) -> None: ...

    def add(self) -> None: ...

    def close(self) -> None: ...


class Dispatcher:
    """Has questions answered by whoever takes tasks from the table.

    ``start`` makes the workers of this process, given whether a task is wanted. A worker that shows no beat for
    ``lease_seconds`` loses its task; only time in which this process ran counts. ``on_beat`` is called now and
    then, and before tasks change that others may work on: it raises ``UserError`` if the study is another process's by
    now. ``on_look`` gets the workers and what those that are busy do, by their names (null: nobody waits for it).
    """

    def __init__(
        self,
        table: TaskTable,
        start: Callable[[Callable[[str], bool]], Pool],
        lease_seconds: float,
        on_beat: Callable[[], None] = lambda: None,
        on_look: OnLook = lambda workers, tasks: None,
    ) -> None:
        self._table, self._lease_seconds, self._on_beat, self._on_look = table, lease_seconds, on_beat, on_look
        self._asked: dict[str, Question] = {}
        self._answers: dict[str, Ended] = {}
        self._taken: list[str] = []  # answers that were given out, and are stored by the time of the next look
        self._near: dict[str, str] = {}  # digest of a policy → the worker that answered about it last
        self._silence: dict[str, tuple[int, float]] = {}  # lease → its last beat, seconds since then
        self._silent: set[str] = set()  # names of workers that have lost a lease in this way
        self._clock = Clock(2 * _LOOK_SECONDS)
        self._pause, self._next_poll, self._next_look = _POLL, 0.0, 0.0
        self._broken: UserError | None = None  # why workers cannot start: who asks again is told again
        self._histories: dict[str, list[str]] = {}  # of tasks that were put back, by key
        table.create()
        self._workers = start(lambda key: key in self._asked)

    def judge(self) -> Judge:
        """The judge that asks the workers."""

        def ask(method: Method) -> Callable[..., Any]:
            def one(policy: Any, *arguments: Any) -> Any:
                policies = tuple(policy) if method is Method.search_each else (policy,)
                return self.answer(Question(method, policies, arguments))

            return one

        methods = {method.value: ask(method) for method in Method}
        return Judge(**methods, queue=Queue(self.ahead, self.later, self.ready, self.wait, self.history))

    def ahead(self, questions: Sequence[Question]) -> None:
        """Have these answered, in this order, unless they were asked before."""
        self._submit(questions, later=False)

    def later(self, questions: Sequence[Question]) -> None:
        """Have these answered by workers that would be idle; one worker is better used for what is asked next."""
        if self._workers.count > 1:
            self._submit(questions, later=True)

    def _submit(self, questions: Sequence[Question], later: bool) -> None:
        new = {item.key: item for item in questions if item.key not in self._asked and item.key not in self._answers}
        if not new:
            return
        near = {}
        for key, item in new.items():
            if len(item.policies) == 1 and item.policies[0].digest() in self._near:
                near[key] = self._near[item.policies[0].digest()]
        self._on_beat()
        self._table.submit({key: item.to_dict() for key, item in new.items()}, near, later)
        self._asked.update(new)
        self._workers.announce()
        self._pause, self._next_poll = _POLL, 0.0  # an earlier process may have left an answer

    def ready(self, question: Question) -> bool:
        """Whether the answer is there."""
        return question.key in self._answers

    def history(self, question: Question) -> Sequence[str]:
        """What went wrong before the answer came, a line each."""
        return self._histories.get(question.key, ())

    def answer(self, question: Question) -> Any:
        """The answer, or the error that the worker met."""
        self.ahead([question])
        while question.key not in self._answers:
            self.wait()
        ended = self._answers.pop(question.key)
        self._taken.append(ended.key)
        if ended.error is not None:
            raise load_error(ended.error)
        if len(question.policies) == 1 and ended.worker is not None:
            if len(self._near) >= _REMEMBERED:
                self._near.clear()
            self._near[question.policies[0].digest()] = ended.worker
        return from_plain(question.method, ended.answer)

    def wait(self) -> None:
        """Return once another answer is there.

        Raises ``KeyboardInterrupt`` once the user has asked to stop and what was running is done, and ``UserError`` if
        workers cannot start.
        """
        assert self._asked, "nothing was asked"
        if self._broken is not None:
            raise self._broken
        try:
            while not self._step():
                if signals.draining():
                    self._drain()
        except UserError as error:
            self._broken = error
            raise

    def _step(self) -> bool:
        """Wait a moment for news, and take care of what is due; whether there is a new answer."""
        self._use(self._taken)
        self._taken = []
        now = time.monotonic()
        heard = self._workers.watch(max(0.0, min(self._next_poll, self._next_look) - now))
        now = time.monotonic()
        if now >= self._next_look:
            self._look()
            self._next_look = now + _LOOK_SECONDS
        if not heard and now < self._next_poll:
            return False
        found = [item for item in self._table.ended(set(self._answers)) if item.key in self._asked]
        for item in found:
            self._answers[item.key] = item
            self._asked.pop(item.key, None)
            if item.history:
                self._histories[item.key] = item.history
        self._pause = _POLL if found or heard else min(2 * self._pause, _LONGEST_POLL)
        self._next_poll = now + self._pause
        return bool(found)

    def _use(self, taken: Sequence[str]) -> None:
        """Drop answers from the table that were given out, and are stored elsewhere by now."""
        if taken:
            self._on_beat()
            self._table.use(taken)

    def _look(self) -> None:
        """Put back what was lost: its worker is gone, or has shown no beat for too long."""
        seconds = self._clock.lap()
        self._on_beat()
        self._workers.look(seconds)
        here, own, silence = Owner.named(""), self._workers.names, {}
        running = self._table.running()
        self._on_look(self._workers.states, {task.worker: self._asked.get(task.key) for task in running})
        for task in running:
            beat, silent = self._silence.get(task.lease, (task.beat, -seconds))
            silent = silent + seconds if beat == task.beat else 0.0
            wanted = task.key in self._asked
            if task.worker not in own and task.process is not None and task.process.is_gone(here):
                # Of an earlier controller, or of a group that has seen it too: the task is not to blame.
                self._table.put_back(task.lease, "worker ended with its controller", counted=False, wanted=wanted)
            elif silent > self._lease_seconds:
                why = f"worker gave no sign of life for search.lease_seconds = {self._lease_seconds:g} s"
                self._table.put_back(task.lease, why, counted=True, wanted=wanted)
                _LOG.info("%s (%s)", why, self._place(task))
                self._replace(task.worker)
            else:
                silence[task.lease] = (task.beat, silent)
                if silent == 0.0:
                    self._silent.discard(task.worker)
        self._silence = silence

    def _place(self, task: Running) -> str:
        """Where the worker of a task is: its device and log if it is of this process, else its machine and process."""
        own = next((state for state in self._workers.states if state.name == task.worker), None)
        if own is not None:
            return f"on {own.device}, log: {own.log}"
        return "on another machine" if task.process is None else f"process {task.process.pid} on {task.process.host}"

    def _replace(self, silent: str) -> None:
        """Start another worker unless one is left that can take what the silent one had."""
        self._silent.add(silent)
        if self._workers.names <= self._silent:
            self._workers.add()

    def _drain(self) -> None:
        """Let nobody begin anything, wait for what is running, and leave."""
        self._on_beat()
        self._asked.clear()  # what its worker loses now is held as well
        self._table.hold()
        while self._table.running():
            self._step()
        raise KeyboardInterrupt

    def close(self) -> None:
        """End the workers; what they had is put back, and nobody begins what waits."""
        self._workers.close()
        self._on_look([], {})
        # A database that is gone, or a study that is another process's, is what ended the search.
        with contextlib.suppress(SQLAlchemyError, StorageInternalError, UserError):
            self._use(self._taken[:-1])  # the last one may not be stored: that may be what has ended the search
            self._on_beat()
            self._table.hold()
