"""The table of tasks: each is claimed by one, a result needs its lease, and what is lost comes back once."""

from __future__ import annotations

import threading
from pathlib import Path

import optuna
import pytest
from sqlalchemy import make_url
from sqlalchemy.schema import CreateTable

from natsl.search.owner import Owner
from natsl.search.storage import Identity, _create, connect
from natsl.search.worker.table import TASKS, Ended, TaskTable, open_engine

PAYLOADS = {f"key{i}": {"method": "test", "number": i} for i in range(6)}
HERE = Owner.named("test")


@pytest.fixture
def table(tmp_path: Path) -> TaskTable:
    made = TaskTable(open_engine(tmp_path / "study.db", None), 1)
    made.create()
    return made


def lease(table: TaskTable, worker: str = "w") -> str:
    task = table.claim(worker, HERE)
    assert task is not None
    return task.lease


def ended(table: TaskTable) -> list[Ended]:
    return table.ended(set())


def test_tasks_are_claimed_in_order_and_once(table: TaskTable) -> None:
    table.submit(PAYLOADS)
    table.submit(PAYLOADS)
    claimed = [table.claim("w", HERE) for _ in range(7)]
    assert [None if task is None else task.payload for task in claimed] == [*PAYLOADS.values(), None]
    assert len({task.lease for task in claimed if task is not None}) == 6
    assert {task.process for task in table.running()} == {HERE}


def test_of_many_that_claim_at_once_each_gets_its_own(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    first = TaskTable(open_engine(path, None), 1)
    first.create()
    first.submit({f"key{i}": {"number": i} for i in range(40)})
    numbers: list[int] = []

    def work(name: str) -> None:
        own = TaskTable(open_engine(path, None), 1)
        while (task := own.claim(name, HERE)) is not None:
            assert own.finish(task.lease, answer=task.payload["number"])
            numbers.append(task.payload["number"])

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(40))
    assert [item.answer for item in ended(first)] == list(range(40))


def test_a_worker_gets_what_it_has_most_of_at_hand(table: TaskTable) -> None:
    table.submit(PAYLOADS, {"key1": "other", "key4": "w"})
    order = [table.claim("w", HERE) for _ in PAYLOADS]
    assert [task.payload["number"] for task in order if task is not None] == [4, 0, 2, 3, 5, 1]


def test_what_can_wait_comes_last(table: TaskTable) -> None:
    table.submit({"key0": PAYLOADS["key0"]}, {"key0": "w"}, later=True)
    table.submit(PAYLOADS)
    order = [table.claim("w", HERE) for _ in PAYLOADS]
    assert [task.payload["number"] for task in order if task is not None] == [1, 2, 3, 4, 5, 0]


def test_a_result_needs_its_lease(table: TaskTable) -> None:
    table.submit({"key": {}})
    late = lease(table)
    assert table.beat(late)
    assert table.put_back(late, "silent", counted=True)
    assert not table.beat(late)
    own = lease(table)
    assert not table.finish(late, answer="late")
    assert table.finish(own, answer="good")
    assert not table.finish(own, answer="again")
    assert not table.put_back(own, "silent", counted=True)
    assert ended(table) == [Ended("key", "w", "good", None, ["silent: put back"])]
    table.use(["key"])
    assert ended(table) == []


def test_a_task_is_put_back_once_unless_nobody_is_to_blame(table: TaskTable) -> None:
    table.submit({"key": {}})
    for _ in range(3):
        table.put_back(lease(table), "the search was stopped", counted=False)
    table.put_back(lease(table), "killed", counted=True)
    table.put_back(lease(table), "killed again", counted=True)
    assert table.claim("w", HERE) is None
    (failed,) = ended(table)
    assert failed.error == {"type": "WorkerError", "text": "killed again"}
    assert failed.history == [*["the search was stopped: put back"] * 3, "killed: put back"]
    table.submit({"key": {}})
    table.put_back(lease(table), "killed", counted=True)
    assert table.claim("w", HERE) is not None, "asked anew, it may be lost once more"


def test_what_an_earlier_process_wanted_waits_until_it_is_wanted_again(table: TaskTable) -> None:
    table.submit(PAYLOADS)
    table.finish(lease(table), answer=0)
    table.finish(lease(table), error={"type": "MemoryError", "text": ""})
    running = lease(table)
    table.create()
    assert table.claim("w", HERE) is None
    assert [item.key for item in ended(table)] == ["key0"]
    assert [task.lease for task in table.running()] == [running]
    table.put_back(running, "gone", counted=False, wanted=False)
    assert table.claim("w", HERE) is None
    table.submit({key: PAYLOADS[key] for key in ("key0", "key1", "key2")})
    assert [table.claim("w", HERE) is not None for _ in range(3)] == [True, True, False]
    table.submit(PAYLOADS)
    table.hold()
    assert table.claim("w", HERE) is None


def test_studies_of_one_database_are_apart(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "study.db", None)
    one, other = TaskTable(engine, 1), TaskTable(engine, 2)
    one.create()
    one.submit({"key": {"study": 1}})
    other.submit({"key": {"study": 2}})
    task = other.claim("w", HERE)
    assert task is not None
    assert task.payload == {"study": 2}
    other.create()
    assert one.claim("w", HERE) is not None


@pytest.mark.parametrize(
    ("name", "text"),
    [("sqlite", "TEXT"), ("postgresql", "TEXT"), ("mysql", "MEDIUMTEXT"), ("mariadb", "MEDIUMTEXT")],
)
def test_long_results_fit_everywhere(name: str, text: str) -> None:
    made = str(CreateTable(TASKS).compile(dialect=make_url(f"{name}://").get_dialect()()))
    assert f"result {text}" in made


def test_a_new_study_has_no_answers_of_a_deleted_one(tmp_path: Path) -> None:
    """A database may give it the same number."""
    storage, identity = connect(f"sqlite:///{tmp_path}/study.db"), Identity("mine", ["minimize"], lambda stored: {})
    _create(storage, identity)
    number = storage.get_study_id_from_name("mine")
    table = TaskTable(storage.engine, number)
    table.submit({"key": {}})
    task = table.claim("worker", Owner.named(""))
    assert task is not None
    assert table.finish(task.lease, {"answer": 1}, None)
    optuna.delete_study(study_name="mine", storage=storage)
    _create(storage, identity)
    assert storage.get_study_id_from_name("mine") == number
    assert not table.ended(set())
