"""What the view of a search shows: the front so far, what workers do, what failed."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

from natsl.run import Run
from natsl.search.config import SearchConfig
from natsl.search.journal import Journal
from natsl.search.question import Method, Question
from natsl.search.trial import Record
from natsl.search.view import FrontSoFar, SearchView
from natsl.search.worker.pool import WorkerState
from natsl.space.policy import RoutingPolicy
from natsl.tracking import Tracker
from tests.fake_search import fake_search
from tests.search_helpers import CHUNK, ROUTED, searched, synthetic

NAMES = ["recall_error", "kept_fraction"]
POLICY = RoutingPolicy.uniform(ROUTED, CHUNK, 0.25)
LOG = Path("0.log")


def shown(view: SearchView, width: int = 100) -> list[str]:
    """The lines of a view below its stage, as wide as a terminal."""
    console = Console(file=io.StringIO(), width=width)
    options = console.options.update(no_wrap=True, overflow="ellipsis")
    lines = console.render_lines(Group(*view.body(width)), options, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def record(index: int, kept: float, error: float) -> Record:
    evaluation = synthetic(POLICY)
    return Record(index, index, POLICY, {"recall_error": error, "kept_fraction": kept}, evaluation, True)


def test_the_front_is_a_small_table() -> None:
    view = SearchView("mine", NAMES)
    assert shown(view) == ["search mine, running for 0:00"]
    view.show_front(FrontSoFar((record(3, 0.5, 0.1),), 0.5))
    assert shown(view)[0] == "front so far: 1 point, hypervolume 0.5000"
    view.show_front(FrontSoFar((record(3, 0.5, 0.1), record(7, 0.25, 0.2)), 0.71234))
    first, titles, *rows, _ = shown(view)
    assert first == "front so far: 2 points, hypervolume 0.7123"
    assert [re.split(" {2,}", row) for row in (titles, *rows)] == [
        ["point", "recall error", "chunks kept for softmax", "policy"],
        ["t0007", "20.0\xa0%", "25.0\xa0%", POLICY.describe()],
        ["t0003", "10.0\xa0%", "50.0\xa0%", POLICY.describe()],
    ]
    view.show_front(FrontSoFar(tuple(record(i, i / 40, 1 - i / 40) for i in range(40)), 0.5))
    ids = [line.split()[0] for line in shown(view) if line.startswith("t0")]
    assert ids == ["t0000", "t0007", "t0015", "t0023", "t0031", "t0039"]


@pytest.mark.parametrize("width", [20, 60, 100])
def test_it_fits_the_terminal(width: int) -> None:
    view = SearchView("mine", NAMES)
    view.show_front(FrontSoFar((record(3, 0.5, 0.1),), 0.7, 1, "RuntimeError: " + 50 * "long "))
    view.show_workers([WorkerState("a", "cpu", True, 1, LOG)], {"a": Question.search(POLICY, 0.25)})
    assert all(len(line) <= width for line in shown(view, width))
    assert len(shown(view, width)) == 7


def test_workers_and_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("natsl.search.view.time.monotonic", lambda: now)
    view = SearchView("mine", NAMES)
    workers = [
        WorkerState("a", "cuda:0", True, 1, LOG),
        WorkerState("b", "cuda:1", True, 3, LOG),
        WorkerState("c", "cuda:2", False, 1, LOG),
        WorkerState("d", "cuda:3", True, 1, LOG),
        WorkerState("e", "cuda:4", True, 1, LOG),
    ]
    tasks: dict[str, Question | None] = {
        "a": Question.search(POLICY, 0.25),
        "d": Question(Method.search_each, (POLICY, POLICY), (True,)),
        "e": None,
        "elsewhere": Question.test(POLICY),
    }
    view.show_workers(workers, tasks)
    now += 70
    view.show_workers(workers, tasks | {"d": Question.test(POLICY)})
    view.show_front(FrontSoFar((), 0.0, 2, "worker ended with exit code -9, SIGKILL"))
    text = POLICY.describe()
    assert shown(view)[1:] == [
        "workers: 3 busy, 2 idle, started again 2 times, 1 busy on other machines",
        f"  0 cuda:0  25% of the search split: {text}, 1:10",
        "  1 cuda:1  idle (start 3)",
        "  2 cuda:2  starting",
        f"  3 cuda:3  test split: {text}, 0:00",
        "  4 cuda:4  finishing, 1:10",
        "failed: 2, the last one: worker ended with exit code -9, SIGKILL",
        "search mine, running for 1:10",
    ]


def test_every_method_has_a_name() -> None:
    view = SearchView("mine", NAMES)
    for method in Method:
        view.show_workers([WorkerState("a", "cpu", True, 1, LOG)], {"a": Question(method, (POLICY,), (1.0,))})
        assert f": {POLICY.describe()}, 0:00" in shown(view)[1]


class Seen(SearchView):
    """A view that keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__("mine", NAMES)
        self.fronts: list[FrontSoFar] = []
        self.workers: list[tuple[tuple[WorkerState, ...], dict[str, Any]]] = []

    def show_front(self, front: FrontSoFar) -> None:
        self.fronts.append(front)

    def show_workers(self, workers: Sequence[WorkerState], tasks: Any) -> None:
        self.workers.append((tuple(workers), dict(tasks)))


def test_the_journal_shows_what_is_on_the_front(tmp_path: Path) -> None:
    study = searched(tmp_path, SearchConfig(n_trials=24, anchors=12, constraints={"kept_fraction": 0.8}))
    view = Seen()
    journal = Journal(Run.open("first", tmp_path), Tracker(), NAMES, view)
    journal.resume(study.records[:10], 0.25)
    for item in study.records[10:]:
        journal.trial(item, 0.5)
    assert [front.hypervolume for front in view.fronts] == [0.25] + 14 * [0.5]
    assert sorted(item.index for item in view.fronts[-1].records) == [item.index for item in study.front()]
    failed = Record(24, 24, POLICY, None, None, False, "out of luck", transient=True)
    journal.trial(failed, 0.5)
    assert (view.fronts[-1].failed, view.fronts[-1].reason) == (1, "out of luck")
    journal.trial(record(24, 0.9, 0.9), 0.5)  # tried again
    assert (view.fronts[-1].failed, view.fronts[-1].reason) == (0, None)


def test_workers_are_watched_while_they_work(tmp_path: Path) -> None:
    view = Seen()
    config = SearchConfig(n_trials=3, anchors=2, workers=2, rungs=[1.0])
    with fake_search(tmp_path, config, seconds=0.6, fault="exit", times=1) as (study, judge, dispatcher):
        dispatcher._on_look = view.show_workers
        study.run(judge.search, queue=judge.queue)
        policies = {item.policy for item in study.records}
    assert view.workers[-1] == ((), {})  # they have ended
    names = {worker.name for workers, _ in view.workers for worker in workers}
    busy = [(name, question) for _, tasks in view.workers for name, question in tasks.items()]
    assert busy
    for name, question in busy:
        assert name in names
        assert question.method is Method.search
        assert question.policies[0] in policies
    assert max(worker.starts for workers, _ in view.workers for worker in workers) == 2
