"""What a terminal shows while a search runs: the stage, the front so far, the workers, what failed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from natsl.progress import View, duration
from natsl.search.objective import OBJECTIVES
from natsl.search.question import Method, Question
from natsl.search.trial import Record
from natsl.search.worker.pool import WorkerState

_POINTS, _WORKERS = 6, 8  # rows of the tables
_POLICY_WIDTH = 60
_DOES = {
    Method.search: "search split",
    Method.search_each: "search split",
    Method.test: "test split",
    Method.random: "random routing",
    Method.control: "control",
    Method.length: "another length",
}


@dataclass(frozen=True)
class FrontSoFar:
    """The front of the trials so far, their hypervolume, how many failed, and why the last one of these did."""

    records: tuple[Record, ...]
    hypervolume: float
    failed: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class _Work:
    """What a worker does, and since when on the monotonic clock."""

    question: Question | None
    since: float


class SearchView(View):
    """The view of a search; what it shows is set by whoever knows it, in whole values, and drawn by its thread."""

    def __init__(self, name: str, objectives: Sequence[str]) -> None:
        super().__init__()
        self._name, self._objectives = name, tuple(objectives)
        self._began = time.monotonic()
        self._front: FrontSoFar | None = None
        self._workers: tuple[WorkerState, ...] = ()
        self._work: dict[str, _Work] = {}

    def show_front(self, front: FrontSoFar) -> None:
        """Show the front after one more trial."""
        self._front = front
        self.change()

    def show_workers(self, workers: Sequence[WorkerState], tasks: Mapping[str, Question | None]) -> None:
        """Show the workers of this process, and what the busy ones do; others in ``tasks`` are of other machines."""
        now, before = time.monotonic(), self._work
        work = {}
        for name, question in tasks.items():
            known = before.get(name)
            work[name] = known if known is not None and known.question == question else _Work(question, now)
        self._workers, self._work = tuple(workers), work
        self.change()

    def body(self, width: int) -> Iterable[RenderableType]:
        front, workers, work = self._front, self._workers, self._work
        if front is not None:
            count = "1 point" if len(front.records) == 1 else f"{len(front.records)} points"
            yield Text(f"front so far: {count}, hypervolume {front.hypervolume:.4f}", style="bold")
            if front.records:
                yield self._table(front.records)
        if workers or work:
            yield from self._about(workers, work)
        if front is not None and front.failed:
            yield Text(f"failed: {front.failed}, the last one: {front.reason}", style="red")
        yield Text(f"search {self._name}, running for {duration(time.monotonic() - self._began)}", style="dim")

    def _table(self, records: Sequence[Record]) -> Table:
        """Points evenly over the front, by the last objective, which is a cost in most searches."""
        ordered = sorted(records, key=lambda record: (record.values or {}).get(self._objectives[-1], 0.0))
        last = len(ordered) - 1
        places = sorted({i * last // (_POINTS - 1) for i in range(_POINTS)} if last >= _POINTS else range(last + 1))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("point", *(OBJECTIVES[name].label for name in self._objectives), "policy"):
            table.add_column(title, no_wrap=True, overflow="ellipsis")
        for place in places:
            record = ordered[place]
            values = [OBJECTIVES[name].show((record.values or {}).get(name)) for name in self._objectives]
            table.add_row(*map(Text, (record.id, *values, record.policy.describe())))
        return table

    def _about(self, workers: Sequence[WorkerState], work: Mapping[str, _Work]) -> Iterable[RenderableType]:
        names = {worker.name for worker in workers}
        busy = sum(name in work for name in names)
        restarts = sum(worker.starts - 1 for worker in workers)
        line = f"workers: {busy} busy, {len(workers) - busy} idle"
        line += f", started again {restarts} times" if restarts else ""
        elsewhere = len(work.keys() - names)
        line += f", {elsewhere} busy on other machines" if elsewhere else ""
        yield Text(line, style="bold")
        for i, worker in enumerate(workers[:_WORKERS]):
            again = f" (start {worker.starts})" if worker.starts > 1 else ""
            yield Text(f"{i:>3} {worker.device:<7} {self._does(worker, work)}{again}")
        if len(workers) > _WORKERS:
            yield Text(f"    and {len(workers) - _WORKERS} more")

    def _does(self, worker: WorkerState, work: Mapping[str, _Work]) -> str:
        item = work.get(worker.name)
        if item is None:
            return "idle" if worker.ready else "starting"
        passed = duration(time.monotonic() - item.since)
        question = item.question
        if question is None:
            return f"finishing, {passed}"
        policies = question.policies
        what = policies[0].describe() if len(policies) == 1 else f"{len(policies)} policies"
        what = what if len(what) <= _POLICY_WIDTH else what[: _POLICY_WIDTH - 1] + "…"
        does = _DOES[question.method]
        if question.method is Method.search:
            does = f"{question.arguments[0]:.0%} of the {does}"
        elif question.method is Method.control:
            does += f" {question.arguments[0]}"
        return f"{does}: {what}, {passed}"
